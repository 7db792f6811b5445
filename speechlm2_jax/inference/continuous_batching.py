"""Continuous batching: a stream of prompts on a fixed number of slots.

A sequence that ends frees its slot for the next prompt. Three kinds of programs are compiled: the
encoder and the prefill, both once per shape of new prompts, and one program that decodes. Prompt
lengths are rounded up to 1.0x or 1.5x a power of two, so there are few shapes.

On a mesh every data-parallel device has slots of its own: a group. A prompt is encoded, prefilled
and decoded on the devices of its group.
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

from speechlm2_jax import sharding
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
from speechlm2_jax.sharding import Sharding

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
        "assistant_model, drafts and prompt_lookup_num_tokens": request.is_speculative,
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
    groups = map(
        partial(_completed, engine),
        iter(lambda: list(itertools.islice(entries, table.admitted)), []),
    )
    group = next(groups, None)
    while group is not None or table.busy:
        while group is not None and table.can_admit(group):
            table.admit(group)
            group = next(groups, None)
        ready = group is not None and table.fits(group)
        yield table.run(len(group) if group is not None and ready else table.count)


def _completed(engine: Engine, group: Sequence[SlotEntry]) -> list[SlotEntry]:
    """The entries of a group, with the transcripts of their clips if the model reads them."""
    examples = with_transcripts(engine, [entry.example for entry in group])
    return [entry._replace(example=e) for entry, e in zip(group, examples, strict=True)]


class _Admission(NamedTuple):
    """New prompts on the devices: up to P for each of G data-parallel devices, B = G x P in all."""

    batch: SalmBatch
    embeds: Float[Array, "B T D"]
    limits: Int[Array, "G P"] | Int[np.ndarray, "G P"]
    at: Int[Array, "G P"] | Int[np.ndarray, "G P"]
    """The slot of each prompt on its device. Padding has an index beyond the last slot."""
    key: Key[Array, ""] | None


class _SlotTable:
    """The slots on the devices, and which entry occupies which slot.

    Slots are numbered device by device. Every data-parallel device has as many.
    """

    def __init__(self, engine: Engine, request: GenerationRequest, count: int) -> None:
        self.busy: dict[int, SlotEntry] = {}
        self._engine, placement = engine, engine.placement
        self._devices = 1 if placement is None else placement.data_parallel_size
        self._own = -(-count // self._devices)
        """Slots of each data-parallel device."""
        self._new = -(-self._own // ADMISSION_SHARE)
        """Prompts that each of them admits at once."""
        self._limit = int(request.limits(np.zeros(1, np.int32))[0])
        self._decoding = request.fitting(np.array([self._limit]))
        self._key = jax.random.key(request.seed) if request.decoding.do_sample else None
        self._slots: Slots | None = None
        self._prompt_tokens = 0
        """Tokens of the longest prompt that fits into the KV cache of a slot."""

    @property
    def count(self) -> int:
        """All slots."""
        return self._own * self._devices

    @property
    def admitted(self) -> int:
        """The largest number of prompts that are admitted at once."""
        return self._new * self._devices

    def fits(self, group: Sequence[SlotEntry]) -> bool:
        """Whether the KV cache has room for the longest prompt of a group."""
        return self._shape([group]).tokens <= self._prompt_tokens

    def can_admit(self, group: Sequence[SlotEntry]) -> bool:
        """Whether a group can start now.

        A group needs enough free slots. A prompt that does not fit into the KV cache waits until
        all slots are free, because the cache is then made anew.
        """
        if not self.fits(group):
            return not self.busy
        return len(group) <= sum(min(len(free), self._new) for free in self._free())

    def admit(self, group: Sequence[SlotEntry]) -> None:
        """Prefills new prompts and puts them into free slots."""
        slots = self._chosen(len(group))
        entries = [[group[n] for n, _ in own] for own in slots]
        shape = self._shape(entries)
        graphdef, variables = network = self._engine.network
        placement = self._engine.placement
        if shape.tokens > self._prompt_tokens:
            self._prompt_tokens = shape.tokens
            sizes = (self.count, self._prompt_tokens, placement)
            self._slots = _empty(graphdef, variables, self._decoding, *sizes)
        at = np.full((self._devices, self._new), self._own, np.int32)
        for device, own in enumerate(slots):
            at[device, : len(own)] = [slot for _, slot in own]
            self.busy |= {device * self._own + slot: group[n] for n, slot in own}
        batch, at = self._batch(entries, shape), jnp.asarray(at)
        if placement is not None:
            batch, at = placement.put_batch((batch, at))
        new = _Admission(
            batch=batch,
            embeds=generate.encode(*network, batch, placement),
            limits=np.full(at.shape, self._limit, np.int32),
            at=at,
            key=self._key,
        )
        self._slots = _admit(*network, self._slots, new, self._decoding, placement)

    def run(self, enough: int) -> list[tuple[SlotEntry, np.ndarray]]:
        """Decodes until `enough` slots have ended; returns their entries and ids."""
        config = (self._decoding, self._engine.placement)
        network = self._engine.decoding_network
        self._slots, outputs = _run(*network, self._slots, np.int32(enough), *config)
        ids, lengths, ended = jax.device_get(outputs)
        slots = [slot for slot in self.busy if ended[slot]]
        return [(self.busy.pop(slot), ids[slot, : lengths[slot]]) for slot in slots]

    def _free(self) -> list[list[int]]:
        """The free slots of each device, counted on this device."""
        own = range(self._own)
        return [
            [s for s in own if d * self._own + s not in self.busy] for d in range(self._devices)
        ]

    def _chosen(self, count: int) -> list[list[tuple[int, int]]]:
        """(prompt, free slot) pairs of each device; the device with most free slots takes first."""
        free = [slots[: self._new] for slots in self._free()]
        chosen: list[list[tuple[int, int]]] = [[] for _ in free]
        for number in range(count):
            device = max(range(len(free)), key=lambda d: len(free[d]))
            chosen[device].append((number, free[device].pop(0)))
        return chosen

    def _shape(self, groups: Sequence[Sequence[SlotEntry]]) -> BatchShape:
        """The static shape of one device's prompts, with padding up to their full number."""
        examples = [[entry.example for entry in group] for group in groups]
        shape = prompt_shape(examples, self._engine.frame_count)
        clips = max((len(e.audio) for group in examples for e in group), default=0)
        clips = round_up(clips, 1) * self._new if clips else 0
        return replace(shape, sequences=self._new, clips=clips)

    def _batch(
        self, groups: Sequence[Sequence[SlotEntry]], shape: BatchShape
    ) -> SalmBatch[np.ndarray]:
        batch = assemble_salm_batch(
            [[entry.example for entry in group] for group in groups],
            shape,
            frame_count=self._engine.frame_count,
            placeholder_id=self._engine.audio_locator_tag_id,
            shift=False,
        )
        if self._engine.nemo_exact:
            batch = batch.without_id(self._engine.text_pad_id)
        sequence_ids = np.zeros((self._devices, self._new), np.int32)
        for device, group in enumerate(groups):
            sequence_ids[device, : len(group)] = [entry.draw for entry in group]
        return replace(batch, sequence_ids=sequence_ids)


