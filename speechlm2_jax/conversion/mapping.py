"""The mapping engine: one declarative table per architecture, total both ways and invertible.

A table is a list of rules `foreign name -> (our path, transform)`. `{layer}` in a foreign name
stands for the layers of a stacked variable. Nothing is matched by luck: a foreign tensor that no
rule takes, a variable that no rule fills, two rules for one, or a wrong shape is an error.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.conversion import listing, quantised
from speechlm2_jax.conversion.duplicates import agreed
from speechlm2_jax.conversion.errors import ConversionError, listed
from speechlm2_jax.conversion.readers.source import (
    Index,
    LazySource,
    TensorInfo,
    TensorSource,
    aligned_empty,
    extent,
)
from speechlm2_jax.conversion.transforms import IDENTITY, Transform
from speechlm2_jax.conversion.wrappers import unwrapped
from speechlm2_jax.layers.module import VariableInfo, Variables
from speechlm2_jax.parameter_paths import NamedSlice

LAYER = "{layer}"
ReadPart = Callable[[Index], np.ndarray]
Place = Callable[[str, tuple[int, ...], np.dtype[Any], ReadPart], Any]
"""(path, shape, dtype, read a part by its slices) -> the array where it shall be."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One foreign tensor (or, with `{layer}`, one per layer) and our variable."""

    source: str
    """The name that is written."""
    target: str
    transform: Transform = IDENTITY
    aliases: tuple[str, ...] = ()
    """Further names that the original gives the same tensor (tied weights)."""
    also: tuple[str, ...] = ()
    """Names under which other versions store it; accepted, never written."""
    parameter: str | None = None
    """The name that freeze patterns see, if it is an alias and not `source`."""
    numbers: range | None = None
    """Foreign numbers of the layers of a stack, in order; None: all layers from 0 on."""
    where_copies_differ: str = ""
    """What to do about a file that stores several of the names with different values."""
    where_missing: str = ""
    """What to do about a file that stores none of the names."""

    @property
    def is_stacked(self) -> bool:
        """True if the variable's leading axis numbers foreign tensors."""
        return LAYER in self.source

    def accepted(self, layer: int | None) -> tuple[str, ...]:
        """Every name that may hold the tensor."""
        return tuple(self.named(name, layer) for name in (self.source, *self.aliases, *self.also))

    def named(self, pattern: str, layer: int | None) -> str:
        """A foreign name, of the layer at this place of our stack."""
        if layer is None:
            return pattern
        return pattern.replace(LAYER, str(layer if self.numbers is None else self.numbers[layer]))


@dataclass(frozen=True)
class Ignored:
    """Foreign tensors that are left out, and why. `pattern` must match the whole name."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Table:
    """How one architecture's checkpoints name and shape what we have."""

    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()

    def __add__(self, other: "Table") -> "Table":
        return Table(self.rules + other.rules, self.ignored + other.ignored)

    def prefixed(self, *, source: str = "", target: str = "") -> "Table":
        """The same table for a module that sits deeper on either side."""

        def deeper(rule: Rule) -> Rule:
            return replace(
                rule,
                source=source + rule.source,
                target=target + rule.target,
                aliases=tuple(source + name for name in rule.aliases),
                also=tuple(source + name for name in rule.also),
                parameter=None if rule.parameter is None else source + rule.parameter,
            )

        return Table(
            tuple(deeper(rule) for rule in self.rules),
            tuple(Ignored(re.escape(source) + i.pattern, i.reason) for i in self.ignored),
        )

    def also_without(self, prefix: str) -> "Table":
        """The same table for files that leave `prefix` out, as those of a module inside do."""

        def shorter(rule: Rule) -> Rule:
            names = (rule.source, *rule.aliases, *rule.also)
            bare = tuple(n.removeprefix(prefix) for n in names if n.startswith(prefix))
            return replace(rule, also=(*rule.also, *bare))

        return Table(tuple(shorter(rule) for rule in self.rules), self.ignored)


def load(
    source: TensorSource,
    table: Table,
    infos: Mapping[str, VariableInfo],
    place: Place | None = None,
) -> Variables:
    """Fills every variable of `infos` from the source, keeping the source's dtypes.

    Names and shapes are checked before any value is read. `place` decides where arrays go; by
    default they are NumPy arrays on the host. Raises ConversionError naming the tensors when the
    two sides do not fit exactly.
    """
    placer = place or _on_host
    variables: Variables = {}
    for fill in _plan(source, table, infos):
        variables[fill.rule.target] = placer(
            fill.rule.target, fill.shape, fill.info.dtype, fill.read
        )
    return variables


def check(source: TensorSource, table: Table, infos: Mapping[str, VariableInfo]) -> None:
    """Raises ConversionError as `load` would; of the values it reads only copies of one tensor."""
    _plan(source, table, infos)


def export(variables: Mapping[str, AnyArray], table: Table) -> dict[str, np.ndarray]:
    """Writes variables back under their foreign names: the inverse of `load`.

    Aliases are left out (see `aliases`). Raises ConversionError if variables and table differ.
    """
    source = export_source(variables, table)
    return {name: source.read(name) for name in source.infos}


