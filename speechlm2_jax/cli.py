"""The command `speechlm2-jax`: one command line for everything that the package does.

A command is a line of the table COMMANDS. Its module is imported when it is called, so that help
comes at once.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

PROGRAM = "speechlm2-jax"
HELP = ("-h", "--help", "help")


@dataclass(frozen=True)
class Command:
    """A command: what it does, and the function `(argv, *, program) -> exit code` that does it."""

    name: str
    summary: str
    function: str
    """MODULE:NAME."""
    example: str
    """Its arguments in the example of the help."""

    def run(self, argv: Sequence[str]) -> int:
        """Imports the module and calls the function. Returns its exit code."""
        module, _, name = self.function.partition(":")
        call = getattr(importlib.import_module(module), name)
        return call(argv, program=f"{PROGRAM} {self.name}") or 0


COMMANDS: dict[str, tuple[Command, ...]] = {
    "use a model": (
        Command(
            "transcribe",
            "turn recordings into texts or subtitles",
            "speechlm2_jax.commands.transcribe:main",
            "interview.m4a lectures/ --output srt",
        ),
        Command(
            "serve",
            "serve a model over HTTP with OpenAI's API",
            "speechlm2_jax.serving.arguments:main",
            "runs/salm --port 8000",
        ),
        Command(
            "talk",
            "talk with a full-duplex model: a page, and two known protocols",
            "speechlm2_jax.serving.duplex.arguments:main",
            "runs/s2s_duplex",
        ),
    ),
    "train and evaluate": (
        Command(
            "train",
            "train a model from a YAML file; the same command resumes",
            "speechlm2_jax.commands.train:run",
            "--config salm trainer.max_steps=300",
        ),
        Command(
            "evaluate",
            "generate a response to every recording of a test set, and score them",
            "speechlm2_jax.commands.evaluate:run",
            "pretrained_name=runs/salm inputs=test.jsonl",
        ),
        Command(
            "runs",
            "compare runs: a table, and a page of curves",
            "speechlm2_jax.commands.runs:main",
            "runs/salm runs/salm2 --html runs.html",
        ),
        Command(
            "plan",
            "choose bins and batch sizes that fit a device",
            "speechlm2_jax.data.plan:main",
            "salm --buckets 8",
        ),
    ),
    "data": (
        Command(
            "align",
            "add the times of words to a manifest",
            "speechlm2_jax.commands.align:main",
            "test.jsonl --aligner nvidia/parakeet-ctc-0.6b",
        ),
        Command(
            "manifest",
            "make manifests of a folder of recordings and texts: checked, and split into sets",
            "speechlm2_jax.commands.manifest:main",
            "my_recordings --split train=0.9,test=0.1",
        ),
        Command(
            "inspect",
            "show the data of a YAML file as an HTML page",
            "speechlm2_jax.data.inspect:main",
            "salm --output data.html",
        ),
    ),
    "checkpoints": (
        Command(
            "convert",
            "convert a checkpoint to NeMo's or Hugging Face's format, or list its tensors",
            "speechlm2_jax.commands.convert:run",
            "runs/salm exported --to hf",
        ),
    ),
}
"""Group of the help -> its commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 after one line on what is wrong.

    `argv` are the arguments after the program's name, by default those of the process.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in HELP:
        print(usage())
        return 0
    if name == "--version":
        from speechlm2_jax import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    found = {command.name: command for group in COMMANDS.values() for command in group}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(found)}"
        print(f"{PROGRAM}: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    from speechlm2_jax import console

    console.ignore_closed_pipes()
    return found[name].run(arguments)


def usage() -> str:
    """The text of --help: every command with its summary and an example."""
    width = max(len(command.name) for group in COMMANDS.values() for command in group)
    lines = [f"usage: {PROGRAM} COMMAND [OPTION ...]", "", "Speech language models in JAX."]
    for title, group in COMMANDS.items():
        lines += ["", f"{title}:"]
        for command in group:
            lines += [
                f"  {command.name:<{width}}  {command.summary}",
                f"  {'':<{width}}  $ {PROGRAM} {command.name} {command.example}".rstrip(),
            ]
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help lists the options of a command."])
