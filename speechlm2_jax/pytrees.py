"""Registration of dataclasses as pytrees."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def register_pytree(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree node. A field with `metadata={"static": True}` is no leaf.

    It is used in place of `jax.tree_util.register_dataclass`, which has a fault in jaxlib 0.10.2:
    the tree structures of two classes are equal if they have as many children and the same static
    values. A jitted function then may run the program of one class for the other, silently. The
    hashes of the structures differ, so this happens by chance: with twelve such classes, 4 % of the
    calls gave another class's result. The structure of a node registered here compares the class.
    """
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    static = tuple(f.name for f in fields if f.metadata.get("static"))
    children = tuple(f.name for f in fields if not f.metadata.get("static"))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in children)

    def flatten(node: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, n) for n in children), tuple(getattr(node, n) for n in static)

    def flatten_with_keys(node: T) -> tuple[Iterable[tuple[Any, Any]], tuple[Any, ...]]:
        values, statics = flatten(node)
        return tuple(zip(keys, values, strict=True)), statics

    def unflatten(statics: tuple[Any, ...], values: Iterable[Any]) -> T:
        return cls(**dict(zip(children + static, (*values, *statics), strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
