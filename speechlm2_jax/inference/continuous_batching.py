"""Answering a stream of prompts on a fixed number of slots: what ends makes room at once.

Beside the encoder, one program per shape of new prompts (two sizes per doubling) and one that
chooses tokens: nothing is compiled again as rows come and go.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax import sharding
from speechlm2_jax.batches import BatchShape, SalmBatch, SalmExample, assemble_salm_batch
from speechlm2_jax.generation import slots as loop
from speechlm2_jax.generation.decoding import DecodingConfig
from speechlm2_jax.generation.processors import reads_prompt
from speechlm2_jax.generation.slots import Slots
from speechlm2_jax.inference import generate
from speechlm2_jax.inference.long_form import chunked
from speechlm2_jax.inference.padding import answer_shape, round_up
from speechlm2_jax.inference.request.generation_request import GenerationRequest, read_request
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.networks.salm import Salm

if TYPE_CHECKING:
    from speechlm2_jax.models.salm import SALM

GROUPS = 4
"""New prompts come in groups of this share of the slots: together they are encoded well, and
little room waits for them."""


class FinishedPrompt(NamedTuple):
    """A prompt and what was said."""

    number: int
    """Of the prompt, from 0."""
    ids: np.ndarray
    """Int32, up to the end of the answer."""


class SlotEntry(NamedTuple):
    """What takes one slot: a prompt, or one chunk of it."""

    prompt: int
    chunk: int
    example: SalmExample
    draw: int
    """The number by which random draws go."""


def why_unsupported(request: GenerationRequest) -> str | None:
    """Why a request cannot be answered on slots, if it cannot."""
    reasons = {
        "num_beams: beam search": request.decoding.beams is not None,
        "num_return_sequences: several answers": request.decoding.answers > 1,
        "stop_strings": bool(request.stop_strings),
        "max_time": request.max_time_s is not None,
        "should_stop": request.should_stop is not None,
        "return_dict_in_generate": request.returns_dict,
        "max_length (use max_new_tokens)": request.max_length is not None,
    }
    return next((why for why, is_asked in reasons.items() if is_asked), None)


def generate_each(
    model: "SALM",
    graphdef: Any,
    prompts: Iterable[Any],
    count: int,
    generation_config: Any,
    overrides: Mapping[str, Any],
    draw_numbers: Iterable[int] | None = None,
) -> Iterator[list[FinishedPrompt]]:
    """Answers dialogs as they come; see SALM.generate_each."""
    request = read_request(model, generation_config, overrides)
    why = why_unsupported(request)
    if why is not None:
        raise ValueError(f"{why}: not on slots, where rows come and go; use generate")
    if count < 1:
        raise ValueError(f"slots={count} must be at least 1")
    if sharding.mesh_of(model.variables) is not None:
        raise ValueError("the weights lie on a mesh, and slots are of one device; use generate")
    numbers = itertools.count() if draw_numbers is None else draw_numbers
    return _whole(model, graphdef, zip(prompts, numbers, strict=False), request, count)


def _whole(
    model: "SALM",
    graphdef: Any,
    prompts: Iterable[tuple[Any, int]],
    request: GenerationRequest,
    count: int,
) -> Iterator[list[FinishedPrompt]]:
    """Takes prompts, with the numbers of their draws, apart into rows and joins their answers.

    A prompt that cannot be used raises its error after the answers to those before it.
    """
    open_parts: dict[int, chunked.ChunkedPrompt] = {}
    said: dict[int, dict[int, np.ndarray]] = {}
    wrong: list[ValueError] = []

    def rows() -> Iterator[SlotEntry]:
        for number, (dialog, draw) in enumerate(prompts):
            try:
                parts = _parts(model, dialog, number, request)
            except ValueError as error:
                wrong.append(error)
                return
            open_parts[number] = parts
            for n, row in enumerate(parts.rows):
                yield SlotEntry(number, n, row, chunked.row_number(draw, n))

    for ended in run_slots(model, graphdef, rows(), request, count):
        whole = []
        for row, ids in ended:
            own = said.setdefault(row.prompt, {})
            own[row.chunk] = ids
            if len(own) == len(open_parts[row.prompt].rows):
                del said[row.prompt]
                parts = open_parts.pop(row.prompt)
                answers = [own[n] for n in range(len(own))]
                joined = parts.join(answers, model.tokenizer, request.decoding.stop_ids)
                whole.append(FinishedPrompt(row.prompt, np.asarray(joined, np.int32)))
        if whole:
            yield whole
    if wrong:
        raise wrong[0]


def _parts(
    model: "SALM", dialog: Any, number: int, request: GenerationRequest
) -> chunked.ChunkedPrompt:
    """The rows of a dialog. Raises ValueError where it cannot be used, naming its number."""
    name = f"prompt {number}"
    try:
        (example,), _ = generate.prepare_prompts(
            model, ([dialog], None, None), number, enable_thinking=request.enable_thinking
        )
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {error}") from error
    if not example.audio and reads_prompt(request.decoding.processors):
        raise ValueError(
            f"{name} is of text alone, whose ids repetition_penalty, "
            "no_repeat_ngram_size, bad_words_ids and sequence_bias look at: not on slots; use "
            "generate"
        )
    return chunked.in_parts(example, request.max_audio_s, model.sampling_rate)


def run_slots(
    model: "SALM", graphdef: Any, rows: Iterator[SlotEntry], request: GenerationRequest, count: int
) -> Iterator[list[tuple[SlotEntry, np.ndarray]]]:
    """Answers rows on `count` slots; yields those that have ended, time and again."""
    table = _Table(model, graphdef, request, count)
    size = -(-count // GROUPS)
    groups = iter(lambda: list(itertools.islice(rows, size)), [])
    group = next(groups, None)
    while group is not None or table.busy:
        while group is not None and table.takes(group):
            table.admit(group)
            group = next(groups, None)
        ready = group is not None and table.fits(group)
        yield table.run(len(group) if group is not None and ready else count)


class _New(NamedTuple):
    """A group of B new rows on the device."""

    batch: SalmBatch
    embeds: Float[Array, "B T D"]
    limits: Any
    """Int32 [1, B]."""
    at: Any
    """Int32 [B], the slot of each; a row that fills the group has one beyond the last."""
    key: Key[Array, ""] | None


class _Table:
    """The slots on the device, and who sits where."""

    def __init__(
        self, model: "SALM", graphdef: Any, request: GenerationRequest, count: int
    ) -> None:
        self.busy: dict[int, SlotEntry] = {}
        self._model, self._graphdef, self._count = model, graphdef, count
        self._size = -(-count // GROUPS)
        self._limit = int(request.limits(np.zeros(1, np.int32))[0])
        self._decoding = request.fitting(np.array([self._limit]))
        self._key = jax.random.key(request.seed) if request.decoding.do_sample else None
        self._slots: Slots | None = None
        self._steps = 0
        """Of the longest prompt that the slots hold."""

    def fits(self, group: Sequence[SlotEntry]) -> bool:
        """Whether the slots have room for such long prompts."""
        return self._shape(group).tokens <= self._steps

    def takes(self, group: Sequence[SlotEntry]) -> bool:
        """Whether there are free slots for a group; for longer prompts all are made anew."""
        if not self.fits(group):
            return not self.busy
        return len(group) <= self._count - len(self.busy)

    def admit(self, group: Sequence[SlotEntry]) -> None:
        """Runs new prompts in free slots."""
        shape = self._shape(group)
        programs = (self._graphdef, self._model.variables)
        if shape.tokens > self._steps:
            self._steps = shape.tokens
            self._slots = _empty(*programs, self._decoding, self._count, self._steps)
        free = [slot for slot in range(self._count) if slot not in self.busy][: len(group)]
        self.busy |= dict(zip(free, group, strict=True))
        at = np.full(self._size, self._count, np.int32)
        at[: len(group)] = free
        batch = self._laid_out(group, shape)
        new = _New(
            batch=batch,
            embeds=generate.encode(*programs, batch),
            limits=np.full((1, self._size), self._limit, np.int32),
            at=at,
            key=self._key,
        )
        self._slots = _admit(*programs, self._slots, new, self._decoding)

    def run(self, enough: int) -> list[tuple[SlotEntry, np.ndarray]]:
        """Goes on until so many slots have ended; gives the answers that are complete."""
        programs = (self._graphdef, self._model.variables)
        self._slots, said = _run(*programs, self._slots, np.int32(enough), self._decoding)
        ids, lengths, ended = jax.device_get(said)
        slots = [slot for slot in self.busy if ended[slot]]
        return [(self.busy.pop(slot), ids[slot, : lengths[slot]]) for slot in slots]

    def _shape(self, group: Sequence[SlotEntry]) -> BatchShape:
        """The static shape of a group, that of a full one."""
        shape = answer_shape([[row.example for row in group]], self._model.frame_count)
        each = max(len(row.example.audio) for row in group)
        return replace(shape, rows=self._size, clips=round_up(each, 1) * self._size if each else 0)

    def _laid_out(self, group: Sequence[SlotEntry], shape: BatchShape) -> SalmBatch:
        batch = assemble_salm_batch(
            [[row.example for row in group]],
            shape,
            frame_count=self._model.frame_count,
            placeholder_id=self._model.audio_locator_tag_id,
            shift=False,
        )
        if self._model.nemo_exact:
            batch = batch.without_id(self._model.text_pad_id)
        row_ids = np.zeros((1, self._size), np.int32)
        row_ids[0, : len(group)] = [row.draw for row in group]
        return replace(batch, row_ids=row_ids)


@partial(jax.jit, static_argnames=("graphdef", "count", "steps"))
def _empty(
    graphdef: Any, variables: Variables, decoding: DecodingConfig, count: int, steps: int
) -> Slots:
    network: Salm = merge(graphdef, variables)
    return loop.empty(network.llm, count, steps, decoding, network.dtype)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames="slots")
def _admit(
    graphdef: Any,
    variables: Variables,
    slots: Slots | None,
    new: _New,
    decoding: DecodingConfig,
) -> Slots:
    """Runs prompts, chooses their first tokens, and puts them into their slots."""
    assert slots is not None
    asked = (new.embeds, new.batch, new.limits, new.key)
    return loop.admit(slots, generate.prefill(graphdef, variables, *asked, decoding), new.at)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames="slots")
def _run(
    graphdef: Any,
    variables: Variables,
    slots: Slots | None,
    enough: Int[Array, ""],
    decoding: DecodingConfig,
) -> tuple[Slots, tuple[Array, Array, Array]]:
    """Chooses tokens until `enough` slots have ended: the state, and what the host reads of it."""
    assert slots is not None
    network: Salm = merge(graphdef, variables)
    slots = loop.run(network.llm, slots, decoding, enough)
    return slots, (slots.ids, slots.lengths, slots.ended)
