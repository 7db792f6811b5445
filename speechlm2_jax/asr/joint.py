"""Joint network of a transducer: frame and prediction output -> logits of the next label."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from speechlm2_jax.layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
_TORCH_MEMORY = "saves memory in torch's training; same result"


@dataclass(frozen=True, kw_only=True)
class JointnetConfig:
    """NeMo's `joint.jointnet` block."""

    encoder_hidden: int
    pred_hidden: int
    joint_hidden: int
    activation: str
    dropout: float | None = 0.0
    """Never applied here. In NeMo it is a layer, which shifts a number in parameter names."""

    def __post_init__(self) -> None:
        if self.activation.lower() not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is not supported; use {' or '.join(ACTIVATIONS)}"
            )


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """NeMo's `joint` block."""

    TARGETS: ClassVar[tuple[str, ...]] = ("RNNTJoint",)
    IGNORED: ClassVar[Mapping[str, str]] = {
        "vocabulary": "the tokenizer has it",
        "log_softmax": "changes scores, but not the best label",
        "preserve_memory": _TORCH_MEMORY,
        "fuse_loss_wer": _TORCH_MEMORY,
        "experimental_fuse_loss_wer": _TORCH_MEMORY,
        "fused_batch_size": _TORCH_MEMORY,
        "masking_prob": "only read in training",
    }

    jointnet: JointnetConfig
    num_classes: int
    """Pieces of the tokenizer, without the blank."""
    num_extra_outputs: int = 0
    """Number of durations of a TDT model; 0 for RNN-T."""


class Joint(nnx.Module):
    """Computes logits: labels, then the blank, then durations."""

    def __init__(self, config: JointConfig, *, rngs: nnx.Rngs):
        net = config.jointnet
        self.activation = net.activation.lower()
        self.frames = Linear(net.encoder_hidden, net.joint_hidden, axes=(None, "embed"), rngs=rngs)
        self.labels = Linear(net.pred_hidden, net.joint_hidden, axes=(None, "embed"), rngs=rngs)
        classes = config.num_classes + 1 + config.num_extra_outputs
        self.output = Linear(net.joint_hidden, classes, axes=(None, "embed"), rngs=rngs)

    def score(
        self, frames: Float[Array, "*B J"], labels: Float[Array, "*B J"]
    ) -> Float[Array, "*B C"]:
        """Computes logits from projected frames and projected prediction outputs."""
        return self.output(ACTIVATIONS[self.activation](frames + labels)).astype(jnp.float32)

    def __call__(
        self, frames: Float[Array, "B T D"], labels: Float[Array, "B U P"]
    ) -> Float[Array, "B T U C"]:
        """Computes the logits of every frame with every output of the prediction network."""
        frames, labels = self.frames(frames), self.labels(labels)
        shape = (*frames.shape[:2], *labels.shape[1:])
        return self.score(
            jnp.broadcast_to(frames[:, :, None], shape), jnp.broadcast_to(labels[:, None], shape)
        )
