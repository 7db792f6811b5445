# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportUnknownLambdaType=false, reportInvalidTypeForm=false
"""Mesh, logical-axis rules and placement: the only file that names mesh axes.

Parameters and activations name what each dimension means (`"embed"`, `"heads"`, `"batch"`); one
table says which mesh axes hold it. A new model adds no sharding code.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
TIME_AXES = ("tensor", "context")  # share the steps of a row: sequence and context parallelism
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # activations
    ("batch", BATCH_AXES),  # groups, clips, rows
    ("time", ()),
    ("act_embed", ()),
    ("act_heads", ("tensor",)),
    ("act_mlp", ("tensor",)),
    ("act_vocab", ("tensor",)),
    # parameters
    ("layers", ()),
    ("embed", ("fsdp",)),  # the model width
    ("heads", ("tensor",)),  # heads x head width, query side
    ("kv_heads", ("tensor",)),  # heads x head width, key and value side
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("norm", ()),
    ("conv", ()),  # channels and taps of small convolutions
    ("rank", ()),  # LoRA rank
    ("feature", ()),  # mel bins and other signal-processing tables
)


@dataclass(frozen=True)
class Sharding:
    """A mesh and its rules, travelling together; static for every step built with it."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES

    @property
    def data_parallel_size(self) -> int:
        """How many groups of a global batch are computed at once."""
        return math.prod(self.mesh.shape[a] for a in BATCH_AXES)

    @property
    def length_multiple(self) -> int:
        """What the time steps of a row must be a multiple of; the host pads up to it."""
        return math.prod(self.mesh.shape[a] for a in TIME_AXES)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """Translates logical axes; with `shape`, a dimension that does not divide stays whole.

        Raises KeyError for an axis that the table does not know.
        """
        table = dict(self.rules)
        entries: list[tuple[str, ...] | None] = []
        for i, axis in enumerate(axes):
            mesh_axes = () if axis is None else table[axis]
            size = math.prod(self.mesh.shape[a] for a in mesh_axes)
            fits = shape is None or shape[i] % size == 0
            entries.append(mesh_axes if mesh_axes and fits else None)
        return PartitionSpec(*entries)

    def named(
        self, axes: Sequence[str | None], shape: Sequence[int] | None = None
    ) -> NamedSharding:
        """The placement of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    @property
    def replicated(self) -> NamedSharding:
        """The placement of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, tree: Any) -> Any:
        """The placement of each array of a batch: its leading (group) axis over the batch axes."""
        return jax.tree.map(lambda x: self.named(("batch",) + (None,) * (np.ndim(x) - 1)), tree)

    def put_batch(self, tree: Any) -> Any:
        """Places a host batch of groups; each host hands over only what its devices hold."""

        def put(x: Any, placement: NamedSharding) -> jax.Array:
            return jax.make_array_from_callback(x.shape, placement, lambda index: x[index])

        return jax.tree.map(put, tree, self.batch(tree))


def make_sharding(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Sharding:
    """Builds a mesh of the given sizes over `devices` (all by default).

    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = (data, fsdp, tensor, context)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} needs {math.prod(sizes)} devices "
            f"but {len(devices)} are in use; change trainer.strategy or trainer.devices"
        )
    mesh = jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)
    return Sharding(mesh)


_current: ContextVar[Sharding | None] = ContextVar("sharding", default=None)


@contextmanager
def use(sharding: Sharding | None) -> Generator[None]:
    """Makes `constrain` act with this value. Enter it inside the jitted function, at its top."""
    token = _current.set(sharding)
    try:
        yield
    finally:
        _current.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's placement by logical axes; does nothing outside `use`."""
    sharding = _current.get()
    if sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.named(axes, x.shape))


def on_shards(fn: Callable[[jax.Array], jax.Array], x: jax.Array, *axes: str | None) -> jax.Array:
    """Runs `fn` on each device's own part of `x`, for what XLA would gather first (an FFT).

    `fn` must keep the rank and work along dimensions whose axis is None. Outside `use` it is `fn`.
    """
    sharding = _current.get()
    if sharding is None:
        return fn(x)
    spec = sharding.spec(axes, x.shape)
    return jax.shard_map(fn, mesh=sharding.mesh, in_specs=(spec,), out_specs=spec)(x)


def place(
    variables: Mapping[str, Any], axes: Mapping[str, Sequence[str | None]], sharding: Sharding
) -> dict[str, jax.Array]:
    """Puts each named array where its axes say."""
    return {
        path: jax.device_put(value, sharding.named(axes[path], np.shape(value)))
        for path, value in variables.items()
    }
