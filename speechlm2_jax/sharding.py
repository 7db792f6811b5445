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
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
Rules = tuple[tuple[str, tuple[str, ...]], ...]
RULES: Rules = (
    # activations
    ("batch", BATCH_AXES),  # groups, rows
    ("clips", (*BATCH_AXES, "context")),  # the encoder shares its clips where the LLM shares steps
    ("frames", ()),  # steps of the encoder, whose convolutions look at their neighbours
    ("steps", ("context",)),  # steps of the LLM inside a block
    ("time", ("context",)),  # steps of the LLM between blocks
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
ROWS = ("heads", "kv_heads", "mlp", "vocab")
"""Outputs of weights [out, in]: where these are fully sharded."""
SEQUENCE_PARALLEL = {"time": ("context", "tensor")}
"""Between blocks a tensor-parallel group shares the steps (Korthikanti et al. 2022)."""


TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""Weights are gathered whole, beside other work, and not in a ring of products for each of them,
which takes several times as long to compile and more memory."""


@dataclass(frozen=True)
class Sharding:
    """A mesh and its rules, travelling together; static for every step built with it."""

    mesh: Mesh
    rules: Rules = RULES
    shares_steps: bool = True
    """False: each row is whole and in order, whatever the mesh (answering)."""

    @property
    def data_parallel_size(self) -> int:
        """How many groups of a global batch are computed at once."""
        return math.prod(self.mesh.shape[a] for a in BATCH_AXES)

    @property
    def tensor_size(self) -> int:
        """Over how many devices each layer is spread."""
        return self.mesh.shape["tensor"]

    @property
    def context_size(self) -> int:
        """Over how many devices the steps of a row are spread inside a block."""
        return self.mesh.shape["context"] if self.shares_steps else 1

    @property
    def length_multiple(self) -> int:
        """What the time steps of a row must be a multiple of; the host pads up to it."""
        halves = 2 * self.context_size if self.context_size > 1 else 1
        return math.lcm(halves, self._size(dict(self.rules)["time"]))

    @property
    def platform(self) -> str:
        """What the devices are: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def compiler_options(self) -> dict[str, str] | None:
        """What XLA is told of a training step beside its own defaults."""
        return TPU_OPTIONS if self.platform == "tpu" else None

    def time_order(self, steps: int) -> np.ndarray | None:
        """Which step of a row lies at each place, int32 [steps]; None if they lie in order.

        Each device of the context axis holds one early and one late part of every row, so that
        causal attention costs all of them the same (as in Llama 3, arXiv 2407.21783). Raises
        ValueError unless the steps are a multiple of `length_multiple`.
        """
        size = self.context_size
        if size == 1:
            return None
        if steps % self.length_multiple:
            raise ValueError(f"{steps} steps are no multiple of {self.length_multiple}")
        parts = np.arange(steps, dtype=np.int32).reshape(2 * size, -1)
        return np.concatenate([parts[[i, 2 * size - 1 - i]].reshape(-1) for i in range(size)])

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """Translates logical axes; with `shape`, a dimension is cut as far as it divides.

        Raises KeyError for an axis that the table does not know.
        """
        table = dict(self.rules)
        entries: list[tuple[str, ...] | None] = []
        for i, axis in enumerate(axes):
            mesh_axes = () if axis is None else table[axis]
            while shape is not None and shape[i] % self._size(mesh_axes):
                mesh_axes = mesh_axes[:-1]
            entries.append(mesh_axes or None)
        if shape is not None and "embed" in axes:
            self._cut_rows(entries, axes, shape)
        return PartitionSpec(*entries)

    def _cut_rows(
        self,
        entries: list[tuple[str, ...] | None],
        axes: Sequence[str | None],
        shape: Sequence[int],
    ) -> None:
        """Cuts a weight that is fully sharded along its rows, where they divide, in place.

        A TPU moves tiles of 8 x 128: cut along columns, parts of fewer are filled up with zeros
        and summed instead of gathered, at twice the traffic.
        """
        row, width = int(axes[0] == "layers"), list(axes).index("embed")
        cut = (*(entries[row] or ()), *(entries[width] or ()))
        if width > row and axes[row] in ROWS and shape[row] % self._size(cut) == 0:
            entries[row], entries[width] = cut or None, None

    def _size(self, mesh_axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[a] for a in mesh_axes)

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
        """Places a host batch of groups; each host hands over only what its devices hold.

        With context parallelism the steps of its rows are brought into `time_order` first.
        """
        if self.context_size > 1:
            tree = tree.laid_out(self.time_order)
        return jax.tree.map(put_global, tree, self.batch(tree))

    def own_groups(self, groups: int) -> tuple[int, ...]:
        """Those of `groups` groups of a global batch that this process's devices hold."""
        held = self.named(("batch",)).addressable_devices_indices_map((groups,))
        cuts = [index[0] for index in held.values() if index is not None]
        return tuple(sorted({i for cut in cuts for i in range(groups)[cut]}))


def make_sharding(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    sequence_parallel: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Sharding:
    """Builds a mesh of the given sizes over `devices` (all by default).

    With `sequence_parallel` the tensor axis also shares the steps between the LLM's blocks.
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
    changed = SEQUENCE_PARALLEL if sequence_parallel else {}
    return Sharding(mesh, tuple((axis, changed.get(axis, where)) for axis, where in RULES))


def put_global(value: Any, placement: jax.sharding.Sharding) -> jax.Array:
    """Places a host array; of several processes each gives what its own devices hold.

    (`jax.device_put` would compare the values of all processes first.)
    """
    return jax.make_array_from_callback(
        np.shape(value), placement, lambda index: np.asarray(value)[index]
    )


def for_inference(mesh: Mesh) -> Sharding:
    """Rows shared out among the devices and each of them whole, as decoding needs it."""
    whole = {"steps": (), "time": ()}
    return Sharding(mesh, tuple((a, whole.get(a, to)) for a, to in RULES), shares_steps=False)


def mesh_of(arrays: Mapping[str, Any]) -> Mesh | None:
    """The mesh that arrays lie on; None if that is one device, or the host."""
    for array in arrays.values():
        mesh = getattr(getattr(array, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and mesh.size > 1:
            return mesh
    return None


_current: ContextVar[Sharding | None] = ContextVar("sharding", default=None)


@contextmanager
def use(sharding: Sharding | None) -> Generator[None]:
    """Makes `constrain` act with this value. Enter it inside the jitted function, at its top."""
    token = _current.set(sharding)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def unsharded_time() -> Generator[None]:
    """Makes every row whole and in order: rows are then shared out where steps were.

    For what looks at the neighbours of a step (a convolution over time) in a model that shares
    steps. Enter it inside `use`; outside it does nothing.
    """
    sharding = _current.get()
    if sharding is None:
        yield
        return
    changed = {"batch": dict(sharding.rules)["clips"], "steps": (), "time": ()}
    rules = tuple((axis, changed.get(axis, where)) for axis, where in sharding.rules)
    with use(replace(sharding, rules=rules, shares_steps=False)):
        yield


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's placement by logical axes; does nothing outside `use`."""
    sharding = _current.get()
    if sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.named(axes, x.shape))


Axes = Sequence[str | None]


def on_shards(
    fn: Callable[..., Any], arrays: Sequence[Any], axes: Sequence[Axes], out_axes: Axes
) -> Any:
    """Runs `fn` on each device's own part of the arrays, for what XLA would gather first.

    That is what its partitioner cannot cut (an FFT, a Pallas kernel) or cuts badly (a ring of
    attention). `axes` name the dimensions of each array and `out_axes` those of the one result,
    which is cut as the first array is. Outside `use` it is `fn`.
    """
    sharding = _current.get()
    if sharding is None:
        return fn(*arrays)
    specs = tuple(sharding.spec(a, x.shape) for a, x in zip(axes, arrays, strict=True))
    cuts = dict(zip(axes[0], specs[0], strict=True))
    out = PartitionSpec(*(cuts.get(axis) if axis is not None else None for axis in out_axes))
    return jax.shard_map(fn, mesh=sharding.mesh, in_specs=specs, out_specs=out, check_vma=False)(
        *arrays
    )


def context_size() -> int:
    """Over how many devices the steps of a row are spread; 1 outside `use`."""
    sharding = _current.get()
    return 1 if sharding is None else sharding.context_size


def platform() -> str:
    """What computes: the platform of the mesh in use; JAX's default one outside `use`.

    They differ where a program is compiled ahead of time.
    """
    sharding = _current.get()
    return jax.default_backend() if sharding is None else sharding.platform


def length_multiple() -> int:
    """`Sharding.length_multiple` of the value in use; 1 outside `use`."""
    sharding = _current.get()
    return 1 if sharding is None else sharding.length_multiple


def time_order(steps: int) -> np.ndarray | None:
    """`Sharding.time_order` of the value in use; None outside `use`."""
    sharding = _current.get()
    return None if sharding is None else sharding.time_order(steps)


def ring_permute(tree: Any) -> Any:
    """Inside `on_shards`: gives arrays to the next device of the context ring, takes the last's."""
    size = context_size()
    pairs = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", pairs), tree)


def place(
    variables: Mapping[str, Any], axes: Mapping[str, Sequence[str | None]], sharding: Sharding
) -> dict[str, jax.Array]:
    """Puts each named array where its axes say."""
    return {
        path: jax.device_put(value, sharding.named(axes[path], np.shape(value)))
        for path, value in variables.items()
    }
