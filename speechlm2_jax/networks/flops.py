"""Model FLOPs of one batch, for model FLOPs utilisation (MFU).

- A weight costs 2 FLOPs per token in the forward pass, 2 in the backward pass if a gradient passes
  through its layer, and 2 more if the weight is trained.
- Causal attention costs half of full attention.
- The LM head counts only at positions with a target.
- Padding and rematerialisation do not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.batches import SalmBatch
from speechlm2_jax.layers.module import VariableInfo

OUTPUT_PROJECTION = ".attention.output.weight"


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Consecutive layers that process the same number of tokens."""

    prefix: str
    """Prefix of the paths of their variables."""
    tokens: float
    attention: float = 0.0
    """Multiply-adds of attention: scores and weighted values. Causal attention counts half."""


@dataclass(frozen=True, kw_only=True)
class EncodedAudio:
    """Number of frames of each clip without padding; arrays of any shape."""

    encoded: np.ndarray
    """Encoder frames per clip, or per chunk if the encoder runs over chunks of a clip."""
    adapted: np.ndarray
    """Frames per clip after the modality adapter."""
    subsampling_factor: int
    """How often the weights of the convolutional subsampling count per encoder frame."""


def salm_flops(
    infos: Mapping[str, VariableInfo],
    trainable: Mapping[str, bool | np.ndarray],
    batch: SalmBatch,
    audio: EncodedAudio,
) -> float:
    """Computes the FLOPs of one training step on `batch` (host arrays)."""
    groups = (
        *_perception(infos, audio),
        *_llm(infos, segment_lengths(batch.segments), float(batch.loss_mask.sum())),
    )
    return _total(infos, trainable, groups)


def duplex_flops(
    infos: Mapping[str, VariableInfo],
    trainable: Mapping[str, bool | np.ndarray],
    frames: np.ndarray,
    *,
    subsampling_factor: int,
) -> float:
    """Computes the FLOPs of one training step of a duplex model.

    `frames` is the number of frames of each conversation. Both heads count at every frame. The
    codec does not count: it is frozen and runs forward only.
    """
    n_frames = float(frames.sum())
    decoder = "speech_decoder.transformer.layers."
    inputs = infos.get(f"{decoder}attention.inputs.weight")
    # one matrix projects to queries, keys and values: a third of its outputs is the width
    width = 0.0 if inputs is None else 2.0 * inputs.shape[0] * inputs.shape[1] / 3
    audio = EncodedAudio(encoded=frames, adapted=frames, subsampling_factor=subsampling_factor)
    groups = (
        *_perception(infos, audio),
        *_llm(infos, frames, n_frames),
        LayerGroup(
            prefix="speech_decoder.transformer.",
            tokens=n_frames,
            attention=width * _pairs(frames) / 2,
        ),
        LayerGroup(prefix="speech_decoder.projection.", tokens=n_frames),
        LayerGroup(
            prefix="audio_head." if inputs is None else "speech_decoder.head.", tokens=n_frames
        ),
    )
    return _total(infos, trainable, groups)


def duplex_stt_flops(
    infos: Mapping[str, VariableInfo],
    trainable: Mapping[str, bool | np.ndarray],
    frames: np.ndarray,
    prompts: np.ndarray,
    *,
    subsampling_factor: int,
) -> float:
    """Computes the FLOPs of one training step of a duplex speech-to-text model.

    `frames` and `prompts` (tokens of system prompts) are those of each conversation. All heads
    count at every position.
    """
    positions = frames + prompts
    audio = EncodedAudio(encoded=frames, adapted=frames, subsampling_factor=subsampling_factor)
    groups = (
        *_perception(infos, audio),
        *_llm(infos, positions, float(positions.sum())),
        LayerGroup(prefix="user_head.", tokens=float(positions.sum())),
    )
    return _total(infos, trainable, groups)


def _perception(infos: Mapping[str, VariableInfo], audio: EncodedAudio) -> tuple[LayerGroup, ...]:
    frames = float(audio.encoded.sum())
    attention = _attention_width(infos, "perception.encoder.layers.") * _pairs(audio.encoded)
    return (
        LayerGroup(
            prefix="perception.encoder.subsampling.", tokens=frames * audio.subsampling_factor
        ),
        LayerGroup(prefix="perception.encoder.layers.", tokens=frames, attention=attention),
        *_adapter(infos, audio),
        LayerGroup(prefix="perception.projection.", tokens=float(audio.adapted.sum())),
    )


