"""The command line of the server. Imports nothing heavy, so that `--help` is quick."""

import argparse
import math
from collections.abc import Callable, Sequence

from speechlm2_jax.serving import common_arguments
from speechlm2_jax.serving.common_arguments import Arguments
from speechlm2_jax.serving.options import MIB, ServeOptions

EXAMPLES = """\
examples:
  speechlm2-jax serve runs/salm
  speechlm2-jax serve nvidia/canary-qwen-2.5b --dtype bfloat16 --language en --slots 32
  SPEECHLM2_API_KEYS=first,second speechlm2-jax serve runs/salm --host 0.0.0.0 --port 80
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the server to a parser."""
    parser.add_argument("model", help="a run directory, a saved model or a hub name")

    def group(title: str) -> Arguments:
        return Arguments(parser.add_argument_group(title), ServeOptions)

    group("address").add_address()
    _add_model(group("model"))
    _add_batching(group("batching"))
    _add_limits(group("limits"))


def _add_model(model: Arguments) -> None:
    model.add("--dtype", "float32 or bfloat16")
    model.add("--strategy", "auto: the weights lie on all devices")
    model.add("--quantize", "int8 or fp8 weights of the LLM")
    model.add("--kv-cache-dtype", "int8 or fp8 KV cache")
    model.add("--aligner", "ASR model that finds the times of words, or none; by default its own")
    model.add("--prompt", "the user's turn of a transcription; by default that of the training")
    model.add("--language", "language that requests may name, for example en")


def _add_batching(batching: Arguments) -> None:
    batching.add("--slots", "sequences that are decoded at once", int)
    batching.add("--max-prompt-tokens", "positions of the longest prompt, with audio frames", int)
    batching.add("--max-new-tokens", "most tokens of a response", int)
    batching.add("--tokens-at-once", "tokens between two points where requests join", int)
    batching.add("--prefill-tokens", "positions of a prompt that run at once", int)
    batching.add("--audio-workers", "processes that decode audio", int)


def _add_limits(limits: Arguments) -> None:
    limits.add("--max-queue", "requests beyond the slots; further ones get 429", int)
    limits.add(
        "--max-audio-s",
        "longer recordings are cut; by default the longest of the training, else 40",
        float,
    )
    limits.add("--max-duration-s", "longer recordings are refused", float)
    limits.group.add_argument(
        "--max-body-mib",
        type=float,
        default=ServeOptions.max_body_bytes / MIB,
        help="largest request (default: %(default)g)",
    )
    limits.add("--body-timeout-s", "time to send a request", float)
    limits.add("--decode-timeout-s", "time to decode a recording", float)
    limits.add("--request-timeout-s", "time from the request to its whole response", float)
    limits.add("--drain-timeout-s", "after SIGTERM, for requests that run", float)


def read_options(arguments: argparse.Namespace) -> ServeOptions:
    """The settings of a server. Raises ValueError for a value that cannot be."""
    values = dict(vars(arguments))
    common_arguments.check_numbers(values, ServeOptions)
    values["max_body_bytes"] = math.ceil(values.pop("max_body_mib") * MIB)
    return common_arguments.read(values, ServeOptions)


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal. Returns the exit status."""
    return common_arguments.run("serve", lambda: read_options(arguments), _serve)


def _serve() -> Callable[[ServeOptions], int]:
    from speechlm2_jax.serving.server import serve

    return serve


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
