"""The slots on the device, and the jobs that occupy them. One thread uses it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from speechlm2_jax.batches import layout_sequence
from speechlm2_jax.generation.decoding import DecodingConfig
from speechlm2_jax.generation.served_slots import (
    NewSequences,
    OwnSampling,
    PromptRows,
    ServedOutput,
    StagedPrompts,
)
from speechlm2_jax.generation.slots import SlotShape
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.request.generation_request import GenerationRequest, read_request
from speechlm2_jax.serving import programs
from speechlm2_jax.serving.jobs import Clip, Progress, Sampling, ServedJob
from speechlm2_jax.serving.shapes import ShapeTable, TooLongError
from speechlm2_jax.settings import SettingsError

Frames = jax.Array
"""[1, F, D]: the frames of one clip."""


@dataclass(kw_only=True)
class Prefill:
    """A job whose prompt is being run."""

    job: ServedJob
    slot: int
    rows: PromptRows
    length: int
    staged: StagedPrompts
    done: int = 0
    """Positions that have been run."""


@dataclass(kw_only=True)
class DeviceSlots:
    """The KV cache of a server, its programs, and which job occupies which slot."""

    engine: Engine
    table: ShapeTable
    busy: dict[int, ServedJob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        request = read_request(_Defaults(self.engine), {"do_sample": True, **NEUTRAL})
        _check_defaults(request, self.engine.generation_defaults)
        self._decoding: DecodingConfig[int] = request.fitting(np.array([self.table.new_tokens]))
        self._served = self._empty()

    def free_slot(self, taken: Sequence[int]) -> int | None:
        """The first slot that neither a job nor one of `taken` occupies; None if there is none."""
        used = {*self.busy, *taken}
        return next((n for n in range(self.table.slots) if n not in used), None)

    def positions(self, job: ServedJob) -> int:
        """Positions of a job's prompt. Raises TooLongError if no slot has room for it."""
        clips = [self.engine.frame_count(len(clip.samples)) for clip in job.clips]
        length = len(job.tokens) - len(job.clips) + sum(clips)
        if length > self.table.prompt_tokens:
            raise TooLongError(
                f"the prompt has {length} positions, audio frames included, and the server has "
                f"room for {self.table.prompt_tokens}; shorten it, or start the server with a "
                "larger --max-prompt-tokens"
            )
        for clip in job.clips:
            self.table.samples(len(clip.samples))
        return length

    def encode(self, clip: Clip) -> Frames:
        """Starts to encode a clip; returns at once, with frames that will be there later."""
        count = len(clip.samples)
        audio = np.zeros((1, self.table.samples(count)), np.float32)
        audio[0, :count] = clip.samples
        lengths = np.array([count], np.int32)
        return programs.encode_clip(*self.engine.network, audio, lengths, self.engine.placement)

    def begin(self, job: ServedJob, slot: int, frames: Sequence[Frames]) -> Prefill:
        """Puts the prompt of a job together, for `advance`."""
        counts = [self.engine.frame_count(len(clip.samples)) for clip in job.clips]
        placeholder = self.engine.audio_locator_tag_id
        layout = layout_sequence(job.tokens, None, counts, placeholder_id=placeholder)
        length, size = len(layout), self.table.prompt_tokens
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :length] = layout.tokens
        mask = np.arange(size)[None] < length
        if self.engine.nemo_exact:
            is_text = np.zeros((1, size), bool)
            is_text[0, :length] = layout.clip < 0
            mask = mask & ~(is_text & (tokens == self.engine.text_pad_id))
        placement = self.engine.placement
        embeds = programs.embed_text(*self.engine.network, tokens, placement)
        for number, (count, own) in enumerate(zip(counts, frames, strict=True)):
            if count:
                start = np.int32(np.argmax(layout.clip == number))
                embeds = programs.place_clip(embeds, own, np.int32(0), start, np.int32(count))
        rows = PromptRows(embeds, jnp.asarray(mask), jnp.asarray([length], jnp.int32))
        staged = programs.stage(*self.engine.network, placement, 1, size)
        return Prefill(job=job, slot=slot, rows=rows, length=length, staged=staged)

    def advance(self, prefill: Prefill) -> bool:
        """Runs the next positions of a prompt. Returns whether all have been run."""
        size = self.table.prefill_tokens
        prefill.staged = programs.extend_prompts(
            *self.engine.network,
            prefill.staged,
            prefill.rows,
            np.int32(prefill.done),
            self.engine.placement,
            tokens=size,
            is_first=prefill.done == 0,
        )
        prefill.done += size
        return prefill.done >= prefill.length

    def admit(self, prefill: Prefill) -> None:
        """Chooses the first token of a prompt that was run, and puts the job into its slot."""
        job = prefill.job
        new = NewSequences(
            at=jnp.asarray([[prefill.slot]], jnp.int32),
            limits=jnp.asarray([min(job.limit, self.table.new_tokens)], jnp.int32),
            rngs=_random_key(job.sampling),
            sampling=_own_sampling(job.sampling),
        )
        config = (self._decoding, self.engine.placement)
        self._served = programs.admit(
            *self.engine.network, self._served, prefill.staged, prefill.rows, new, *config
        )
        self.busy[prefill.slot] = job

    def decode(self, tokens: int) -> list[tuple[ServedJob, Progress]]:
        """Adds up to `tokens` tokens to each job; returns what all jobs have so far.

        Jobs that have ended or were cancelled leave their slots.
        """
        is_kept = np.zeros(self.table.slots, bool)
        is_kept[[slot for slot, job in self.busy.items() if not job.is_cancelled]] = True
        config = (self._decoding, self.engine.placement)
        self._served, on_device = programs.decode(
            *self.engine.decoding_network, self._served, is_kept, np.int32(tokens), *config
        )
        output: ServedOutput = jax.device_get(on_device)
        all_ids, all_logprobs = np.asarray(output.ids), np.asarray(output.logprobs)
        found = []
        for slot, job in list(self.busy.items()):
            count, is_last = int(output.lengths[slot]), bool(output.ended[slot])
            if is_last:
                del self.busy[slot]
            if not job.is_cancelled:
                ids, logprobs = all_ids[slot, :count], all_logprobs[slot, :count]
                found.append((job, Progress(ids.copy(), logprobs.copy(), is_last)))
        return found

    def reset(self) -> None:
        """Makes all slots free again after a fault. Raises what its allocation raises."""
        self.busy = {}
        del self._served  # the memory may not hold two KV caches
        self._served = self._empty()

    def compile(self, show: Callable[[str], None]) -> None:
        """Runs every program once, so that no request waits for a compilation.

        `show` gets the name of each before it is compiled.
        """
        frames: list[Frames] = []
        for size in self.table.clip_samples:
            show(f"encoder for clips of {size / self.engine.sampling_rate:g} s")
            frames.append(self.encode(Clip(samples=np.zeros(size, np.float32))))
        show(f"prefill of {self.table.prompt_tokens} positions")
        quiet = ServedJob(tokens=np.zeros(1, np.int32), limit=2, report=lambda progress: None)
        prefill = self.begin(quiet, 0, [])
        embeds = prefill.rows.embeds
        for own in frames:
            zero = np.int32(0)
            embeds = programs.place_clip(embeds, own, zero, zero, np.int32(own.shape[1]))
        prefill.rows = prefill.rows._replace(embeds=embeds)
        for _ in range(1 + (self.table.prompt_tokens > self.table.prefill_tokens)):
            self.advance(prefill)
        show(f"decoding on {self.table.slots} slots")
        self.admit(prefill)
        for _ in itertools.repeat(None, 2):
            self.decode(1)
        self.reset()

    def _empty(self) -> programs.ServedSlots:
        shape = SlotShape(self.table.slots, self.table.prompt_tokens)
        config = (self._decoding, self.engine.placement)
        made = programs.empty(*self.engine.network, *config, shape)
        # committed to its devices, as decoding returns it: else `admit` compiles a second time
        return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), made)


