# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportUnknownLambdaType=false, reportInvalidTypeForm=false
"""Mesh, logical-axis rules and array placement: the only file that names mesh axes.

Parameters and activations name what each dimension means (`"embed"`, `"heads"`, `"batch"`). One
table maps these names to mesh axes. A new model adds no sharding code.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.device_mesh import make_mesh

T = TypeVar("T")
MESH_AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
AxisNames = tuple[str, ...] | None
Rules = tuple[tuple[str, tuple[str, ...]], ...]
RULES: Rules = (
    # activations
    ("batch", BATCH_AXES),  # groups, sequences
    ("clips", (*BATCH_AXES, "context")),  # the context axis shards clips in the encoder
    ("frames", ()),  # time of the encoder: convolutions read neighbouring frames
    ("tokens", ("context",)),  # time of the LLM inside a block
    ("time", ("context",)),  # time of the LLM between blocks
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
OUTPUT_AXES = ("heads", "kv_heads", "mlp", "vocab")
"""Output axes of weights [out, in]; fully sharded weights are sharded along these."""
SEQUENCE_PARALLEL = {"time": ("context", "tensor")}
"""Shards time over the tensor axis too, between blocks (Korthikanti et al. 2022)."""
TPU_OPTIONS: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""XLA options: all-gather whole weights, overlapped with other work.

By default XLA turns the all-gather before a matmul into a ring of partial matmuls, which takes
several times as long to compile and more memory.
"""