def _adapter(infos: Mapping[str, VariableInfo], audio: EncodedAudio) -> tuple[LayerGroup, ...]:
    """The layers of the modality adapter.

    A Conformer or a projection processes its own frames. A Q-Former attends from its queries to
    the outputs of several encoder layers.
    """
    root, adapted = "perception.adapter.", float(audio.adapted.sum())
    queries = infos.get(f"{root}prompts")
    width = _attention_width(infos, f"{root}layers.")
    if queries is None:
        return (LayerGroup(prefix=root, tokens=adapted, attention=width * _pairs(audio.adapted)),)
    encoder_layers, prompts = queries.shape[:2]
    n_queries = adapted * encoder_layers
    n_keys = float(audio.encoded.sum()) * encoder_layers
    self_attention, cross = f"{root}layers.attention.", f"{root}layers.cross_attention."
    return (
        *(LayerGroup(prefix=f"{cross}{name}.", tokens=n_keys) for name in ("key", "value")),
        LayerGroup(prefix=self_attention, tokens=n_queries, attention=width * n_queries * prompts),
        *(LayerGroup(prefix=f"{cross}{name}.", tokens=n_queries) for name in ("query", "output")),
        LayerGroup(
            prefix=f"{root}layers.hidden.", tokens=n_queries, attention=width * n_keys * prompts
        ),
        LayerGroup(prefix=f"{root}layers.output.", tokens=n_queries),
        LayerGroup(prefix=f"{root}projection.", tokens=adapted),
    )


def _llm(
    infos: Mapping[str, VariableInfo], lengths: np.ndarray, scored: float
) -> tuple[LayerGroup, ...]:
    # the layers may form several stacks; attention with a sliding window counts as full attention
    outputs = [
        i for p, i in infos.items() if p.startswith("llm.") and p.endswith(OUTPUT_PROJECTION)
    ]
    width = sum(2.0 * info.shape[0] * info.shape[2] for info in outputs)
    attention = width * _pairs(lengths) / 2
    head = "llm.head." if "llm.head.weight" in infos else "llm.embedding."
    return (
        LayerGroup(prefix="llm.layers.", tokens=float(lengths.sum()), attention=attention),
        LayerGroup(prefix="llm.remainder.", tokens=float(lengths.sum())),
        LayerGroup(prefix=head, tokens=scored),
    )


def _total(
    infos: Mapping[str, VariableInfo],
    trainable: Mapping[str, bool | np.ndarray],
    groups: Sequence[LayerGroup],
) -> float:
    """Sums the FLOPs of `groups`, which are in forward order.

    The backward pass runs from the loss back to the first group with a trained weight.
    """
    total, gradient_passes = 0.0, False
    for group in groups:
        paths = [p for p in infos if p.startswith(group.prefix) and not infos[p].is_buffer]
        weights = sum(_kernel_size(infos[p]) for p in paths)
        trained = sum(_kernel_size(infos[p]) * float(np.mean(trainable[p])) for p in paths)
        gradient_passes = gradient_passes or trained > 0
        passes = 2.0 if gradient_passes else 1.0
        total += 2 * group.tokens * (weights * passes + trained)
        total += 2 * group.attention * (1 + 2 * gradient_passes)
    return total


def segment_lengths(segments: np.ndarray) -> np.ndarray:
    """Positions of each conversation of a batch; a row may hold several ([..., T] to [N])."""
    rows = segments.reshape(-1, segments.shape[-1]).astype(np.int64)
    most = int(rows.max(initial=0)) + 1
    numbers = rows + most * np.arange(len(rows))[:, None]
    counts = np.bincount(numbers[rows > 0], minlength=1)
    return counts[counts > 0]


def _pairs(lengths: np.ndarray) -> float:
    """Number of query-key pairs in full attention over sequences of these lengths."""
    return float((lengths.astype(float) ** 2).sum())


def _kernel_size(info: VariableInfo) -> int:
    dims = len(info.shape) - info.is_stacked
    return int(np.prod(info.shape)) if dims >= 2 else 0


def _attention_width(infos: Mapping[str, VariableInfo], prefix: str) -> float:
    """Multiply-adds per pair of a query and a key (score and weighted value), over all layers."""
    info = infos.get(f"{prefix}attention.query.weight")
    return 0.0 if info is None else 2.0 * info.shape[0] * info.shape[1]
