"""What the command lines of all servers have in common. Imports nothing heavy."""

import argparse
import errno
import logging
import math
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from speechlm2_jax.pretrained.near_paths import check_missing
from speechlm2_jax.serving.options import ServerOptions

Options = TypeVar("Options", bound=ServerOptions)
KEY_VARIABLE = "SPEECHLM2_API_KEYS"
MAX_PORT = 65535
MAY_BE_ZERO = ("max_queue", "temperature", "seed")


class Arguments:
    """Adds arguments to a group of a parser, with the defaults of the settings."""

    def __init__(self, group: argparse._ArgumentGroup, options: type[ServerOptions]) -> None:
        self.group = group
        self._defaults = defaults(options)

    def add(self, name: str, text: str, kind: type = str) -> None:
        """Adds an argument of a field, whose default is shown."""
        default = self._defaults[name.removeprefix("--").replace("-", "_")]
        shown = f" (default: {default})" if default not in (None, "", 0.0) else ""
        text += shown.replace("%", "%%")
        self.group.add_argument(name, type=kind, default=default, help=text)

    def add_address(self) -> None:
        """Adds where a server is, its keys and its log."""
        self.add("--host", "address to bind; 0.0.0.0 for all networks")
        self.add("--port", "port", int)
        self.add("--name", "name of the model in the API; by default the last part of MODEL")
        self.group.add_argument(
            "--api-key",
            dest="api_keys",
            action="append",
            default=[],
            help=f"key that requests must send; may be given several times. {KEY_VARIABLE} has "
            "some too, separated by commas, and is not seen in the list of processes",
        )
        self.group.add_argument(
            "--no-access-log",
            dest="access_log",
            action="store_false",
            help="log no line per request",
        )


def defaults(options: type[ServerOptions]) -> dict[str, Any]:
    """The defaults of settings, by their names."""
    return {field.name: field.default for field in fields(options)}


def read(values: dict[str, Any], options: type[Options]) -> Options:
    """The settings of a server. Raises ValueError for a value that cannot be."""
    check_numbers(values, options)
    known = defaults(options)
    keys = (*values["api_keys"], *_keys_of(os.environ.get(KEY_VARIABLE)))
    own = {key: value for key, value in values.items() if key in known}
    return options(**{**own, "api_keys": keys})


def check_numbers(values: dict[str, Any], options: type[ServerOptions]) -> None:
    """Raises ValueError, naming the argument, for a number that cannot be."""
    known = defaults(options)
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value != known.get(name):
            _check_number(f"--{name.replace('_', '-')}={value}", name, value)


def check_before_start(options: ServerOptions) -> None:
    """Checks what can be told at once. Raises ValueError for a model or an address in vain."""
    model = options.model
    if "://" not in model and not Path(model).expanduser().exists():
        check_missing(model, key="MODEL")
    _check_address(options.host, options.port)


def _check_address(host: str, port: int) -> None:
    kinds = {"type": socket.SOCK_STREAM, "flags": socket.AI_PASSIVE}
    try:
        family, *_, address = socket.getaddrinfo(host, port, **kinds)[0]
        with socket.socket(family, socket.SOCK_STREAM) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind(address)
    except socket.gaierror as error:
        raise ValueError(f"--host {host}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} of {host} is in use; take another with --port"
            raise ValueError(reason) from error
        raise ValueError(f"--host {host} --port {port}: {error.strerror}") from error


def _check_number(shown: str, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{shown}: must be a finite number")
    if value < 0 or (value == 0 and name not in MAY_BE_ZERO):
        raise ValueError(f"{shown}: must be {'0 or more' if name in MAY_BE_ZERO else 'positive'}")
    if name == "port" and value > MAX_PORT:
        raise ValueError(f"{shown}: must be at most {MAX_PORT}")


def _keys_of(value: str | None) -> list[str]:
    """The keys of the variable. Raises ValueError if it is set and a key of it is empty."""
    keys = [] if value is None else [key.strip() for key in value.split(",")]
    if not all(keys):
        raise ValueError(f"{KEY_VARIABLE} has an empty key; set it to KEY or KEY,KEY, or unset it")
    return keys


def run(
    program: str, read_options: Callable[[], Options], find: Callable[[], Callable[[Options], int]]
) -> int:
    """Serves until a signal. Returns the exit status; `find` imports the server."""
    try:
        options = read_options()
        check_before_start(options)
        serve = find()
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"{program}: the package {error.name} is missing; pip install 'speechlm2_jax[serve]'",
            file=sys.stderr,
        )
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)  # below it are no faults: a missing TPU
    return serve(options)
