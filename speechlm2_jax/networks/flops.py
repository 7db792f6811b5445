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


@dataclass(frozen=True, kw_only=True)
class EncodedAudio:
    """Real frames of each clip (any shape) behind the encoder and behind the adapter.

    Weights of convolutional subsampling are counted at the encoder's input rate over its factor.
    """

    encoded: np.ndarray
    """Per clip, or per part of a clip that the encoder sees by itself."""
    adapted: np.ndarray
    subsampling_factor: int


def salm_flops(
    infos: Mapping[str, VariableInfo],
    trainable: Mapping[str, bool | np.ndarray],
    batch: SalmBatch,
    heard: "EncodedAudio",
) -> float:
    """FLOPs of one training step on `batch` (host arrays)."""
    lengths = (batch.segments > 0).sum(axis=-1)
    parts = (
        *_perception(infos, heard),
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
    heard = EncodedAudio(
        encoded=frames_per_row, adapted=frames_per_row, subsampling_factor=subsampling_factor
    )
    parts = (
        *_perception(infos, heard),
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


def _perception(infos: Mapping[str, VariableInfo], heard: EncodedAudio) -> tuple[Part, ...]:
    frames = float(heard.encoded.sum())
    attention = _attention_width(infos, "perception.encoder.layers.") * _pairs(heard.encoded)
    return (
        Part(prefix="perception.encoder.subsampling.", tokens=frames * heard.subsampling_factor),
        Part(prefix="perception.encoder.layers.", tokens=frames, attention=attention),
        *_adapter(infos, heard),
        Part(prefix="perception.projection.", tokens=float(heard.adapted.sum())),
    )


def _adapter(infos: Mapping[str, VariableInfo], heard: EncodedAudio) -> tuple[Part, ...]:
    """A Conformer or a projection sees its own frames; a Q-Former asks each layer that it reads."""
    root, adapted = "perception.adapter.", float(heard.adapted.sum())
    queries = infos.get(f"{root}prompts")
    width = _attention_width(infos, f"{root}layers.")
    if queries is None:
        return (Part(prefix=root, tokens=adapted, attention=width * _pairs(heard.adapted)),)
    read, prompts = queries.shape[:2]
    asked, seen = adapted * read, float(heard.encoded.sum()) * read
    own, cross = f"{root}layers.attention.", f"{root}layers.cross_attention."
    return (
        *(Part(prefix=f"{cross}{name}.", tokens=seen) for name in ("key", "value")),
        Part(prefix=own, tokens=asked, attention=width * asked * prompts),
        *(Part(prefix=f"{cross}{name}.", tokens=asked) for name in ("query", "output")),
        Part(prefix=f"{root}layers.hidden.", tokens=asked, attention=width * seen * prompts),
        Part(prefix=f"{root}layers.output.", tokens=asked),
        Part(prefix=f"{root}projection.", tokens=adapted),
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
