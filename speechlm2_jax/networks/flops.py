"""Model FLOPs of one batch, for utilisation: what the maths needs, not what was run.

Per token 2 FLOPs per weight forward, 2 backward where a gradient must pass, 2 more where the weight
is trained; causal attention at half; the head only where a target is; padding and
rematerialisation count nothing.
"""

from collections.abc import Mapping, Sequence
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
    lengths = (batch.segments > 0).sum(axis=-1)
    parts = (
        *_perception(infos, frames_per_clip, subsampling_factor),
        *_llm(infos, lengths, float(batch.loss_mask.sum())),
    )
    return _total(infos, trainable, parts)


def duplex_flops(
    infos: Mapping[str, VariableInfo],
    trainable: Mapping[str, bool | np.ndarray],
    frames_per_row: np.ndarray,
    *,
    subsampling_factor: int,
) -> float:
    """FLOPs of one training step of a duplex model on rows of so many frames.

    Both heads score every frame. The codec, which is frozen and runs forward only, is left out.
    """
    frames = float(frames_per_row.sum())
    decoder = "speech_decoder.transformer.layers."
    inputs = infos.get(f"{decoder}attention.inputs.weight")
    width = 0.0 if inputs is None else 2.0 * inputs.shape[0] * inputs.shape[1] / 3
    parts = (
        *_perception(infos, frames_per_row, subsampling_factor),
        *_llm(infos, frames_per_row, frames),
        Part(
            prefix="speech_decoder.transformer.",
            tokens=frames,
            attention=width * _pairs(frames_per_row) / 2,
        ),
        Part(prefix="speech_decoder.projection.", tokens=frames),
        Part(prefix="audio_head." if inputs is None else "speech_decoder.head.", tokens=frames),
    )
    return _total(infos, trainable, parts)


def _perception(
    infos: Mapping[str, VariableInfo], frames_per_clip: np.ndarray, subsampling_factor: int
) -> tuple[Part, ...]:
    frames, pairs = float(frames_per_clip.sum()), _pairs(frames_per_clip)
    encoder, adapter = (
        _attention_width(infos, f"perception.{part}.layers.") * pairs
        for part in ("encoder", "adapter")
    )
    return (
        Part(prefix="perception.encoder.subsampling.", tokens=frames * subsampling_factor),
        Part(prefix="perception.encoder.layers.", tokens=frames, attention=encoder),
        Part(prefix="perception.adapter.", tokens=frames, attention=adapter),
        Part(prefix="perception.projection.", tokens=frames),
    )


def _llm(infos: Mapping[str, VariableInfo], lengths: np.ndarray, scored: float) -> tuple[Part, ...]:
    attention = _attention_width(infos, "llm.layers.") * _pairs(lengths) / 2
    head = "llm.head." if "llm.head.weight" in infos else "llm.embedding."
    return (
        Part(prefix="llm.layers.", tokens=float(lengths.sum()), attention=attention),
        Part(prefix=head, tokens=scored),
    )


def _total(
    infos: Mapping[str, VariableInfo],
    trainable: Mapping[str, bool | np.ndarray],
    parts: Sequence[Part],
) -> float:
    """Sums the parts; a gradient passes from the first trained one on."""
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


def _pairs(lengths: np.ndarray) -> float:
    return float((lengths.astype(float) ** 2).sum())


def _kernel_size(info: VariableInfo) -> int:
    dims = len(info.shape) - info.is_stacked
    return int(np.prod(info.shape)) if dims >= 2 else 0


def _attention_width(infos: Mapping[str, VariableInfo], prefix: str) -> float:
    """Multiply-adds per pair of positions: scores and mixing, over all layers."""
    info = infos.get(f"{prefix}attention.query.weight")
    return 0.0 if info is None else 2.0 * info.shape[0] * info.shape[1]
