"""Continuous batching: a stream of prompts on a fixed number of slots.

A sequence that ends frees its slot for the next prompt. Three kinds of programs are compiled: the
encoder and the prefill, both once per shape of new prompts, and one program that decodes. Prompt
lengths are rounded up to 1.0x or 1.5x a power of two, so there are few shapes.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.batches import BatchShape, SalmBatch, SalmExample, assemble_salm_batch
from speechlm2_jax.generation import slots as loop
from speechlm2_jax.generation.decoding import DecodingConfig
from speechlm2_jax.generation.processors import reads_prompt
from speechlm2_jax.generation.slots import Slots
from speechlm2_jax.inference import generate
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.long_form import chunked
from speechlm2_jax.inference.padding import prompt_shape, round_up
from speechlm2_jax.inference.prompts import Dialog
from speechlm2_jax.inference.request.generation_request import GenerationRequest
from speechlm2_jax.inference.transcripts import with_transcripts
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.layers.unstacked import Layered, merge_layers
from speechlm2_jax.networks.salm import Salm

ADMISSION_SHARE = 4
"""New prompts are admitted in groups of 1/4 of the slots. Larger groups are encoded more
efficiently. Smaller groups leave fewer slots idle until enough of them are free for a group."""


class FinishedPrompt(NamedTuple):
    """A prompt and its response."""

    number: int
    """Number of the prompt in the stream, from 0."""
    ids: np.ndarray
    """Int32 token ids of the response, without padding."""


class SlotEntry(NamedTuple):
    """What occupies one slot: a prompt, or one chunk of a prompt with long audio."""

    prompt: int
    chunk: int
    example: SalmExample
    draw: int
    """The number that seeds its random draws."""


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
    if engine.placement is not None:
        raise ValueError(
            "generate_each supports one device, but the weights are on a mesh; use generate"
        )
    numbers = itertools.count() if draw_numbers is None else draw_numbers
    return _join_chunks(engine, zip(prompts, numbers, strict=False), request, slots)


def _join_chunks(
    engine: Engine, prompts: Iterable[tuple[Dialog, int]], request: GenerationRequest, slots: int
) -> Iterator[list[FinishedPrompt]]:
    """Generates for (dialog, draw number) pairs, and joins the responses of each dialog's chunks.

    An invalid prompt raises its error after the responses to all prompts before it.
    """
    open_prompts: dict[int, chunked.ChunkedPrompt] = {}
    ids_of_chunks: dict[int, dict[int, np.ndarray]] = {}
    errors: list[ValueError] = []

    def entries() -> Iterator[SlotEntry]:
        for number, (dialog, draw) in enumerate(prompts):
            try:
                prompt = _read_dialog(engine, dialog, number, request)
            except ValueError as error:
                errors.append(error)
                return
            open_prompts[number] = prompt
            for n, example in enumerate(prompt.rows):
                yield SlotEntry(number, n, example, chunked.draw_number(draw, n))

    for ended in run_slots(engine, entries(), request, slots):
        finished = []
        for entry, ids in ended:
            own = ids_of_chunks.setdefault(entry.prompt, {})
            own[entry.chunk] = ids
            if len(own) == len(open_prompts[entry.prompt].rows):
                del ids_of_chunks[entry.prompt]
                prompt = open_prompts.pop(entry.prompt)
                responses = [own[n] for n in range(len(own))]
                joined = prompt.join(responses, engine.tokenizer, request.decoding.stop_ids)
                finished.append(FinishedPrompt(entry.prompt, np.asarray(joined, np.int32)))
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


def run_slots(
    engine: Engine, entries: Iterator[SlotEntry], request: GenerationRequest, count: int
) -> Iterator[list[tuple[SlotEntry, np.ndarray]]]:
    """Generates for `entries` on `count` slots. Yields the entries that have ended, in groups."""
    table = _SlotTable(engine, request, count)
    size = -(-count // ADMISSION_SHARE)
    groups = map(
        partial(_completed, engine), iter(lambda: list(itertools.islice(entries, size)), [])
    )
    group = next(groups, None)
    while group is not None or table.busy:
        while group is not None and table.can_admit(group):
            table.admit(group)
            group = next(groups, None)
        ready = group is not None and table.fits(group)
        yield table.run(len(group) if group is not None and ready else count)


def _completed(engine: Engine, group: Sequence[SlotEntry]) -> list[SlotEntry]:
    """The entries of a group, with the transcripts of their clips if the model reads them."""
    examples = with_transcripts(engine, [entry.example for entry in group])
    return [entry._replace(example=e) for entry, e in zip(group, examples, strict=True)]


class _Admission(NamedTuple):
    """A group of B prompts to admit, on the device."""

    batch: SalmBatch
    embeds: Float[Array, "B T D"]
    limits: Int[Array, "1 B"] | Int[np.ndarray, "1 B"]
    at: Int[Array, " B"] | Int[np.ndarray, " B"]
    """The slot of each prompt. Padding of the group has an index beyond the last slot."""
    key: Key[Array, ""] | None


class _SlotTable:
    """The slots on the device, and which entry occupies which slot."""

    def __init__(self, engine: Engine, request: GenerationRequest, count: int) -> None:
        self.busy: dict[int, SlotEntry] = {}
        self._engine, self._count = engine, count
        self._size = -(-count // ADMISSION_SHARE)
        self._limit = int(request.limits(np.zeros(1, np.int32))[0])
        self._decoding = request.fitting(np.array([self._limit]))
        self._key = jax.random.key(request.seed) if request.decoding.do_sample else None
        self._slots: Slots | None = None
        self._prompt_tokens = 0
        """Tokens of the longest prompt that fits into the KV cache of a slot."""

    def fits(self, group: Sequence[SlotEntry]) -> bool:
        """Whether the KV cache has room for the longest prompt of a group."""
        return self._shape(group).tokens <= self._prompt_tokens

    def can_admit(self, group: Sequence[SlotEntry]) -> bool:
        """Whether a group can start now.

        A group needs enough free slots. A prompt that does not fit into the KV cache waits until
        all slots are free, because the cache is then made anew.
        """
        if not self.fits(group):
            return not self.busy
        return len(group) <= self._count - len(self.busy)

    def admit(self, group: Sequence[SlotEntry]) -> None:
        """Prefills new prompts and puts them into free slots."""
        shape = self._shape(group)
        network = self._engine.network
        if shape.tokens > self._prompt_tokens:
            self._prompt_tokens = shape.tokens
            self._slots = _empty(*network, self._decoding, self._count, self._prompt_tokens)
        free = [slot for slot in range(self._count) if slot not in self.busy][: len(group)]
        self.busy |= dict(zip(free, group, strict=True))
        at = np.full(self._size, self._count, np.int32)
        at[: len(group)] = free
        batch = self._batch(group, shape)
        new = _Admission(
            batch=batch,
            embeds=generate.encode(*network, batch),
            limits=np.full((1, self._size), self._limit, np.int32),
            at=at,
            key=self._key,
        )
        self._slots = _admit(*network, self._slots, new, self._decoding)

    def run(self, enough: int) -> list[tuple[SlotEntry, np.ndarray]]:
        """Decodes until `enough` slots have ended; returns their entries and ids."""
        network = self._engine.decoding_network
        self._slots, outputs = _run(*network, self._slots, np.int32(enough), self._decoding)
        ids, lengths, ended = jax.device_get(outputs)
        slots = [slot for slot in self.busy if ended[slot]]
        return [(self.busy.pop(slot), ids[slot, : lengths[slot]]) for slot in slots]

    def _shape(self, group: Sequence[SlotEntry]) -> BatchShape:
        """The static shape of a group, with padding up to the full size of a group."""
        shape = prompt_shape([[entry.example for entry in group]], self._engine.frame_count)
        clips = max(len(entry.example.audio) for entry in group)
        clips = round_up(clips, 1) * self._size if clips else 0
        return replace(shape, sequences=self._size, clips=clips)

    def _batch(self, group: Sequence[SlotEntry], shape: BatchShape) -> SalmBatch[np.ndarray]:
        batch = assemble_salm_batch(
            [[entry.example for entry in group]],
            shape,
            frame_count=self._engine.frame_count,
            placeholder_id=self._engine.audio_locator_tag_id,
            shift=False,
        )
        if self._engine.nemo_exact:
            batch = batch.without_id(self._engine.text_pad_id)
        sequence_ids = np.zeros((1, self._size), np.int32)
        sequence_ids[0, : len(group)] = [entry.draw for entry in group]
        return replace(batch, sequence_ids=sequence_ids)


@partial(jax.jit, static_argnames=("graphdef", "count", "prompt_tokens"))
def _empty(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    decoding: DecodingConfig,
    count: int,
    prompt_tokens: int,
) -> Slots:
    """Makes free slots with room for prompts of `prompt_tokens` tokens."""
    network: Salm = merge(graphdef, variables)
    return loop.empty(network.llm, count, prompt_tokens, decoding, network.dtype)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames="slots")
def _admit(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    slots: Slots | None,
    new: _Admission,
    decoding: DecodingConfig,
) -> Slots:
    """Prefills prompts, chooses their first tokens, and puts them into their slots."""
    assert slots is not None
    inputs = (new.embeds, new.batch, new.limits, new.key)
    at = jnp.asarray(new.at)
    return loop.admit(slots, generate.prefill(graphdef, variables, *inputs, decoding), at)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames="slots")
def _run(
    graphdef: nnx.GraphDef[Salm],
    variables: Layered,
    slots: Slots | None,
    enough: Int[Array, ""],
    decoding: DecodingConfig,
) -> tuple[Slots, tuple[Array, Array, Array]]:
    """Decodes until `enough` slots have ended.

    Returns the new slots and, for the host, (ids, lengths, ended).
    """
    assert slots is not None
    network: Salm = merge_layers(graphdef, variables)
    slots = loop.decode(network.llm, slots, decoding, enough)
    return slots, (slots.ids, slots.lengths, slots.ended)
