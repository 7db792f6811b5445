"""Turns the prompts of `generate` (dialogs or token ids, with audio) into examples."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.batches import SalmExample
from speechlm2_jax.data.audio import check_samples
from speechlm2_jax.data.padding import pad_left
from speechlm2_jax.data.prompts import PromptError, PromptFormatter
from speechlm2_jax.data.prompts.formatter import Turn
from speechlm2_jax.inference.audio_inputs import AudioInput, clips_of, split_audio
from speechlm2_jax.inference.content_parts import with_plain_content
from speechlm2_jax.pretrained.salm_config import DEFAULT_AUDIO_LOCATOR_TAG

Dialog = Sequence[Turn]
"""The turns of a conversation."""
Prompts = Sequence[Dialog] | ArrayLike
"""Dialogs, or token ids [B, T]."""
_FORM = 'prompts must be dialogs, [[{"role": "user", "content": "..."}], ...], or int ids [B, T]'


@dataclass(frozen=True, kw_only=True)
class PromptContext:
    """The tokenization and audio settings of a model."""

    formatter: PromptFormatter
    sample_rate_hz: int
    placeholder_id: int
    pad_id: int
    bos_id: int | None
    vocab_size: int
    enable_thinking: bool | None = None
    placeholder: str = DEFAULT_AUDIO_LOCATOR_TAG
    """The text of `placeholder_id`."""


def prompt_examples(
    prompts: Prompts,
    audios: ArrayLike | None,
    audio_lens: ArrayLike | None,
    context: PromptContext,
    first: int = 0,
) -> tuple[list[SalmExample], np.ndarray]:
    """Makes one example per prompt; audio goes to the placeholders in order.

    - `prompts`: a list of dialogs, or int ids [B, T] with any padding on the left. A dialog is a
      list of turns with `role`, `content` or `slots`, and optionally `audio` (recordings as
      `clips_of` takes them). `content` is text, or a list of parts (`content_parts`).
    - `audios` [B', S] with `audio_lens` [B']: one clip per placeholder over the whole batch.

    Returns the examples and their left-padded ids [B, T]. The examples are named "prompt N", with N
    counted from `first`. Raises ValueError, naming the prompt, for invalid prompts, audio or ids,
    and if the numbers of placeholders and clips differ.
    """
    if _are_dialogs(prompts, first):
        names = _names(prompts, first)
        prompts = [
            [with_plain_content(turn, name, context.placeholder) for turn in dialog]
            for dialog, name in zip(prompts, names, strict=True)
        ]
        clips = [
            [
                c
                for turn in dialog
                for c in clips_of(turn.get("audio"), name, context.sample_rate_hz)
            ]
            for dialog, name in zip(prompts, names, strict=True)
        ]
        if any(clips) and audios is not None:
            raise ValueError("give audio inside the prompts or as audios/audio_lens, not both")
        ids = [_encode(d, name, context) for d, name in zip(prompts, names, strict=True)]
        tokens = ids
    else:
        ids = _id_rows(prompts, context, first)
        tokens = _unpadded(ids, context)
        names, clips = _names(ids, first), [[] for _ in ids]
    needed = [int((own == context.placeholder_id).sum()) for own in ids]
    if audios is not None:
        clips = _assign(split_audio(audios, audio_lens), names, needed)
    for name, wanted, own in zip(names, needed, clips, strict=True):
        _check_number(f"{name} has", wanted, len(own))
    examples = [_example(*one) for one in zip(names, tokens, clips, strict=True)]
    return examples, pad_left(ids, context.pad_id)


def _names(prompts: Sized, first: int) -> list[str]:
    return [f"prompt {first + i}" for i in range(len(prompts))]


def _are_dialogs(prompts: object, first: int) -> TypeGuard[Sequence[Dialog]]:
    """Whether prompts are dialogs. If not, they should be ids. Raises ValueError for texts."""
    if isinstance(prompts, str | bytes | Mapping):
        raise ValueError(f"{_FORM}; got {type(prompts).__name__}")
    if not isinstance(prompts, Sequence):
        return False
    if any(isinstance(prompt, Mapping) for prompt in prompts):
        raise ValueError(f"{_FORM}; this is one dialog: wrap it in a list")
    if any(isinstance(prompt, str | bytes) for prompt in prompts):
        raise ValueError(f"{_FORM}; got a list of texts: make each a turn of a dialog")
    lists = [prompt for prompt in prompts if isinstance(prompt, Sequence)]
    if not any(isinstance(turn, Mapping) for dialog in lists for turn in dialog):
        return False
    for number, dialog in enumerate(prompts, first):
        is_list = isinstance(dialog, Sequence) and len(dialog) > 0
        if not is_list or not all(isinstance(turn, Mapping) for turn in dialog):
            raise ValueError(f"prompt {number} must be a dialog: a list of at least one turn")
    return True


def _encode(dialog: Dialog, name: str, context: PromptContext) -> np.ndarray:
    turns = [{key: value for key, value in turn.items() if key != "audio"} for turn in dialog]
    try:
        thinking = context.enable_thinking
        prompt = context.formatter.encode_dialog(turns, enable_thinking=thinking)
        return np.asarray(prompt.input_ids)
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from error


def _id_rows(prompts: Prompts, context: PromptContext, first: int) -> list[np.ndarray]:
    """Checks an array of ids [B, T] and splits it into its sequences.

    Raises ValueError for another array and for unknown ids.
    """
    try:
        array = np.asarray(prompts)
    except ValueError as error:  # sequences of several lengths
        raise ValueError(
            f"prompts of ids must be one array [B, T]; pad them on the left with the id "
            f"{context.pad_id}"
        ) from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{_FORM}; got {array.dtype} {array.shape}")
    special = (context.placeholder_id, context.pad_id)
    is_known = ((array >= 0) & (array < context.vocab_size)) | np.isin(array, special)
    for row, fine, name in zip(array, is_known, _names(array, first), strict=True):
        if not fine.all():
            raise ValueError(
                f"{name}: {row[~fine][:5].tolist()} are not token ids; give ids from 0 to "
                f"{context.vocab_size - 1}, and {context.placeholder_id} for an audio placeholder"
            )
    return list(array)


def _unpadded(sequences: Sequence[np.ndarray], context: PromptContext) -> list[np.ndarray]:
    """Removes the left padding of the sequences.

    If the pad token is also the bos token and every sequence starts with it, one of them is kept as
    the bos token.
    """
    is_text = [np.append(ids != context.pad_id, True) for ids in sequences]
    counts = [int(np.argmax(own)) for own in is_text]
    has_bos = context.pad_id == context.bos_id and min(counts, default=0) > 0
    return [ids[max(n - has_bos, 0) :] for ids, n in zip(sequences, counts, strict=True)]


def _assign(
    audio: Sequence[np.ndarray], names: Sequence[str], needed: Sequence[int]
) -> list[list[AudioInput]]:
    """Assigns recordings to prompts in order, one per placeholder."""
    _check_number("the prompts have", sum(needed), len(audio))
    waves = iter(audio)
    return [
        [AudioInput(check_samples(next(waves), name)) for _ in range(wanted)]
        for name, wanted in zip(names, needed, strict=True)
    ]


def _check_number(has: str, needed: int, given: int) -> None:
    if needed != given:
        raise ValueError(
            f"{has} {needed} audio placeholders but {given} audio clips were given; write the "
            "model's audio_locator_tag once per clip"
        )


def _example(name: str, ids: np.ndarray, clips: Sequence[AudioInput]) -> SalmExample:
    files = ", ".join(clip.name for clip in clips if clip.name is not None)
    return SalmExample(
        id=name + (f" ({files})" if files else ""),
        tokens=np.asarray(ids, np.int32),
        loss_mask=np.zeros(len(ids), bool),
        audio=tuple(clip.samples for clip in clips),
    )
