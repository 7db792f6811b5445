"""Splits a command line into the settings file and the overrides, in our words or in Hydra's."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from speechlm2_jax.settings.errors import SettingsError
from speechlm2_jax.settings.read import find


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")


def parse_cli(
    argv: Sequence[str],
    *,
    program: str = "train.py",
    description: str = "Trains a speech language model from a YAML file.",
    default: str | None = None,
) -> tuple[str, list[str]]:
    """Splits command-line words into (name or path of the settings, overrides).

    Takes --config NAME_OR_PATH, or --config-path with --config-name as NeMo's scripts do. --help
    prints and exits. Raises SettingsError for a flag that is not known or no settings at all.
    """
    parser = _Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="NAME_OR_PATH", help="a name in configs/, or a file")
    parser.add_argument("--config-path", "-cp", metavar="FOLDER", help="with --config-name")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="a file of --config-path")
    words, overrides = _parse(parser, argv, "name the settings with --config")
    config = words.config or words.config_name or default
    if words.config_path and not words.config:
        if not words.config_name:
            raise SettingsError("--config-path needs --config-name, the file in that folder")
        config = str(find(words.config_name, (Path(words.config_path),)))
    if not config:
        raise SettingsError(f"name the settings: {program} --config NAME_OR_PATH [key=value ...]")
    return config, overrides


def parse_overrides(
    argv: Sequence[str], *, program: str, description: str, keys: Sequence[str] = ()
) -> list[str]:
    """The `key=value` words of a command without a settings file; --help lists `keys`."""
    parser = _Parser(
        prog=program,
        description=description,
        epilog=f"keys: {', '.join(keys)}" if keys else None,
        allow_abbrev=False,
    )
    return _parse(parser, argv, f"see {program} --help")[1]


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], hint: str
) -> tuple[argparse.Namespace, list[str]]:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted overrides: key=value, +new.key=value, ~key; lists as key=[1,2]",
    )
    words = parser.parse_intermixed_args(list(argv))
    for word in words.overrides:
        if "=" not in word and not word.startswith("~"):
            raise SettingsError(f"{word!r}: expected key=value; {hint}")
    return words, list(words.overrides)
