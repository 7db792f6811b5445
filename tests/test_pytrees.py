"""Dataclasses as pytrees: leaves, key paths, and structures that tell classes apart."""

from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp

import speechlm2_jax
from speechlm2_jax.generation.processors import RepetitionPenalty, Temperature
from speechlm2_jax.pytrees import register_pytree

SOURCES = Path(speechlm2_jax.__file__).parent


@register_pytree
@dataclass(frozen=True, kw_only=True)
class Scaled:
    value: jax.Array | float
    factor: int = field(default=2, metadata={"static": True})
    offset: jax.Array | float = 0.0

    def total(self) -> jax.Array:
        return jnp.asarray(self.value * self.factor + self.offset)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class Shifted(Scaled):
    def total(self) -> jax.Array:
        return jnp.asarray(self.value + self.factor + self.offset)


def test_leaves_and_key_paths_leave_out_static_fields() -> None:
    node = Scaled(value=jnp.ones(2), factor=3, offset=1.0)
    leaves, structure = jax.tree_util.tree_flatten_with_path(node)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".value", ".offset"]
    assert jax.tree.unflatten(structure, [5, 6]) == Scaled(value=5, factor=3, offset=6)


def test_structures_of_two_classes_with_the_same_fields_differ() -> None:
    assert jax.tree.structure(Scaled(value=0)) == jax.tree.structure(Scaled(value=1))
    assert jax.tree.structure(Scaled(value=0)) != jax.tree.structure(Shifted(value=0))
    assert jax.tree.structure(Scaled(value=0)) != jax.tree.structure(Scaled(value=0, factor=3))
    assert jax.tree.structure(Temperature(2.0)) != jax.tree.structure(RepetitionPenalty(2.0))


def test_a_jitted_function_traces_each_class() -> None:
    """With equal structures about one of 128 such pairs runs one program for both classes."""
    for _ in range(20):
        traced = []

        @jax.jit
        def run(node: Scaled, traced: list[type] = traced) -> jax.Array:  # noqa: B006
            traced.append(type(node))
            return node.total()

        assert run(Scaled(value=jnp.float32(5))) == 10
        assert run(Shifted(value=jnp.float32(5))) == 7
        assert traced == [Scaled, Shifted]


def test_no_module_registers_dataclasses_with_jax_itself() -> None:
    own = SOURCES / "pytrees.py"
    texts = {path: path.read_text() for path in SOURCES.rglob("*.py") if path != own}
    assert texts
    assert not [path for path, text in texts.items() if "register_dataclass" in text]
