"""`--help` before the slow imports of a program: its docstring, and the options in its source."""

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from speechlm2_jax.bundled import page

HELP = ("-h", "--help")
_ADDERS = ("add_argument", "add")


def print_help_if_asked(
    path: str,
    *,
    keys_of: Sequence[str] = (),
    keys_page: str = "",
    argv: Sequence[str] | None = None,
    program: str | None = None,
) -> None:
    """Prints the usage of the program in file `path` and exits with 0, if --help is given.

    `keys_of` are files beside the program; the fields of their dataclasses are its `key=value`
    options, which the page `keys_page` of docs/ describes. Call it above the program's imports, so
    that nothing slow is imported. `argv` are its arguments, by default those of the process, and
    `program` what the usage calls it.
    """
    if not set(HELP) & set(sys.argv[1:] if argv is None else argv):
        return
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    command = _command(Path(path), program)
    text = as_typed(ast.get_docstring(tree) or "", Path(path).name, command)
    lines = [f"usage: {command} [-h] [OPTION ...]", "", text]
    if options := list(_options(tree)):
        lines += ["", "options:", *options]
    if keys := dict.fromkeys(k for file in keys_of for k in _keys(Path(path).parent / file)):
        lines += ["", f"keys: {', '.join(keys)}"]
        lines += [f"what they mean: {page(keys_page)}"] if keys_page else []
    with suppress(BrokenPipeError):
        print("\n".join(lines), flush=True)
        sys.exit(0)
    os._exit(0)  # the pipe is closed: exit without a message


def as_typed(text: str, script: str, command: str) -> str:
    """The text of a usage with `command` for `python SCRIPT`.

    Where the command is no script, there may be none of that name: lines that start it otherwise,
    as by the launcher, are left out.
    """
    lines = text.replace(f"python {script}", command).splitlines()
    if not command.endswith(".py"):
        lines = [line for line in lines if f" {script} " not in line]
    return "\n".join(lines)


def _command(path: Path, program: str | None) -> str:
    """The command that starts the program."""
    if program is not None and not program.endswith(".py"):
        return program
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:
        return f"python {sys.argv[0] or path.name}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _keys(path: Path) -> Iterator[str]:
    """The fields of the dataclasses in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if not (isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)):
                    continue
                if "ClassVar" not in ast.unparse(part.annotation):
                    yield part.target.id


def _options(tree: ast.Module) -> Iterator[str]:
    """A line for each `add_argument` call in the source."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        flags = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if name in _ADDERS and flags and all(isinstance(flag, str) for flag in flags):
            keywords = {k.arg: k.value for k in node.keywords}
            text = keywords.get("help")
            description = text.value if isinstance(text, ast.Constant) else ""
            default = keywords.get("default")
            description = (
                f"{description} (default: {ast.unparse(default)})"
                if default is not None
                else description
            )
            yield f"  {', '.join(map(str, flags)):<28} {description}".rstrip()
