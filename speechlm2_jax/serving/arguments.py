"""The command line of the server. Imports nothing heavy, so that `--help` is quick."""

import argparse
import errno
import logging
import math
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from speechlm2_jax.pretrained.near_paths import check_missing
from speechlm2_jax.serving.options import MIB, ServeOptions

KEY_VARIABLE = "SPEECHLM2_API_KEYS"
MAX_PORT = 65535
EXAMPLES = """\
examples:
  speechlm2-jax serve runs/salm
  speechlm2-jax serve nvidia/canary-qwen-2.5b --dtype bfloat16 --language en --slots 32
  SPEECHLM2_API_KEYS=first,second speechlm2-jax serve runs/salm --host 0.0.0.0 --port 80
"""
_DEFAULTS = {field.name: field.default for field in fields(ServeOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the server to a parser."""
    parser.add_argument("model", help="a run directory, a saved model or a hub name")
    _add_address(parser.add_argument_group("address"))
    _add_model(parser.add_argument_group("model"))
    _add_batching(parser.add_argument_group("batching"))
    _add_limits(parser.add_argument_group("limits"))


def _add_address(address: argparse._ArgumentGroup) -> None:
    _add(address, "--host", "address to bind; 0.0.0.0 for all networks")
    _add(address, "--port", "port", int)
    _add(address, "--name", "name of the model in the API; by default the last part of MODEL")
    address.add_argument(
        "--api-key",
        dest="api_keys",
        action="append",
        default=[],
        help=f"key that requests must send; may be given several times. {KEY_VARIABLE} has "
        "some too, separated by commas, and is not seen in the list of processes",
    )
    address.add_argument(
        "--no-access-log",
        dest="access_log",
        action="store_false",
        help="log no line per request",
    )


def _add_model(model: argparse._ArgumentGroup) -> None:
    _add(model, "--dtype", "float32 or bfloat16")
    _add(model, "--strategy", "auto: the weights lie on all devices")
    _add(model, "--quantize", "int8 or fp8 weights of the LLM")
    _add(model, "--kv-cache-dtype", "int8 or fp8 KV cache")
    _add(model, "--aligner", "ASR model that finds the times of words, or none; by default its own")
    _add(model, "--prompt", "the user's turn of a transcription; by default that of the training")
    _add(model, "--language", "language that requests may name, for example en")


def _add_batching(batching: argparse._ArgumentGroup) -> None:
    _add(batching, "--slots", "sequences that are decoded at once", int)
    _add(batching, "--max-prompt-tokens", "positions of the longest prompt, with audio frames", int)
    _add(batching, "--max-new-tokens", "most tokens of a response", int)
    _add(batching, "--tokens-at-once", "tokens between two points where requests join", int)
    _add(batching, "--prefill-tokens", "positions of a prompt that run at once", int)
    _add(batching, "--audio-workers", "processes that decode audio", int)


def _add_limits(limits: argparse._ArgumentGroup) -> None:
    _add(limits, "--max-queue", "requests beyond the slots; further ones get 429", int)
    _add(
        limits,
        "--max-audio-s",
        "longer recordings are cut; by default the longest of the training, else 40",
        float,
    )
    _add(limits, "--max-duration-s", "longer recordings are refused", float)
    limits.add_argument(
        "--max-body-mib",
        type=float,
        default=ServeOptions.max_body_bytes / MIB,
        help="largest request (default: %(default)g)",
    )
    _add(limits, "--body-timeout-s", "time to send a request", float)
    _add(limits, "--decode-timeout-s", "time to decode a recording", float)
    _add(limits, "--request-timeout-s", "time from the request to its whole response", float)
    _add(limits, "--drain-timeout-s", "after SIGTERM, for requests that run", float)


def read_options(arguments: argparse.Namespace) -> ServeOptions:
    """The settings of a server. Raises ValueError for a value that cannot be."""
    values = dict(vars(arguments))
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value != _DEFAULTS.get(name):
            _check_number(f"--{name.replace('_', '-')}={value}", name, value)
    values["max_body_bytes"] = math.ceil(values.pop("max_body_mib") * MIB)
    values["api_keys"] = (*values["api_keys"], *_keys_of(os.environ.get(KEY_VARIABLE)))
    known = {field.name for field in fields(ServeOptions)}
    return ServeOptions(**{key: value for key, value in values.items() if key in known})


def check_before_start(options: ServeOptions) -> None:
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
    if value < 0 or (value == 0 and name != "max_queue"):
        raise ValueError(f"{shown}: must be {'0 or more' if name == 'max_queue' else 'positive'}")
    if name == "port" and value > MAX_PORT:
        raise ValueError(f"{shown}: must be at most {MAX_PORT}")


def _keys_of(value: str | None) -> list[str]:
    """The keys of the variable. Raises ValueError if it is set and a key of it is empty."""
    keys = [] if value is None else [key.strip() for key in value.split(",")]
    if not all(keys):
        raise ValueError(f"{KEY_VARIABLE} has an empty key; set it to KEY or KEY,KEY, or unset it")
    return keys


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal. Returns the exit status."""
    try:
        options = read_options(arguments)
        check_before_start(options)
        from speechlm2_jax.serving.server import serve
    except ValueError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"serve: the package {error.name} is missing; pip install 'speechlm2_jax[serve]'",
            file=sys.stderr,
        )
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)  # below it are no faults: a missing TPU
    return serve(options)


def main(argv: Sequence[str] | None = None, *, program: str = "speechlm2-jax serve") -> int:
    """Reads the command line and serves."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Serves a SALM over HTTP with OpenAI's API, by continuous batching.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _add(group: argparse._ArgumentGroup, name: str, text: str, kind: type = str) -> None:
    default = _DEFAULTS[name.removeprefix("--").replace("-", "_")]
    shown = f" (default: {default})" if default not in (None, "", 0.0) else ""
    group.add_argument(name, type=kind, default=default, help=text + shown.replace("%", "%%"))