NEUTRAL: Mapping[str, object] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""Sampling settings without effect: those of each job come with it.

Others that the LLM's generation_config.json has, such as min_p, apply to all sampled jobs.
"""


def _check_defaults(request: GenerationRequest, file: Mapping[str, object]) -> None:
    """Raises SettingsError if the LLM's generation_config.json asks for what slots do not do."""
    asks = {
        "num_beams": request.decoding.beams is not None,
        "prompt_lookup_num_tokens": request.decoding.drafter is not None,
        "stop_strings": bool(request.stop_strings),
        "max_time": request.max_time_s is not None,
    }
    for key in (key for key, is_asked in asks.items() if is_asked):
        raise SettingsError(
            f"generation_config.json of the LLM: {key}={file[key]!r} is not supported by serve; "
            "take it out of the file"
        )


class _Defaults:
    """The model as `read_request` reads it."""

    def __init__(self, engine: Engine) -> None:
        self.text_eos_id, self.text_pad_id = engine.text_eos_id, engine.text_pad_id
        self.text_vocab_size, self.end_ids = engine.text_vocab_size, engine.end_ids
        self.generation_defaults = engine.generation_defaults


def _random_key(sampling: Sampling) -> Array:
    """The random key of one prompt: that of `SALM.generate` with this seed and draw number."""
    return _key_of(np.int32(sampling.seed), np.int32(sampling.draw))


@jax.jit
def _key_of(seed: Array, draw: Array) -> Array:
    """One program: operation by operation it takes as long as a decoding step of a small model."""
    return jax.random.fold_in(jax.random.key(seed), draw)[None]


def _own_sampling(sampling: Sampling) -> OwnSampling:
    return _row(
        np.bool_(sampling.do_sample),
        np.float32(sampling.temperature),
        np.float32(sampling.top_p),
        np.bool_(sampling.avoids_loops),
    )


@jax.jit
def _row(*values: Array) -> OwnSampling:
    return OwnSampling(*(value[None] for value in values))
