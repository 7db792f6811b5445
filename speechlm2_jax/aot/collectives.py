"""Collectives of a compiled program and the bytes that they send, parsed from its HLO text."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS: Mapping[str, int] = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CONSTANT = re.compile(r"%([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"compare\(([^)]*)\), direction=(LT|LE)")
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\(\d+\)(\d+))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All operations of one kind, of one run of the program."""

    kind: str
    count: int
    """Loops included: an operation in the body of a loop of 28 counts 28 times."""
    bytes_sent: int
    """By each chip, if rings are used: what must cross its links."""


def collectives(text: str) -> list[Collective]:
    """Counts the collectives of a compiled program's text (`compiled.as_text()`), by kind."""
    computations = _computations(text)
    counts: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for name, times in _times_run(computations, _entry(text)).items():
        for kind, size in _operations(name, computations[name]):
            counts[kind] += times
            sent[kind] += times * size
    return [Collective(kind=k, count=counts[k], bytes_sent=sent[k]) for k in KINDS if counts[k]]


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if (header := _COMPUTATION.match(line)) is not None:
            lines = found[header[1]] = []
        elif line.startswith("  "):
            lines.append(line)
    return found


def _entry(text: str) -> str:
    named = re.search(r"^ENTRY %([\w.\-]+)", text, re.MULTILINE)
    if named is None:
        raise ValueError("not the text of a compiled program: it has no ENTRY")
    return named[1]


def _times_run(computations: Mapping[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs, loops by the bound in their condition."""
    times: Counter[str] = Counter()

    def run(name: str, count: int) -> None:
        times[name] += count
        for line in computations[name]:
            loop = _LOOP.search(line)
            if loop is not None:
                run(loop[2], count * _trips(computations[loop[1]]))
                continue
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"%([\w.\-]+)", branches)
            for other in called:
                run(other, count)

    run(entry, 1)
    return times


def _trips(condition: list[str]) -> int:
    """Rounds of a loop that counts from 0 up to a constant; 1 where the bound is no constant."""
    constants = {name: int(value) for line in condition for name, value in _CONSTANT.findall(line)}
    for line in condition:
        if (compared := _LESS.search(line)) is not None:
            names = re.findall(r"%([\w.\-]+)", compared[1])
            for bound in (constants[name] for name in names if name in constants):
                return bound + (compared[2] == "LE")
    return 1


def _operations(name: str, lines: list[str]) -> Iterator[tuple[str, int]]:
    """Kind and bytes sent by each chip of the collectives in one computation."""
    # the TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice
    is_scatter = "reduce-scatter" in name
    # an asynchronous one is written into the fusions it runs beside, too; it counts where it starts
    starts = any("AsyncCollectiveStart" in line for line in lines)
    for line in lines:
        found = _COLLECTIVE.search(line)
        if found is None or ("chain_id=" in line and not starts):
            continue
        kind = "reduce-scatter" if is_scatter and found[2] == "all-reduce" else found[2]
        sizes = [_bytes(*shape) for shape in _SHAPE.findall(found[1])]
        # of an asynchronous one the result is listed beside the operand
        size = max(sizes, default=0) if found[3] else sum(sizes)
        yield kind, round(size * _share_sent(kind, found[2], _group_size(line)))


def _share_sent(kind: str, written: str, group: int) -> float:
    """The part of its result's size that each chip sends, around a ring."""
    if kind == "collective-permute":
        return 1.0
    share = (group - 1) / group
    if kind == "reduce-scatter" and written == "reduce-scatter":
        return share * group  # its result is one chip's part
    return 2 * share if kind == "all-reduce" else share


def _group_size(line: str) -> int:
    if (iota := _IOTA_GROUPS.search(line)) is not None:
        return int(iota[1])
    if (named := _MESH_GROUPS.search(line)) is not None:
        sizes = {axis: int(size) for axis, size, _ in _MESH_AXIS.findall(named[1])}
        # an axis may be split: 'x':(2)4 is a part of size 4
        return math.prod(int(part or sizes[x]) for x, _, part in _MESH_AXIS.findall(named[2]))
    if (listed := _LISTED_GROUPS.search(line)) is not None:
        return listed[1].count(",") + 1
    return 1


def _bytes(dtype: str, dimensions: str) -> int:
    digits = re.search(r"\d+$", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8