@dataclass(frozen=True)
class Sharding:
    """A mesh and its rules. Hashable: a static value of every compiled program."""

    mesh: Mesh
    rules: Rules = RULES
    shards_time: bool = True
    """False: every device holds whole sequences in their own order, on any mesh (inference)."""
    moves_rows: bool = False
    """Inference: a matmul sends its rows to a fully sharded weight where these are fewer bytes.

    False: every device gathers the weight. A decoding step has one row for each sequence.
    """

    @property
    def data_parallel_size(self) -> int:
        """Number of data-parallel shards: groups of a global batch."""
        return math.prod(self.mesh.shape[a] for a in BATCH_AXES)

    @property
    def tensor_size(self) -> int:
        """Number of devices that each layer is sharded over."""
        return self.mesh.shape["tensor"]

    @property
    def context_size(self) -> int:
        """Number of devices that each sequence is sharded over inside a block."""
        return self.mesh.shape["context"] if self.shards_time else 1

    @property
    def length_multiple(self) -> int:
        """Sequence lengths must be a multiple of this; the host pads up to it."""
        halves = 2 * self.context_size if self.context_size > 1 else 1
        return math.lcm(halves, self.size(dict(self.rules)["time"]))

    @property
    def platform(self) -> str:
        """Platform of the devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def compiler_options(self) -> dict[str, str | bool] | None:
        """Options with which XLA compiles a training step; None for its defaults."""
        return TPU_OPTIONS if self.platform == "tpu" else None

    def time_order(self, length: int) -> np.ndarray | None:
        """Zig-zag order of a sequence: int32 [length], the position at each index; None: in order.

        Each device of the context axis holds an early and a late part of every sequence, so that
        causal attention costs all devices the same (as in Llama 3, arXiv 2407.21783). Two devices
        hold parts 0, 3 and parts 1, 2 of 4: length 8 -> [0, 1, 6, 7, 2, 3, 4, 5]. Raises
        ValueError unless `length` is a multiple of `length_multiple`.
        """
        size = self.context_size
        if size == 1:
            return None
        if length % self.length_multiple:
            raise ValueError(
                f"sequence length {length} must be a multiple of {self.length_multiple}, "
                f"for a context axis of {size}; pad the sequence"
            )
        parts = np.arange(length, dtype=np.int32).reshape(2 * size, -1)
        return np.concatenate([parts[[i, 2 * size - 1 - i]].reshape(-1) for i in range(size)])

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """Translates logical axes into mesh axes.

        With `shape`, a dimension is sharded over as many of its mesh axes as divide its size.
        Raises KeyError for an unknown logical axis.
        """
        table = dict(self.rules)
        entries: list[tuple[str, ...] | None] = []
        for i, axis in enumerate(axes):
            mesh_axes = () if axis is None else table[axis]
            while shape is not None and shape[i] % self.size(mesh_axes):
                mesh_axes = mesh_axes[:-1]
            entries.append(mesh_axes or None)
        if shape is not None and "embed" in axes:
            self._shard_outputs(entries, axes, shape)
        return PartitionSpec(*entries)

    def _shard_outputs(
        self,
        entries: list[tuple[str, ...] | None],
        axes: Sequence[str | None],
        shape: Sequence[int],
    ) -> None:
        """Moves the sharding of a weight [out, in] to its output axis, if the shards divide it.

        Changes `entries`. A TPU moves tiles of 8 x 128. Shards of fewer than 128 input columns are
        padded with zeros and summed instead of gathered, at twice the traffic.
        """
        output, width = int(axes[0] == "layers"), list(axes).index("embed")
        both = (*(entries[output] or ()), *(entries[width] or ()))
        if width > output and axes[output] in OUTPUT_AXES and shape[output] % self.size(both) == 0:
            entries[output], entries[width] = both or None, None

    def size(self, mesh_axes: Sequence[str]) -> int:
        """Number of devices along these mesh axes."""
        return math.prod(self.mesh.shape[a] for a in mesh_axes)

    def named(
        self, axes: Sequence[str | None], shape: Sequence[int] | None = None
    ) -> NamedSharding:
        """The `NamedSharding` of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def own_mesh(self) -> Mesh | None:
        """This process's part of the mesh, if it holds whole copies of all weights.

        None where weights lie on several processes, and if there is one process.
        """
        try:
            own = self.mesh.local_mesh
        except ValueError:  # no block of the mesh
            return None
        is_whole = all(own.shape[a] == n for a, n in self.mesh.shape.items() if a != "data")
        return own if is_whole and own.size < self.mesh.size else None

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, tree: PyTree) -> PyTree:
        """The sharding of each array of a batch: the leading (group) axis over the batch axes."""
        return jax.tree.map(lambda x: self.named(("batch",) + (None,) * (np.ndim(x) - 1)), tree)

    def put_batch(self, tree: PyTree) -> PyTree:
        """Puts a host batch on the devices; each host copies only the groups of its own devices.

        With context parallelism the tokens are first brought into `time_order`.
        """
        if self.context_size > 1:
            tree = tree.in_time_order(self.time_order)
        return jax.tree.map(put_global, tree, self.batch(tree))

    def own_groups(self, groups: int) -> tuple[int, ...]:
        """Indices of groups that this process's devices hold, of `groups` in a global batch."""
        held = self.named(("batch",)).addressable_devices_indices_map((groups,))
        slices = [index[0] for index in held.values() if index is not None]
        return tuple(sorted({i for one in slices for i in range(groups)[one]}))


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

    With `sequence_parallel` time is also sharded over the tensor axis, between the LLM's blocks.
    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = (data, fsdp, tensor, context)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} needs {math.prod(sizes)} devices "
            f"but {len(devices)} are in use; change trainer.strategy or trainer.devices"
        )
    mesh = make_mesh(sizes, MESH_AXES, devices)
    changed = SEQUENCE_PARALLEL if sequence_parallel else {}
    return Sharding(mesh, tuple((axis, changed.get(axis, where)) for axis, where in RULES))


def put_global(value: AnyArray | np.number, placement: jax.sharding.Sharding) -> jax.Array:
    """Puts a host array on the devices; each process copies only the shards of its own devices.

    Unlike `jax.device_put`, it does not compare the values of all processes first.
    """
    return jax.make_array_from_callback(
        np.shape(value), placement, lambda index: np.asarray(value)[index]
    )


def for_inference(mesh: Mesh) -> Sharding:
    """Rules for decoding: sequences are sharded over the batch axes, time is not sharded."""
    unsharded = {"tokens": (), "time": ()}
    rules = tuple((a, unsharded.get(a, to)) for a, to in RULES)
    return Sharding(mesh, rules, shards_time=False, moves_rows=True)


def mesh_of(arrays: Mapping[str, object]) -> Mesh | None:
    """The mesh of device arrays; None for one device and for host arrays."""
    found = (getattr(getattr(one, "sharding", None), "mesh", None) for one in arrays.values())
    return next((mesh for mesh in found if isinstance(mesh, Mesh) and mesh.size > 1), None)


_current: ContextVar[Sharding | None] = ContextVar("sharding", default=None)
"""The one context of the model half: `constrain` reads it in every layer, `use` sets it."""


