"""What callers of `generate` may pass, turned into conversations for the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from speechlm2_jax.batches import SalmExample
from speechlm2_jax.data.audio import read_audio
from speechlm2_jax.data.prompts import PromptFormatter


@dataclass(frozen=True, kw_only=True)
class PromptContext:
    """What turns prompts into ids and audio into samples."""

    formatter: PromptFormatter
    sample_rate_hz: int
    placeholder_id: int
    pad_id: int


def prompt_examples(
    prompts: Any, audios: Any, audio_lens: Any, context: PromptContext, first: int = 0
) -> tuple[list[SalmExample], np.ndarray]:
    """Makes one conversation per prompt; audio goes to the placeholders in order.

    `prompts`: a list of dialogs (lists of turns, each with `role`, and `content` or `slots`, and
    optionally `audio`: paths or arrays at the model's rate), or int ids [B, T] padded anywhere on
    the left. `audios` [B', S] with `audio_lens` [B'], one per placeholder over the whole batch.
    Returns the conversations, named by their numbers from `first`, and their left-padded ids
    [B, T]. Raises ValueError where placeholders and audio do not match in number.
    """
    if _is_dialogs(prompts):
        inside = [clip for dialog in prompts for turn in dialog for clip in _clips(turn, context)]
        if inside and audios is not None:
            raise ValueError("give audio inside the prompts or as audios/audio_lens, not both")
        turns = [[{k: v for k, v in t.items() if k != "audio"} for t in d] for d in prompts]
        ids = [np.asarray(p.input_ids) for p in context.formatter.encode_dialogs(turns)]
        clips = inside if audios is None else _unnamed(audios, audio_lens)
    else:
        array = np.asarray(prompts)
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"prompts must be dialogs or int ids [B, T]; got {array.dtype} {array.shape}"
            )
        ids = list(array)
        clips = [] if audios is None else _unnamed(audios, audio_lens)
    return _assign(ids, clips, context, first), left_pad(ids, context.pad_id)


def split_audio(audios: Any, audio_lens: Any) -> list[np.ndarray]:
    """Cuts a padded batch [B, S] into its clips. Raises ValueError for a length out of range."""
    array = np.asarray(audios, np.float32)
    if array.ndim != 2:
        raise ValueError(f"audios must be float [B, S]; got shape {array.shape}")
    lengths = (
        np.full(len(array), array.shape[1]) if audio_lens is None else np.asarray(audio_lens, int)
    )
    if lengths.shape != (len(array),) or (lengths < 1).any() or (lengths > array.shape[1]).any():
        raise ValueError(
            f"audio_lens must be {len(array)} lengths from 1 to {array.shape[1]} samples"
        )
    return [row[:n] for row, n in zip(array, lengths, strict=True)]


def left_pad(rows: Sequence[np.ndarray], pad_id: int) -> np.ndarray:
    """Stacks id rows of unequal length, padded on the left as NeMo's collation does."""
    width = max(map(len, rows), default=0)
    out = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        out[i, width - len(row) :] = row
    return out


def _is_dialogs(prompts: Any) -> bool:
    return (
        isinstance(prompts, Sequence)
        and len(prompts) > 0
        and isinstance(prompts[0], Sequence)
        and len(prompts[0]) > 0
        and isinstance(prompts[0][0], dict)
    )


class _Clip(NamedTuple):
    """A recording, and the file that it came from."""

    samples: np.ndarray
    name: str | None = None


def _clips(turn: dict[str, Any], context: PromptContext) -> list[_Clip]:
    audio = turn.get("audio", ())
    items = [audio] if isinstance(audio, str) or hasattr(audio, "__array__") else list(audio)
    return [
        _Clip(np.asarray(item, np.float32))
        if hasattr(item, "__array__")
        else _Clip(read_audio(item, sample_rate_hz=context.sample_rate_hz), str(item))
        for item in items
    ]


def _unnamed(audios: Any, audio_lens: Any) -> list[_Clip]:
    return [_Clip(samples) for samples in split_audio(audios, audio_lens)]


def _assign(
    ids: Sequence[np.ndarray], clips: Sequence[_Clip], context: PromptContext, first: int
) -> list[SalmExample]:
    needed = [int((row == context.placeholder_id).sum()) for row in ids]
    if sum(needed) != len(clips):
        raise ValueError(
            f"the prompts have {sum(needed)} audio placeholders but {len(clips)} audio clips were "
            "given; write the model's audio_locator_tag once per clip"
        )
    starts = np.cumsum([0, *needed])
    return [_example(first + i, row, clips[starts[i] : starts[i + 1]]) for i, row in enumerate(ids)]


def _example(number: int, ids: np.ndarray, clips: Sequence[_Clip]) -> SalmExample:
    files = ", ".join(clip.name for clip in clips if clip.name is not None)
    return SalmExample(
        id=f"prompt {number}" + (f" ({files})" if files else ""),
        tokens=np.asarray(ids, np.int32),
        loss_mask=np.zeros(len(ids), bool),
        audio=tuple(clip.samples for clip in clips),
    )
