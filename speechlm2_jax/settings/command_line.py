"""Splits a command line into the settings file and the overrides, in our syntax or Hydra's."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from speechlm2_jax.settings.errors import SettingsError
from speechlm2_jax.settings.read import find

TRAIN_DESCRIPTION = "Trains a speech language model from a YAML file."
NAME_THE_SETTINGS = "name the settings with --config"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The arguments of train.py."""

    config: str
    """Name or path of the settings."""
    overrides: list[str]
    over: tuple[str, ...] = ()
    """More files, whose values replace those of `config`."""
    dry_run: bool
    """Build and describe everything without training."""
    ahead: "CompileAhead | None" = None
    """Compile for devices that are not attached, without training."""


@dataclass(frozen=True, kw_only=True)
class SettingsCommand:
    """Settings that a command reads."""

    config: str
    """Name or path of the settings."""
    over: tuple[str, ...]
    """More files, whose values replace those of `config`."""
    overrides: list[str]


@dataclass(frozen=True, kw_only=True)
class CompileAhead:
    """What is compiled ahead of time, and for what; None: as the settings say."""

    topology: str
    libtpu: Path | None
    generates: bool
    """Compile generation instead of the training step."""
    rows: int | None
    tokens: int | None
    seconds: float | None
    new_tokens: int


def parse_train(argv: Sequence[str], program: str = "train.py") -> TrainCommand:
    """Reads the arguments of train.py: those of `parse_cli`, --dry-run and --compile-for."""
    parser = _settings_parser(program, TRAIN_DESCRIPTION)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, print modules, shapes and memory, train and write nothing",
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="start from the weights of a run, saved model or hub name",
    )
    _add_ahead(parser)
    arguments, overrides = _parse(parser, argv, NAME_THE_SETTINGS)
    if arguments.start is not None:
        overrides = [*overrides, f"++model.init_from_checkpoint={arguments.start}"]
    config, *over = _settings_of(arguments, program, None)
    ahead = None
    if arguments.compile_for:
        ahead = CompileAhead(
            topology=arguments.compile_for,
            libtpu=arguments.libtpu,
            generates=arguments.generate,
            rows=arguments.rows,
            tokens=arguments.tokens,
            seconds=arguments.seconds,
            new_tokens=arguments.new_tokens,
        )
    return TrainCommand(
        config=config,
        overrides=overrides,
        over=tuple(over),
        dry_run=arguments.dry_run,
        ahead=ahead,
    )


def _add_ahead(parser: argparse.ArgumentParser) -> None:
    ahead = parser.add_argument_group("ahead-of-time compilation for TPUs that are not attached")
    add = ahead.add_argument
    add("--compile-for", metavar="TOPOLOGY", help="such as v5e:4x4: does a step fit?")
    add(
        "--libtpu",
        type=Path,
        metavar="DIR",
        help="filled by python -m speechlm2_jax.aot.fetch",
    )
    add("--generate", action="store_true", help="generation, not the training step")
    add("--rows", type=int, help="conversations on each data-parallel device")
    add("--tokens", type=int, help="LLM positions of a sequence")
    add("--seconds", type=float, help="longest recording")
    add("--new-tokens", type=int, default=128, help="new tokens per response, with --generate")


def parse_cli(
    argv: Sequence[str],
    *,
    program: str = "train.py",
    description: str = TRAIN_DESCRIPTION,
    default: str | None = None,
) -> tuple[str, list[str]]:
    """Splits command-line arguments into (name or path of the settings, overrides).

    Takes --config NAME_OR_PATH, or --config-path with --config-name as NeMo's scripts do. --help
    prints and exits. Raises SettingsError for an unknown flag or missing settings.
    """
    arguments, overrides = _parse(_settings_parser(program, description), argv, NAME_THE_SETTINGS)
    config, *more = _settings_of(arguments, program, default)
    if more:
        raise SettingsError(f"--config: {program} takes one file, got {', '.join([config, *more])}")
    return config, overrides


def _settings_parser(program: str, description: str) -> _Parser:
    parser = _Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME_OR_PATH",
        help="a name in configs/, or a file; of several, where taken, the later over the earlier",
    )
    parser.add_argument("--config-path", "-cp", metavar="FOLDER", help="with --config-name")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="a file of --config-path")
    return parser


def _settings_of(arguments: argparse.Namespace, program: str, default: str | None) -> list[str]:
    """The files of settings, the first of them whole."""
    named = arguments.config_name
    if arguments.config_path and named:
        named = str(find(named, (Path(arguments.config_path),)))
    elif arguments.config_path and not arguments.config:
        raise SettingsError("--config-path needs --config-name, the file in that folder")
    first = [name for name in (named, None if arguments.config else default) if name]
    files: list[str] = [*first, *arguments.config]
    if not files:
        raise SettingsError(f"name the settings: {program} --config NAME_OR_PATH [key=value ...]")
    return files


def settings_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser for `parse_settings`, to which a command adds options of its own."""
    return _settings_parser(program, description)


def parse_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, SettingsCommand]:
    """The arguments of a command, and its settings: those of train.py.

    The first file needs no `--config`. Raises SettingsError for an unknown flag, or missing files.
    """
    parser.add_argument("words", nargs="*", metavar="NAME_OR_PATH | key=value")
    arguments = parser.parse_intermixed_args(list(argv))
    words: list[str] = arguments.words
    is_first_a_file = bool(words) and "=" not in words[0] and not words[0].startswith("~")
    first, overrides = (words[0], words[1:]) if is_first_a_file else (None, words)
    _check_overrides(overrides, f"see {parser.prog} --help")
    arguments.config = [*([first] if first else []), *arguments.config]
    config, *over = _settings_of(arguments, parser.prog, None)
    return arguments, SettingsCommand(config=config, over=tuple(over), overrides=overrides)


def parse_overrides(
    argv: Sequence[str], *, program: str, description: str, keys: Sequence[str] = ()
) -> list[str]:
    """The `key=value` arguments of a command without a settings file; --help lists `keys`."""
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
    arguments = parser.parse_intermixed_args(list(argv))
    _check_overrides(arguments.overrides, hint)
    return arguments, list(arguments.overrides)


def _check_overrides(overrides: Sequence[str], hint: str) -> None:
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise SettingsError(f"{override!r}: expected key=value; {hint}")
