"""The slots of continuous batching on the devices: what is in each, and the programs that run them.

On a mesh every data-parallel device has slots of its own: a group. A prompt is encoded, prefilled
and decoded on the devices of its group.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax import sharding
from speechlm2_jax.batches import BatchShape, SalmBatch, SalmExample, assemble_salm_batch
from speechlm2_jax.generation import slots as loop
from speechlm2_jax.generation.decoding import DecodingConfig
from speechlm2_jax.generation.draft_llm import DraftPrompts, LlmDrafter
from speechlm2_jax.generation.drafts import DraftText
from speechlm2_jax.generation.slots import Slots
from speechlm2_jax.inference import generate
from speechlm2_jax.inference.draft_models import DraftModel
from speechlm2_jax.inference.drafts import DRAFT_UNIT, padded_drafts
from speechlm2_jax.inference.encode import encode
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.padding import prompt_shape, round_up
from speechlm2_jax.inference.request.generation_request import GenerationRequest
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.layers.unstacked import Layered, merge_layers
from speechlm2_jax.networks.salm import Salm
from speechlm2_jax.sharding import Sharding

ADMISSION_SHARE = 4
"""New prompts are admitted in groups of 1/4 of the slots. Larger groups are encoded more
efficiently. Smaller groups leave fewer slots idle until enough of them are free for a group."""


class SlotEntry(NamedTuple):
    """What occupies one slot: a prompt, or one chunk of a prompt with long audio."""

    prompt: int
    chunk: int
    example: SalmExample
    draw: int
    """The number that seeds its random draws."""
    draft_text: str | None = None
    """The caller's draft, if it gave one."""
    draft: Sequence[int] = ()
    """Token ids of the draft."""


class SlotResponse(NamedTuple):
    """The response to an entry."""

    ids: Int[np.ndarray, " T"]
    drafted: int = 0
    """Draft tokens that were checked."""
    accepted: int = 0
    """Draft tokens that are part of the response."""


class _Admission(NamedTuple):
    """New prompts on the devices: up to P for each of G data-parallel devices, B = G x P in all."""

    batch: SalmBatch
    embeds: Float[Array, "B T D"]
    own: generate.OwnOptions
    at: Int[Array, "G P"] | Int[np.ndarray, "G P"]
    """The slot of each prompt on its device. Padding has an index beyond the last slot."""


class SlotTable:
    """The slots on the devices, and which entry occupies which slot (`busy`).

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
        self._request = request
        self._slots: Slots | None = None
        self._room = loop.SlotShape(self.count, 0, 0)
        """The longest prompt that fits into the KV cache of a slot, and the longest draft."""

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
        needed = self._needed([group])
        has_room = needed.prompt_tokens <= self._room.prompt_tokens
        return has_room and needed.draft_tokens <= self._room.draft_tokens

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
        network, placement = self._engine.network, self._engine.placement
        if not self.fits(group):
            self._room = loop.SlotShape(*map(max, self._room, self._needed(entries)))
            self._slots = _empty(*network, self._decoding, self._room, placement)
        at = np.full((self._devices, self._new), self._own, np.int32)
        for device, own in enumerate(slots):
            at[device, : len(own)] = [slot for _, slot in own]
            self.busy |= {device * self._own + slot: group[n] for n, slot in own}
        batch, at = self._batch(entries), jnp.asarray(at)
        if placement is not None:
            batch, at = placement.put_batch((batch, at))
        limits = np.full(at.shape, self._limit, np.int32)
        new = _Admission(
            batch=batch,
            embeds=encode(*network, batch, placement),
            own=generate.OwnOptions(limits, self._key, self._drafts(entries)),
            at=at,
        )
        self._slots = _admit(*network, self._slots, new, self._decoding, placement)

    def run(self, enough: int) -> list[tuple[SlotEntry, SlotResponse]]:
        """Decodes until `enough` slots have ended; returns their entries and responses."""
        config = (self._decoding, self._engine.placement)
        network = self._engine.decoding_network
        self._slots, on_device = _run(*network, self._slots, np.int32(enough), *config)
        output: loop.SlotOutput = jax.device_get(on_device)
        ended = [slot for slot in self.busy if output.ended[slot]]
        return [(self.busy.pop(slot), _response(output, slot)) for slot in ended]

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

    def _needed(self, groups: Sequence[Sequence[SlotEntry]]) -> loop.SlotShape:
        """The room that a group takes."""
        prompts, drafting = self._shape(groups).tokens, self._request.drafting
        if drafting is None:  # prompt lookup copies from the prompts
            return loop.SlotShape(self.count, prompts, prompts)
        if drafting.model is None:
            # more tokens than a response may have are of no use as its draft
            return loop.SlotShape(self.count, prompts, round_up(self._limit, DRAFT_UNIT))
        return loop.SlotShape(self.count, prompts, self._shape(groups, drafting.model).tokens)

    def _shape(
        self, groups: Sequence[Sequence[SlotEntry]], reader: DraftModel | None = None
    ) -> BatchShape:
        """The static shape of one device's prompts, with padding up to their full number.

        They are those of the model itself, or of a draft LLM.
        """
        engine = self._engine
        examples = [[entry.example for entry in group] for group in groups]
        if reader is not None:
            shape = reader.shape(engine, examples)
        else:
            shape = prompt_shape(examples, engine.frame_count)
        clips = max((len(e.audio) for group in examples for e in group), default=0)
        clips = round_up(clips, 1) * self._new if shape.clips else 0
        return replace(shape, sequences=self._new, clips=clips)

    def _drafts(self, groups: Sequence[Sequence[SlotEntry]]) -> DraftText | DraftPrompts | None:
        """What the drafter reads of new prompts."""
        drafting, placement = self._request.drafting, self._engine.placement
        if drafting is None:
            return None
        if drafting.model is not None:
            drafter, examples = self._decoding.drafter, [[e.example for e in g] for g in groups]
            assert isinstance(drafter, LlmDrafter)
            shape = self._shape(groups, drafting.model)
            return drafting.model.prompts(self._engine, drafter, examples, shape)
        drafts = [[entry.draft for entry in group] for group in groups]
        text = padded_drafts(drafts, (self._devices, self._new, self._room.draft_tokens))
        return text if placement is None else placement.put_batch(text)

    def _batch(self, groups: Sequence[Sequence[SlotEntry]]) -> SalmBatch[np.ndarray]:
        batch = assemble_salm_batch(
            [[entry.example for entry in group] for group in groups],
            self._shape(groups),
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


def _response(output: loop.SlotOutput, slot: int) -> SlotResponse:
    ids = np.asarray(output.ids[slot, : output.lengths[slot]])
    if output.drafted is None or output.accepted is None:
        return SlotResponse(ids)
    return SlotResponse(ids, int(output.drafted[slot]), int(output.accepted[slot]))


@partial(jax.jit, static_argnames=("graphdef", "size", "placement"))
def _empty(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    decoding: DecodingConfig,
    size: loop.SlotShape,
    placement: Sharding | None,
) -> Slots:
    """Makes free slots."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        return loop.constrained(loop.empty(network.llm, size, decoding, network.dtype))


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
    inputs = (new.embeds, new.batch, new.own)
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
) -> tuple[Slots, loop.SlotOutput]:
    """Decodes until `enough` slots have ended.

    Returns the new slots and, for the host, their tokens whole on every device.
    """
    assert slots is not None
    network: Salm = merge_layers(graphdef, variables)
    with sharding.use(placement):
        slots = loop.constrained(loop.decode(network.llm, slots, decoding, enough))
        outputs = loop.read(slots)
        return slots, jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), outputs)
