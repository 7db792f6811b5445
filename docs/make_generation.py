"""Writes the table of docs/generation.md from the code that reads a GenerationConfig.

From the project's folder: `PYTHONPATH=. python docs/make_generation.py`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

from collections.abc import Iterator

from speechlm2_jax.inference.request.keys import ARGUMENTS, HONOURED, IGNORED, OWN, REFUSED

PAGE = Path(__file__).with_name("generation.md")
BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"


def rows() -> Iterator[tuple[str, str, str]]:
    """Key, what becomes of it, and what it means or why."""
    yield from ((key, "honoured", note) for key, note in HONOURED.items())
    yield from ((key, "own", note) for key, note in OWN.items())
    yield from ((key, "ignored", note) for key, note in IGNORED.items())
    yield from ((key, "refused", refused.reason) for key, refused in REFUSED.items())
    yield from ((key, "refused", note) for key, note in ARGUMENTS.items())


def render(page: str) -> str:
    """The page with its table as the code has it."""
    before, rest = page.split(BEGIN)
    lines = [f"| `{key}` | {status} | {note} |" for key, status, note in rows()]
    table = "\n".join(["| key | | |", "|---|---|---|", *lines, ""])
    return before + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
