"""The canonical form of a lowered program: what it computes, without the names of who asked for it.

Left out: source locations, `jax.result_info` and `jax.arg_info`, the names of the module and of its
private functions (numbered by first use), and the order of the main function's arguments (by first
use) and results (by definition). Kept: every operation, type, constant, sharding and donation.
So renaming and moving Python code, or reordering the fields of a pytree, changes nothing here.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

_INFO = re.compile(r'(?:, )?jax\.(?:result|arg)_info = "(?:[^"\\]|\\.)*"')
_FUNCTION = re.compile(r"^  func\.func (?:public|private) @([\w.\-$]+|\"[^\"]+\")\(", re.M)
_CALL = re.compile(r"@([\w.\-$]+|\"[^\"]+\")")
_VALUE = re.compile(r"%[A-Za-z_0-9]+")
_ALIAS = re.compile(r"tf\.aliasing_output = (\d+)")
_OPERATION = re.compile(r"^\s+(?:%[\w:]+ = )?\"?(?:stablehlo|chlo|sdy|call|func|mhlo)\b", re.M)


class Program(NamedTuple):
    """A program by its canonical text."""

    text: str

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the text's SHA-256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def operations(self) -> int:
        """How many operations the text holds; the body of a loop counts once."""
        return len(_OPERATION.findall(self.text))


class _Function(NamedTuple):
    arguments: list[str]
    results: list[str]
    body: str


def canonical(text: str) -> Program:
    """Reads a StableHLO module as JAX prints it (without debug information)."""
    text = _INFO.sub("", text).replace("{, ", "{").replace(" {}", "")
    functions = dict(_functions(text))
    header = text[: text.index("func.func")].split("\n", 1)
    meshes = header[1].strip() if len(header) > 1 else ""
    order, at = ["main"], 0
    while at < len(order):  # breadth first from the entry point, by first use
        for name in _CALL.findall(functions[order[at]].body):
            if name in functions and name not in order:
                order.append(name)
        at += 1
    numbers = {name: f"f{n}" for n, name in enumerate(order)}
    parts = [re.sub(r"^module @\S+ ", "module ", header[0]), meshes]
    parts += [_render(name, functions[name], numbers) for name in order]
    return Program("\n".join(parts))


def _functions(text: str) -> Iterator[tuple[str, _Function]]:
    starts = list(_FUNCTION.finditer(text))
    for match, following in zip(starts, [*starts[1:], None], strict=True):
        block = text[match.start() : following.start() if following else len(text)]
        opening = match.end() - match.start() - 1
        arguments, end = _bracketed(block, opening)
        rest = block[end:]
        results: list[str] = []
        if rest.startswith(" -> ("):
            results, end = _bracketed(rest, 4)
            rest = rest[end:]
        elif rest.startswith(" -> "):
            results, rest = [rest[4 : rest.index(" {\n")]], rest[rest.index(" {\n") :]
        yield match.group(1), _Function(arguments, results, rest.rstrip().rstrip("}"))


def _bracketed(text: str, at: int) -> tuple[list[str], int]:
    """Splits what stands in the bracket that opens at `at` at its commas; also its end."""
    depth, quoted, parts, begin = 0, False, [], at + 1
    for n in range(at, len(text)):
        char = text[n]
        if char == '"':
            quoted = not quoted
        elif quoted or text[n - 1 : n + 1] == "->":
            continue
        elif char in "([{<":
            depth += 1
        elif char in ")]}>":
            depth -= 1
        if (char == "," and depth == 1 and not quoted) or depth == 0:
            parts.append(text[begin:n].strip())
            begin = n + 1
        if depth == 0:
            return [part for part in parts if part], n + 1
    raise ValueError("a bracket that never closes")


def _render(name: str, function: _Function, numbers: dict[str, str]) -> str:
    """A function with its values numbered by first use; main's arguments and results in order."""
    body = _CALL.sub(lambda m: f"@{numbers.get(m.group(1), m.group(1))}", function.body)
    arguments = dict(argument.split(": ", 1) for argument in function.arguments)
    used = list(dict.fromkeys(_VALUE.findall(body)))
    if name == "main":
        place = {value: n for n, value in enumerate(used)}
        known = sorted(arguments, key=lambda a: (place.get(a, len(place)), arguments[a]))
        arguments = {argument: arguments[argument] for argument in known}
    values = {value: f"%{n}" for n, value in enumerate(dict.fromkeys([*arguments, *used]))}
    body = _VALUE.sub(lambda m: values[m.group(0)], body)
    results = function.results
    if name == "main":
        body, results, moved = _ordered_results(body, results)
        arguments = {
            argument: _ALIAS.sub(lambda m: f"tf.aliasing_output = {moved[int(m.group(1))]}", kind)
            for argument, kind in arguments.items()
        }
    given = ", ".join(f"{values[argument]}: {kind}" for argument, kind in arguments.items())
    return f"{numbers[name]}({given}) -> ({', '.join(results)}) {body}"


def _ordered_results(body: str, results: list[str]) -> tuple[str, list[str], dict[int, int]]:
    """Sorts what main returns by where it was computed; also the new place of each result."""
    begin = body.rindex("    return")
    returned = body[begin:].split(" : ", 1)[0].removeprefix("    return").strip()
    names = [name.strip() for name in returned.split(",") if name.strip()]
    order = sorted(range(len(names)), key=lambda n: (*_place(names[n]), results[n]))
    moved = {old: new for new, old in enumerate(order)}
    body = body[:begin] + "    return " + ", ".join(names[n] for n in order)
    return body, [results[n] for n in order], moved


def _place(value: str) -> tuple[int, int]:
    """`%12#3` -> (12, 3)."""
    name, _, part = value.removeprefix("%").partition("#")
    return int(name), int(part or 0)
