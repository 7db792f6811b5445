"""Strict YAML and command-line overrides <-> frozen dataclasses. Knows no model.

`load` reads a file, applies `key=value` overrides and resolves `${...}`; `build` turns the plain
result into a dataclass and refuses what it does not know; `to_plain` is its inverse.
"""

from speechlm2_jax.settings.build import (
    Refusal,
    build,
    defaults,
    ignored_report,
    report_ignored,
    to_plain,
)
from speechlm2_jax.settings.command_line import (
    CompileAhead,
    SettingsCommand,
    TrainCommand,
    parse_cli,
    parse_overrides,
    parse_settings,
    parse_train,
    settings_parser,
)
from speechlm2_jax.settings.errors import HostileTextError, SettingsError, join
from speechlm2_jax.settings.keys import key_problems, raise_all
from speechlm2_jax.settings.plain_json import parse_json, read_json
from speechlm2_jax.settings.read import (
    MISSING,
    find,
    load,
    override,
    parse_yaml,
    require_complete,
    resolve,
)
from speechlm2_jax.settings.text import decode_text, read_text

__all__ = [
    "MISSING",
    "CompileAhead",
    "HostileTextError",
    "Refusal",
    "SettingsCommand",
    "SettingsError",
    "TrainCommand",
    "build",
    "decode_text",
    "defaults",
    "find",
    "ignored_report",
    "join",
    "key_problems",
    "load",
    "override",
    "parse_cli",
    "parse_json",
    "parse_overrides",
    "parse_settings",
    "parse_train",
    "parse_yaml",
    "read_json",
    "read_text",
    "raise_all",
    "report_ignored",
    "require_complete",
    "resolve",
    "settings_parser",
    "to_plain",
]
