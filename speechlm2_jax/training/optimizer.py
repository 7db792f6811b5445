"""AdamW as in torch, clipping by the global norm, and masks for stacks with frozen layers.

The learning rate is an argument of each update. The host computes it from the schedule. Frozen
parameters are not passed to the optimizer: they have no state and no decay, and do not count in the
gradient norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from speechlm2_jax.arrays import Scalar
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.settings import Refusal, SettingsError
from speechlm2_jax.settings.targets import select
from speechlm2_jax.training.protocol import Variables

if TYPE_CHECKING:
    from optax import OptState
else:
    OptState = PyTree  # optax names a type that does not exist at run time
CLIP_EPSILON = 1e-6
"""torch.nn.utils.clip_grad_norm_ scales by max_norm / (norm + 1e-6)."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """torch.optim.AdamW: decoupled weight decay on every trainable parameter."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    IGNORED: ClassVar[Mapping[str, str]] = {
        "foreach": "chooses a torch implementation; one compiled program does the update here",
        "fused": "chooses a torch implementation; one compiled program does the update here",
        "capturable": "for CUDA graphs of torch; the update is compiled here",
        "differentiable": "for differentiating through torch's update",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "amsgrad": "the AMSGrad variant is not supported; use plain AdamW",
        "maximize": "losses are minimised here",
    }

    def __post_init__(self) -> None:
        if self.lr < 0 or self.eps < 0 or self.weight_decay < 0:
            raise ValueError("lr, eps and weight_decay must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")

    def transform(self) -> optax.GradientTransformation:
        """The update before it is scaled by the learning rate: Adam's direction plus decay."""
        return optax.chain(
            optax.scale_by_adam(*self.betas, self.eps),
            optax.add_decayed_weights(self.weight_decay),
        )


@dataclass(frozen=True, kw_only=True)
class FlashAdamWConfig(AdamWConfig):
    """flashoptim.FlashAdamW: AdamW whose state is compressed in torch; fp32 here."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        key: "about how torch stores the optimizer's state; it is fp32 here"
        for key in ("quantize", "compress_state_dict", "master_weight_bits", "check_numerics")
    } | {"fused": AdamWConfig.IGNORED["fused"]}
    REFUSED: ClassVar[Mapping[str, object]] = {
        "decouple_lr": "weight decay is scaled by the learning rate; set it to false",
    }


OPTIMIZERS: Mapping[str, type[AdamWConfig]] = {
    "AdamW": AdamWConfig,
    "FlashAdamW": FlashAdamWConfig,
}


def read_optimizer(values: Mapping[str, object] | None) -> AdamWConfig:
    """Reads NeMo's `optimizer` block. Raises SettingsError for an unknown optimizer or key."""
    if not values:
        raise SettingsError(
            "model.optimizer: required for training, for example _target_: torch.optim.AdamW"
        )
    return select(OPTIMIZERS, values, "model.optimizer")


@register_pytree
@dataclass(frozen=True, kw_only=True)
class Update:
    """The result of one update."""

    params: Variables
    opt_state: OptState
    grad_norm: jax.Array
    """Float32 scalar: the norm before clipping, over trained layers only."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optax transformation with clipping and layer masks. Its functions are pure."""

    transform: optax.GradientTransformation
    clip_norm: float = 0.0
    """Largest global gradient norm; 0: no clipping."""
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Path of a partly frozen stack -> bool [L], True where the layer is trained."""

    def init(self, params: Variables) -> OptState:
        """The state before the first update, fp32, shaped like the parameters."""
        return self.transform.init(params)

    def update(
        self, grads: Variables, opt_state: OptState, params: Variables, lr: Scalar
    ) -> Update:
        """Clips, updates and decays. Frozen layers of a stack stay bit-identical."""
        grads = self._zero_frozen(grads)
        norm = optax.tree.norm(grads)
        if self.clip_norm > 0:
            scale = jnp.minimum(1.0, self.clip_norm / (norm + CLIP_EPSILON))
            grads = jax.tree.map(lambda g: g * scale, grads)
        directions, opt_state = self.transform.update(grads, opt_state, params)
        steps = self._zero_frozen(jax.tree.map(lambda d: -lr * d, directions))
        return Update(
            params=jax.tree.map(jnp.add, params, steps), opt_state=opt_state, grad_norm=norm
        )

    def _zero_frozen(self, tree: Variables) -> Variables:
        """Sets the entries of frozen layers of a stack to 0."""

        def masked(path: str, value: jax.Array) -> jax.Array:
            if path not in self.masks:
                return value
            mask = np.asarray(self.masks[path]).reshape(-1, *[1] * (value.ndim - 1))
            return jnp.where(mask, value, 0)

        return {path: masked(path, value) for path, value in tree.items()}

    def shardings(
        self,
        params: Variables,
        param_shardings: Mapping[str, jax.sharding.Sharding],
        replicated: jax.sharding.Sharding,
    ) -> PyTree:
        """The sharding of each leaf of the optimizer state.

        Moments are sharded as their parameter, counters are replicated. Without these shardings
        `jax.jit(init)` would replicate the moments on every device.
        """
        return optax.tree.map_params(
            self.transform,
            lambda _, sharding: sharding,
            jax.eval_shape(self.init, params),
            dict(param_shardings),
            transform_non_params=lambda _: replicated,
        )
