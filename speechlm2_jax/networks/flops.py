"""Model FLOPs of one SALM batch, for utilisation: what the maths needs, not what was run.

Per token 2 FLOPs per weight forward, 2 backward where a gradient must pass, 2 more where the weight
is trained; causal attention at half; the head only where a target is; padding and
rematerialisation count nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.batches import SalmBatch
from speechlm2_jax.layers.module import VariableInfo


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of layers that sees the same tokens, in the order of the forward pass."""

    prefix: str
    tokens: float
    attention: float = 0.0
    """Multiply-adds of scores and mixing, already halved where causal."""


def salm_flops(
    infos: Mapping[str, VariableInfo],
    trainable: Mapping[str, bool | np.ndarray],
    batch: SalmBatch,
    frames_per_clip: np.ndarray,
    *,
    subsampling_factor: int,
) -> float:
    """FLOPs of one training step on `batch` (host arrays).

    `frames_per_clip` is the encoder's real output frames of each clip, any shape. Weights of
    convolutional subsampling are counted at the encoder's input rate over its factor.
    """
    tokens = float((batch.segments > 0).sum())
    frames = float(frames_per_clip.sum())
    lengths = (batch.segments > 0).sum(axis=-1).astype(float)
    encoder_attention = _attention_width(infos, "perception.encoder.layers.") * float(
        (frames_per_clip.astype(float) ** 2).sum()
    )
    adapter_attention = _attention_width(infos, "perception.adapter.layers.") * float(
        (frames_per_clip.astype(float) ** 2).sum()
    )
    llm_attention = _attention_width(infos, "llm.layers.") * float((lengths**2).sum()) / 2
    tied = "llm.head.weight" not in infos
    parts = (
        Part(prefix="perception.encoder.subsampling.", tokens=frames * subsampling_factor),
        Part(prefix="perception.encoder.layers.", tokens=frames, attention=encoder_attention),
        Part(prefix="perception.adapter.", tokens=frames, attention=adapter_attention),
        Part(prefix="perception.projection.", tokens=frames),
        Part(prefix="llm.layers.", tokens=tokens, attention=llm_attention),
        Part(
            prefix="llm.embedding." if tied else "llm.head.",
            tokens=float(batch.loss_mask.sum()),
        ),
    )
    total, gradient_passes = 0.0, False
    for part in parts:
        paths = [p for p in infos if p.startswith(part.prefix) and not infos[p].is_buffer]
        weights = sum(_kernel_size(infos[p]) for p in paths)
        trained = sum(_kernel_size(infos[p]) * float(np.mean(trainable[p])) for p in paths)
        gradient_passes = gradient_passes or trained > 0
        passes = 2.0 if gradient_passes else 1.0
        total += 2 * part.tokens * (weights * passes + trained)
        total += 2 * part.attention * (1 + 2 * gradient_passes)
    return total


def _kernel_size(info: VariableInfo) -> int:
    dims = len(info.shape) - info.is_stacked
    return int(np.prod(info.shape)) if dims >= 2 else 0


def _attention_width(infos: Mapping[str, VariableInfo], prefix: str) -> float:
    """Multiply-adds per pair of positions: scores and mixing, over all layers."""
    info = infos.get(f"{prefix}attention.query.weight")
    return 0.0 if info is None else 2.0 * info.shape[0] * info.shape[1]
