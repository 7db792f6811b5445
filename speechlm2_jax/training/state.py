"""The training state, and the dtype and sharding of each of its arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.sharding import Sharding, put_global
from speechlm2_jax.training.optimizer import Optimizer, OptState
from speechlm2_jax.training.protocol import Variables, VariableSpec

L = TypeVar("L")
"""What the leaves of a state are: arrays, or their shapes or shardings."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class TrainState(Generic[L]):
    """All arrays that a step changes. A step donates its input: never use an old state."""

    trainable: dict[str, L]
    """Parameters that are trained, fp32."""
    buffers: dict[str, L]
    """Arrays without gradient: batch-norm statistics, filterbanks."""
    opt_state: OptState
    step: L
    """Int32 scalar: optimizer steps done, skipped ones included."""
    skipped: L
    """Int32 scalar: steps that were not applied because loss or gradient was not finite."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Paths of trained, frozen and buffer variables; masks of partly frozen stacks."""

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]
    masks: Mapping[str, np.ndarray]

    @staticmethod
    def of(
        infos: Mapping[str, VariableSpec], trains: Mapping[str, bool | np.ndarray]
    ) -> "Partition":
        """Sorts the variables into the three kinds by `trains` (`TrainableModel.trainable`)."""
        trainable, frozen, buffers, masks = [], [], [], {}
        for path, info in infos.items():
            if info.is_buffer:
                buffers.append(path)
                continue
            mask = np.asarray(trains[path])
            (trainable if mask.any() else frozen).append(path)
            if mask.any() and not mask.all():
                if mask.shape != info.shape[:1]:
                    raise ValueError(
                        f"{path}: the layer mask has shape {mask.shape}, expected {info.shape[:1]}"
                    )
                masks[path] = mask
        return Partition(
            trainable=tuple(trainable), frozen=tuple(frozen), buffers=tuple(buffers), masks=masks
        )

    def require_trainable(self) -> None:
        """Raises SettingsError if nothing is left to train."""
        if not self.trainable:
            raise SettingsError(
                "model.freeze_params freezes every parameter; exclude some with "
                "model.prevent_freeze_params"
            )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shape, dtype and sharding of every array of a run; it holds no arrays."""

    state: TrainState[jax.ShapeDtypeStruct]
    """Its leaves are `jax.ShapeDtypeStruct` with a sharding."""
    frozen: dict[str, jax.ShapeDtypeStruct]
    """Path -> `jax.ShapeDtypeStruct` with a sharding."""

    @property
    def variables(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path of every parameter and buffer -> `jax.ShapeDtypeStruct` with a sharding."""
        return {**self.frozen, **self.state.buffers, **self.state.trainable}

    @property
    def state_shardings(self) -> TrainState[jax.sharding.Sharding]:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def plan_layout(
    infos: Mapping[str, VariableSpec],
    partition: Partition,
    optimizer: Optimizer,
    sharding: Sharding,
    frozen_dtype: DTypeLike,
) -> Layout:
    """Chooses dtypes and shardings: fp32 if trained, `frozen_dtype` if frozen."""

    def describe(path: str, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        info = infos[path]
        placement = sharding.named(info.axes, info.shape)
        return jax.ShapeDtypeStruct(info.shape, dtype, sharding=placement)

    trainable = {path: describe(path, jnp.float32) for path in partition.trainable}
    opt_shardings = optimizer.shardings(
        trainable, {p: s.sharding for p, s in trainable.items()}, sharding.replicated
    )
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated)
    return Layout(
        state=TrainState(
            trainable=trainable,
            buffers={path: describe(path, infos[path].dtype) for path in partition.buffers},
            opt_state=jax.tree.map(
                lambda leaf, placement: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=placement
                ),
                jax.eval_shape(optimizer.init, trainable),
                opt_shardings,
            ),
            step=counter,
            skipped=counter,
        ),
        frozen={
            path: describe(path, infos[path].computed_in(frozen_dtype)) for path in partition.frozen
        },
    )


def put(values: Variables, layout: Mapping[str, jax.ShapeDtypeStruct], *, copy: bool) -> Variables:
    """Casts the arrays of the layout's paths to its dtypes, and shards them.

    With `copy` the result shares no memory with `values`, so it may be donated. Raises ValueError
    for a wrong shape.
    """
    placed = {}
    for path, leaf in layout.items():
        value = values[path]
        if tuple(value.shape) != tuple(leaf.shape):
            raise ValueError(f"{path}: has shape {tuple(value.shape)}, expected {leaf.shape}")
        if value.dtype != leaf.dtype:
            value = value.astype(leaf.dtype)
        placed[path] = _place(value, leaf.sharding, copy=copy)
    return placed


def _place(value: AnyArray, placement: jax.sharding.Sharding, *, copy: bool) -> jax.Array:
    if placement.is_fully_addressable or isinstance(value, jax.Array):
        return jax.device_put(value, placement, may_alias=False if copy else None)
    return put_global(value, placement)


def first_state(
    variables: Variables, layout: Layout, optimizer: Optimizer
) -> TrainState[jax.Array]:
    """Makes the state before the first step: copies of the arrays, and an optimizer state."""
    trainable = put(variables, layout.state.trainable, copy=True)
    shardings = layout.state_shardings
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    zero = np.zeros((), np.int32)
    return TrainState(
        trainable=trainable,
        buffers=put(variables, layout.state.buffers, copy=True),
        opt_state=opt_state,
        step=_place(zero, shardings.step, copy=True),
        skipped=_place(zero, shardings.skipped, copy=True),
    )