@partial(jax.jit, static_argnames=("graphdef", "count", "prompt_tokens", "placement"))
def _empty(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    decoding: DecodingConfig,
    count: int,
    prompt_tokens: int,
    placement: Sharding | None,
) -> Slots:
    """Makes free slots with room for prompts of `prompt_tokens` tokens."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        slots = loop.empty(network.llm, count, prompt_tokens, decoding, network.dtype)
        return loop.constrained(slots)


@partial(jax.jit, static_argnames=("graphdef", "placement"), donate_argnames="slots")
def _admit(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    slots: Slots | None,
    new: _Admission,
    decoding: DecodingConfig,
    placement: Sharding | None,
) -> Slots:
    """Prefills prompts, chooses their first tokens, and puts them into their slots."""
    assert slots is not None
    own = generate.OwnOptions(new.limits, new.key)
    inputs = (new.embeds, new.batch, own)
    prefilled = generate.prefill(graphdef, variables, *inputs, decoding, placement)
    with sharding.use(placement):
        return loop.constrained(loop.admit(slots, prefilled, jnp.asarray(new.at)))


@partial(jax.jit, static_argnames=("graphdef", "placement"), donate_argnames="slots")
def _run(
    graphdef: nnx.GraphDef[Salm],
    variables: Layered,
    slots: Slots | None,
    enough: Int[Array, ""],
    decoding: DecodingConfig,
    placement: Sharding | None,
) -> tuple[Slots, tuple[Array, Array, Array]]:
    """Decodes until `enough` slots have ended.

    Returns the new slots and, for the host, (ids, lengths, ended) whole on every device.
    """
    assert slots is not None
    network: Salm = merge_layers(graphdef, variables)
    with sharding.use(placement):
        slots = loop.constrained(loop.decode(network.llm, slots, decoding, enough))
        outputs = (slots.ids, slots.lengths, slots.ended)
        return slots, jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), outputs)