def export_source(variables: Mapping[str, Any], table: Table) -> LazySource:
    """The tensors that `export` gives, each made when it is read."""
    targets = {rule.target for rule in table.rules}
    if targets != set(variables):
        raise ConversionError(
            f"the variables do not fit the table: {listed(targets ^ set(variables))}"
        )
    places: dict[str, tuple[Rule, int | None]] = {}
    infos: dict[str, TensorInfo] = {}
    for rule in table.rules:
        value = variables[rule.target]
        shape = tuple(value.shape[1:] if rule.is_stacked else value.shape)
        # the foreign shape and dtype, from a tensor of zeros that takes no memory
        made = rule.transform.store(np.broadcast_to(np.zeros((), value.dtype), shape))
        for layer in _layers(rule, value.shape):
            name = rule.named(rule.source, layer)
            places[name], infos[name] = (rule, layer), TensorInfo(made.shape, made.dtype)

    def fetch(name: str, index: Index | None) -> np.ndarray:
        rule, layer = places[name]
        value = np.asarray(variables[rule.target])
        whole = rule.transform.store(value if layer is None else np.asarray(value[layer]))
        return whole if index is None else whole[index]

    return LazySource(infos, fetch)


def aliases(table: Table, variables: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Further name -> written name, as safetensors files of tied weights keep it.

    Those of the layers of stacks are left out without `variables`, which tell how many there are.
    """
    return {
        rule.named(name, layer): rule.named(rule.source, layer)
        for rule in table.rules
        if rule.aliases and (variables is not None or not rule.is_stacked)
        for layer in _layers(rule, np.shape((variables or {}).get(rule.target, ())))
        for name in rule.aliases
    }


def names(table: Table, infos: Mapping[str, VariableInfo]) -> list[NamedSlice]:
    """Gives every foreign name of every slice of every variable, aliases and buffers included."""
    slices: list[NamedSlice] = []
    for rule in _rules_by_target(table, infos).values():
        info = infos[rule.target]
        own = rule.parameter or rule.source
        for layer in _layers(rule, info.shape):
            for name in (rule.source, *rule.aliases):
                slices.append(
                    NamedSlice(
                        name=rule.named(name, layer),
                        path=rule.target,
                        layer=layer,
                        is_buffer=info.is_buffer,
                        is_alias=name != own,
                    )
                )
    return slices


def accepted_names(
    table: Table, infos: Mapping[str, VariableInfo]
) -> dict[str, tuple[str, int | None]]:
    """Every foreign name that some rule takes -> the variable that it fills, and which layer."""
    return {
        name: (rule.target, layer)
        for rule in table.rules
        for layer in _layers(rule, infos[rule.target].shape)
        for name in rule.accepted(layer)
    }


@dataclass(frozen=True)
class _Fill:
    """One variable, and the stored tensors that make it up."""

    rule: Rule
    shape: tuple[int, ...]
    stored: tuple[str, ...]
    info: TensorInfo
    """Shape and dtype of one of its slices, on our side."""
    source: TensorSource

    def read(self, index: Index) -> np.ndarray:
        """Reads a part. Raises ConversionError where values are not finite."""
        part = self._read(index)
        rows = zip(self.stored[index[0]], part, strict=True) if self.rule.is_stacked else ()
        for name, values in rows or ((self.stored[0], part),):
            if not listing.looks_finite(values):
                raise ConversionError(
                    f"{self.source.where or 'the checkpoint'}: {name} holds values that are not "
                    "finite (NaN or infinite), so the model computes nothing; fetch it again, or "
                    "use an earlier checkpoint (convert.py --inspect lists such tensors)"
                )
        return part

    def _read(self, index: Index) -> np.ndarray:
        whole = tuple(slice(0, n) for n in self.info.shape)
        if not self.rule.is_stacked:
            if index != whole or self.rule.transform != IDENTITY:
                return self._slice(self.stored[0], index)
            part = aligned_empty(self.info.shape, self.info.dtype)
            self.source.read_into(self.stored[0], part)
            return part
        chosen = self.stored[index[0]]
        parts = aligned_empty((len(chosen), *extent(index[1:], self.shape[1:])), self.info.dtype)
        is_read_whole = index[1:] == whole and self.rule.transform == IDENTITY
        for row, name in enumerate(chosen):
            if is_read_whole:
                self.source.read_into(name, parts[row, ...])
            else:
                parts[row] = self._slice(name, index[1:])
        return parts

    def _slice(self, name: str, index: Index) -> np.ndarray:
        try:
            return self.rule.transform.load(
                self.source.read(name, self.rule.transform.index(index))
            )
        except ConversionError:
            raise
        except ValueError as error:
            raise ConversionError(f"{name}: {error}") from error


def _on_host(
    path: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], read: ReadPart
) -> np.ndarray:
    return read(tuple(slice(0, n) for n in shape))


def _plan(source: TensorSource, table: Table, infos: Mapping[str, VariableInfo]) -> list[_Fill]:
    """Pairs every variable with the tensors that fill it; all names are checked first."""
    try:
        return _pairs(source, table, infos)
    except ConversionError as error:
        raise type(error)(f"{source.where}: {error}" if source.where else str(error)) from error


def _pairs(source: TensorSource, table: Table, infos: Mapping[str, VariableInfo]) -> list[_Fill]:
    rules = _rules_by_target(table, infos)
    source = unwrapped(source, accepted_names(table, infos))
    taken: dict[str, str] = {}
    found: dict[str, tuple[str, ...]] = {}
    unfilled: dict[str, str] = {}
    for rule in rules.values():
        stored: list[str] = []
        for layer in _layers(rule, infos[rule.target].shape):
            present = [n for n in rule.accepted(layer) if _stored(source, n) is not None]
            for name in present:
                if taken.setdefault(name, rule.target) != rule.target:
                    raise ConversionError(f"{name} would fill both {taken[name]} and {rule.target}")
            if present:
                copies = [_stored(source, name) or name for name in present]
                stored.append(agreed(source, copies, rule.where_copies_differ))
            else:
                unfilled[rule.named(rule.source, layer)] = rule.where_missing
        found[rule.target] = tuple(stored)
    _check_total(source, table, taken, unfilled)
    return [_fill(source, rule, infos[rule.target], found[rule.target]) for rule in rules.values()]


def _check_total(
    source: TensorSource, table: Table, taken: Mapping[str, str], unfilled: Mapping[str, str]
) -> None:
    given = set(source.infos) | set(source.aliases)
    skipped = re.compile("|".join(f"(?:{i.pattern})" for i in table.ignored) or r"(?!)")
    left = {name for name in given - set(taken) if not skipped.fullmatch(name)}
    has_adapters = any(".lora_" in rule.source for rule in table.rules)
    if what := quantised.problem(left, has_adapters=has_adapters):
        raise ConversionError(what)
    if unfilled:
        hints = sorted({hint for hint in unfilled.values() if hint})
        raise ConversionError(
            f"the checkpoint lacks {listed(unfilled, left or given)}; "
            f"it has {len(given)} tensors, {len(left)} of them unused"
            + "".join(f"; {hint}" for hint in hints)
        )
    if left:
        raise ConversionError(
            f"the checkpoint has tensors that the model has no place for: {listed(left, taken)}"
        )


def _fill(
    source: TensorSource, rule: Rule, variable: VariableInfo, stored: tuple[str, ...]
) -> _Fill:
    """Checks shapes and dtypes of one variable's tensors."""
    wanted = variable.shape[1:] if rule.is_stacked else variable.shape
    slices: list[TensorInfo] = []
    for name in stored:
        try:
            slices.append(rule.transform.info(source.infos[name]))
        except ValueError as error:
            raise ConversionError(f"{name}: {error}, for {rule.target}") from error
        if slices[-1].shape != wanted:
            raise ConversionError(
                f"{name} has shape {source.infos[name].shape}, which does not fit {rule.target} "
                f"of shape {wanted}{' per layer' if rule.is_stacked else ''}"
            )
        if slices[-1].dtype != slices[0].dtype:
            raise ConversionError(
                f"{name} is {slices[-1].dtype} but {stored[0]} is {slices[0].dtype}; "
                "the layers of one stack must have one dtype"
            )
    if _is_integer(slices[0].dtype) != _is_integer(np.dtype(variable.dtype)):
        raise ConversionError(
            f"{stored[0]} is {slices[0].dtype}, which does not fit {rule.target}: {variable.dtype}"
        )
    return _Fill(rule, variable.shape, stored, slices[0], source)


def _rules_by_target(table: Table, infos: Mapping[str, VariableInfo]) -> dict[str, Rule]:
    """Indexes the rules. Raises ConversionError unless each variable has exactly one."""
    rules: dict[str, Rule] = {}
    for rule in table.rules:
        if rule.target in rules:
            raise ConversionError(f"two rules fill {rule.target}")
        rules[rule.target] = rule
    for given, expected, what in (
        (infos, rules, "no rule of the table fills"),
        (rules, infos, "the table fills, but the model lacks,"),
    ):
        if set(given) - set(expected):
            raise ConversionError(f"{what} {listed(set(given) - set(expected), expected)}")
    for rule in rules.values():
        if rule.is_stacked and not infos[rule.target].is_stacked:
            raise ConversionError(f"{rule.source} numbers layers but {rule.target} is not stacked")
    return rules


def _layers(rule: Rule, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    return tuple(range(shape[0])) if rule.is_stacked else (None,)


def _stored(source: TensorSource, name: str) -> str | None:
    return name if name in source.infos else source.aliases.get(name)


def _is_integer(dtype: np.dtype[np.generic]) -> bool:
    return np.issubdtype(dtype, np.integer) or dtype == np.bool_
