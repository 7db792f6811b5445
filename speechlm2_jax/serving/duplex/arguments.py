"""The command line of `talk`. Imports nothing heavy, so that `--help` is quick."""

import argparse
from collections.abc import Callable, Sequence

from speechlm2_jax.serving import common_arguments
from speechlm2_jax.serving.common_arguments import KEY_VARIABLE, Arguments
from speechlm2_jax.serving.duplex.options import ConversationOptions

EXAMPLES = f"""\
examples:
  speechlm2-jax talk runs/s2s_duplex
  speechlm2-jax talk runs/s2s_duplex --max-sessions 2 --temperature 0.7
  {KEY_VARIABLE}=secret speechlm2-jax talk runs/s2s_duplex --host 0.0.0.0 --allow-host my.name
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the server to a parser."""
    parser.add_argument("model", help="a run directory, a saved model or a hub name")

    def group(title: str) -> Arguments:
        return Arguments(parser.add_argument_group(title), ConversationOptions)

    _add_address(group("address"))
    _add_model(group("model"))
    _add_limits(group("limits"))


def _add_address(address: Arguments) -> None:
    address.add_address()
    for name, dest, text in (
        ("--allow-host", "allowed_hosts", "name that clients may reach this server by"),
        ("--allow-origin", "allowed_origins", "other site whose pages may connect"),
    ):
        several = f"{text}; may be given several times"
        address.group.add_argument(name, dest=dest, action="append", default=[], help=several)


def _add_model(model: Arguments) -> None:
    model.add("--dtype", "float32 or bfloat16")
    model.add("--session-window-s", "seconds of a conversation that a frame attends to", float)
    model.add("--temperature", "of text and audio; 0: the likeliest of each", float)
    model.add("--seed", "of the temperature's random numbers", int)


def _add_limits(limits: Arguments) -> None:
    limits.add("--max-sessions", "conversations at once", int)
    limits.add(
        "--max-load", "of a chunk's duration, above which none begins: its step's time", float
    )
    limits.add("--max-session-s", "a longer conversation is ended", float)
    limits.add("--idle-timeout-s", "without audio of the user; then it is ended", float)
    limits.add("--max-message-bytes", "a larger message ends the conversation", int)
    limits.add("--max-backlog-s", "audio of the user that may wait for the device", float)
    limits.add("--max-unsent-s", "audio of the agent that may wait for the client", float)
    limits.add("--stall-s", "without audio of the user; then silence stands in for it", float)
    limits.add("--drain-timeout-s", "after SIGTERM, for conversations under way", float)


def read_options(arguments: argparse.Namespace) -> ConversationOptions:
    """The settings of a server. Raises ValueError for a value that cannot be."""
    values = dict(vars(arguments))
    for name in ("allowed_hosts", "allowed_origins"):
        values[name] = tuple(values[name])
    return common_arguments.read(values, ConversationOptions)


def _serve() -> Callable[[ConversationOptions], int]:
    from speechlm2_jax.serving.duplex.server import serve

    return serve


def main(argv: Sequence[str] | None = None, *, program: str = "speechlm2-jax talk") -> int:
    """Reads the command line and serves."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Serves a full-duplex model to talk with: a page, Moshi's protocol and "
        "OpenAI's Realtime protocol.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return common_arguments.run("talk", lambda: read_options(arguments), _serve)
