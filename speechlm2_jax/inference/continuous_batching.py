"""Continuous batching: a stream of prompts on a fixed number of slots.

A sequence that ends frees its slot for the next prompt. Three kinds of programs are compiled: the
encoder and the prefill, both once per shape of new prompts, and one program that decodes. Prompt
lengths are rounded up to 1.0x or 1.5x a power of two, so there are few shapes.

On a mesh every data-parallel device has slots of its own: a group. A prompt is encoded, prefilled
and decoded on the devices of its group.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from speechlm2_jax.generation.processors import reads_prompt
from speechlm2_jax.inference import generate
from speechlm2_jax.inference.drafts import draft_tokens, with_drafter
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.long_form import chunked
from speechlm2_jax.inference.prompts import Dialog
from speechlm2_jax.inference.request.generation_request import DraftRequest, GenerationRequest
from speechlm2_jax.inference.slot_table import SlotEntry, SlotResponse, SlotTable
from speechlm2_jax.inference.transcripts import with_transcripts


class _NumberAndIds(NamedTuple):
    number: int
    ids: np.ndarray


class FinishedPrompt(_NumberAndIds):
    """A prompt and its response: a pair (number, ids), with counts of draft tokens beside it.

    `number` is that of the prompt in the stream, from 0; `ids` are the int32 token ids of the
    response, without padding.
    """

    drafted: int = 0
    """Draft tokens that were checked; 0 without speculative decoding."""
    accepted: int = 0
    """Draft tokens that are part of the response."""

    @classmethod
    def of(cls, number: int, ids: np.ndarray, chunks: Sequence[SlotResponse]) -> "FinishedPrompt":
        """A response and the draft tokens of its chunks."""
        finished = cls(number, ids)
        finished.drafted = sum(chunk.drafted for chunk in chunks)
        finished.accepted = sum(chunk.accepted for chunk in chunks)
        return finished


def why_unsupported(request: GenerationRequest) -> str | None:
    """Names a setting that continuous batching does not support; None if all are supported."""
    reasons = {
        "num_beams: beam search": request.decoding.beams is not None,
        "num_return_sequences above 1": request.decoding.return_sequences > 1,
        "stop_strings": bool(request.stop_strings),
        "max_time": request.max_time_s is not None,
        "should_stop": request.should_stop is not None,
        "return_dict_in_generate": request.returns_dict,
        "max_length (use max_new_tokens)": request.max_length is not None,
    }
    return next((why for why, is_set in reasons.items() if is_set), None)


def generate_each(
    engine: Engine,
    prompts: Iterable[Dialog],
    request: GenerationRequest,
    slots: int,
    draw_numbers: Iterable[int] | None = None,
) -> Iterator[list[FinishedPrompt]]:
    """Generates responses to a stream of dialogs; see SALM.generate_each."""
    why = why_unsupported(request)
    if why is not None:
        raise ValueError(
            f"{why}: not supported by generate_each (continuous batching); use generate"
        )
    if slots < 1:
        raise ValueError(f"slots={slots} must be at least 1")
    numbers = itertools.count() if draw_numbers is None else draw_numbers
    return _join_chunks(engine, zip(prompts, numbers, strict=False), request, slots)


def _join_chunks(
    engine: Engine, prompts: Iterable[tuple[Dialog, int]], request: GenerationRequest, slots: int
) -> Iterator[list[FinishedPrompt]]:
    """Generates for (dialog, draw number) pairs, and joins the responses of each dialog's chunks.

    An invalid prompt raises its error after the responses to all prompts before it.
    """
    open_prompts: dict[int, chunked.ChunkedPrompt] = {}
    chunks_of: dict[int, dict[int, SlotResponse]] = {}
    errors: list[ValueError] = []

    def entries() -> Iterator[SlotEntry]:
        for number, (dialog, draw) in enumerate(prompts):
            try:
                prompt = _read_dialog(engine, dialog, number, request)
                text = _draft_text(request.drafting, prompt, number)
            except ValueError as error:
                errors.append(error)
                return
            open_prompts[number] = prompt
            for n, example in enumerate(prompt.rows):
                yield SlotEntry(number, n, example, chunked.draw_number(draw, n), text)

    for ended in run_slots(engine, entries(), request, slots):
        finished = []
        for entry, response in ended:
            own = chunks_of.setdefault(entry.prompt, {})
            own[entry.chunk] = response
            if len(own) == len(open_prompts[entry.prompt].rows):
                chunks = [own[n] for n in range(len(own))]
                del chunks_of[entry.prompt]
                prompt, stops = open_prompts.pop(entry.prompt), request.decoding.stop_ids
                joined = prompt.join([chunk.ids for chunk in chunks], engine.tokenizer, stops)
                ids = np.asarray(joined, np.int32)
                finished.append(FinishedPrompt.of(entry.prompt, ids, chunks))
        if finished:
            yield finished
    if errors:
        raise errors[0]


def _read_dialog(
    engine: Engine, dialog: Dialog, number: int, request: GenerationRequest
) -> chunked.ChunkedPrompt:
    """Tokenizes a dialog and splits its long audio into chunks.

    Raises ValueError, naming the number of the prompt, if the dialog is invalid.
    """
    name = f"prompt {number}"
    try:
        (example,), _ = generate.prepare_prompts(
            engine,
            generate.PromptInputs([dialog]),
            number,
            enable_thinking=request.enable_thinking,
        )
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {error}") from error
    if not example.audio and reads_prompt(request.decoding.processors):
        raise ValueError(
            f"{name} has no audio: generate_each does not support repetition_penalty, "
            "no_repeat_ngram_size, bad_words_ids and sequence_bias for it; use generate"
        )
    return chunked.split_long_audio(example, request.max_audio_s, engine.sampling_rate)


def _draft_text(
    drafting: DraftRequest | None, prompt: chunked.ChunkedPrompt, number: int
) -> str | None:
    """The draft that the caller gave for a prompt. Raises ValueError where there is none."""
    if drafting is None or drafting.texts is None:
        return None
    if prompt.chunks:
        raise ValueError(f"prompt {number}: {generate.TEXTS_OF_CHUNKS}")
    if number >= len(drafting.texts):
        raise ValueError(f"prompt {number}: drafts has {len(drafting.texts)} texts; give one each")
    return drafting.texts[number]


def run_slots(
    engine: Engine, entries: Iterator[SlotEntry], request: GenerationRequest, count: int
) -> Iterator[list[tuple[SlotEntry, SlotResponse]]]:
    """Generates for `entries` on `count` slots. Yields the entries that have ended, in groups."""
    request = with_drafter(engine, request)
    table = SlotTable(engine, request, count)
    groups = map(
        partial(_completed, engine, request.drafting),
        iter(lambda: list(itertools.islice(entries, table.admitted)), []),
    )
    group = next(groups, None)
    while group is not None or table.busy:
        while group is not None and table.can_admit(group):
            table.admit(group)
            group = next(groups, None)
        ready = group is not None and table.fits(group)
        yield table.run(len(group) if group is not None and ready else table.count)


def _completed(
    engine: Engine, drafting: DraftRequest | None, group: Sequence[SlotEntry]
) -> list[SlotEntry]:
    """The entries of a group with drafts, and with transcripts if the model reads them."""
    examples = [entry.example for entry in group]
    drafts: list[list[int]] = [[] for _ in group]
    if drafting is not None and drafting.model is None:
        texts = [entry.draft_text or "" for entry in group]
        drafts = draft_tokens(engine, examples, drafting, texts)
    found = zip(group, with_transcripts(engine, examples), drafts, strict=True)
    return [entry._replace(example=example, draft=draft) for entry, example, draft in found]