@contextmanager
def use(sharding: Sharding | None) -> Generator[None]:
    """Makes `constrain` use this sharding. Enter it inside the jitted function, at its top."""
    token = _current.set(sharding)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> "Sharding | None":
    """The value in use; None outside `use`."""
    return _current.get()


@contextmanager
def unsharded_time() -> Generator[None]:
    """Shards sequences over the context axis instead of time, so that each is whole and in order.

    For layers that read neighbouring positions (a convolution over time) in a model whose sequences
    are sharded. Enter it inside `use`; outside it does nothing.
    """
    sharding = _current.get()
    if sharding is None:
        yield
        return
    changed = {"batch": dict(sharding.rules)["clips"], "tokens": (), "time": ()}
    rules = tuple((axis, changed.get(axis, where)) for axis, where in sharding.rules)
    with use(replace(sharding, rules=rules, shards_time=False)):
        yield


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation's sharding by logical axes; does nothing outside `use`."""
    sharding = _current.get()
    if sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.named(axes, x.shape))


def on_every_device(tree: T) -> T:
    """Constrains arrays to be whole on every device, so that each process can read them.

    Does nothing outside `use`.
    """
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


Axes = Sequence[str | None]


def key_value_copies(heads: int, query_heads: int) -> int:
    """How often each key and value head is held, so that every tensor-parallel device has one.

    1 unless there are fewer such heads than devices of the tensor axis, whose number is a multiple
    of these heads and divides the query heads. Only inference copies them.
    """
    sharding = _current.get()
    if sharding is None or not sharding.moves_rows:
        return 1
    size = sharding.tensor_size
    is_fit = size > heads and size % heads == 0 and query_heads % size == 0
    return size // heads if is_fit else 1


def on_shards(
    fn: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[Axes], out_axes: Axes
) -> jax.Array:
    """Runs `fn` on each device's own shards (`jax.shard_map`).

    For what XLA's partitioner cannot shard (an FFT, a Pallas kernel) or shards badly (ring
    attention). `axes` name the dimensions of each array, `out_axes` those of the single result. The
    result is sharded as the first array is. Outside `use` this calls `fn`.
    """
    sharding = _current.get()
    if sharding is None:
        return fn(*arrays)
    specs = tuple(sharding.spec(a, x.shape) for a, x in zip(axes, arrays, strict=True))
    mesh_axes = dict(zip(axes[0], specs[0], strict=True))
    out = PartitionSpec(*(mesh_axes.get(axis) if axis is not None else None for axis in out_axes))
    return jax.shard_map(fn, mesh=sharding.mesh, in_specs=specs, out_specs=out, check_vma=False)(
        *arrays
    )


def context_size() -> int:
    """`Sharding.context_size` of the value in use; 1 outside `use`."""
    sharding = _current.get()
    return 1 if sharding is None else sharding.context_size


def tensor_size() -> int:
    """`Sharding.tensor_size` of the value in use; 1 outside `use`."""
    sharding = _current.get()
    return 1 if sharding is None else sharding.tensor_size


def platform() -> str:
    """Platform of the mesh in use; JAX's default backend outside `use`.

    The two differ in ahead-of-time compilation.
    """
    sharding = _current.get()
    return jax.default_backend() if sharding is None else sharding.platform


def is_on_one_cpu() -> bool:
    """Whether a program runs on a single CPU device."""
    sharding = _current.get()
    return platform() == "cpu" and (sharding is None or sharding.mesh.size == 1)


def length_multiple() -> int:
    """`Sharding.length_multiple` of the value in use; 1 outside `use`."""
    sharding = _current.get()
    return 1 if sharding is None else sharding.length_multiple


def time_order(length: int) -> np.ndarray | None:
    """`Sharding.time_order` of the value in use; None outside `use`."""
    sharding = _current.get()
    return None if sharding is None else sharding.time_order(length)


def ring_permute(tree: T) -> T:
    """Inside `on_shards`: sends arrays to the next device of the context ring."""
    size = context_size()
    pairs = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", pairs), tree)


def place(
    variables: Mapping[str, AnyArray], axes: Mapping[str, Sequence[str | None]], sharding: Sharding
) -> dict[str, jax.Array]:
    """Puts each named array on the devices, sharded by its logical axes."""
    return {
        path: jax.device_put(value, sharding.named(axes[path], np.shape(value)))
        for path, value in variables.items()
    }
