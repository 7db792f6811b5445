"""Prompts to token ids: fixed shapes and three jitted programs per shape.

`encode` turns audio and text into embeddings, `prefill` runs them through the LLM and chooses the
first token, `decode` chooses the others.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, Key

from speechlm2_jax import sharding
from speechlm2_jax.arrays import AnyArray, ArrayLike
from speechlm2_jax.batches import (
    SalmBatch,
    SalmExample,
    assemble_salm_batch,
)
from speechlm2_jax.generation import salm as loops
from speechlm2_jax.generation.decoding import DecodingConfig, Prompts
from speechlm2_jax.generation.draft_llm import DraftPrompts
from speechlm2_jax.generation.drafts import DraftText, LookupDrafter
from speechlm2_jax.generation.processors import reads_prompt
from speechlm2_jax.inference.drafts import prepared_drafts, with_drafter
from speechlm2_jax.inference.encode import encode
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.groups import split_evenly
from speechlm2_jax.inference.long_form import chunked
from speechlm2_jax.inference.padding import prompt_shape
from speechlm2_jax.inference.prompts import PromptContext, prompt_examples
from speechlm2_jax.inference.prompts import Prompts as PromptsLike
from speechlm2_jax.inference.request.generation_request import GenerationRequest
from speechlm2_jax.inference.text_stream import (
    PartialOutput,
    Piece,
    apply_stop_strings,
    last_output,
    stream_pieces,
)
from speechlm2_jax.inference.transcripts import with_transcripts
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.layers.unstacked import Layered, merge_layers
from speechlm2_jax.networks import salm as salm_network
from speechlm2_jax.networks.salm import Salm
from speechlm2_jax.sharding import Sharding

E = TypeVar("E")
TOKENS_BETWEEN_CHECKS = 16
"""Tokens per call of `decode` if a time limit, a stop string or `should_stop` may end generation.
Between two calls the host checks them."""
TEXTS_OF_CHUNKS = (
    "drafts: not supported with a recording longer than max_audio_s; use assistant_model, or raise "
    "max_audio_s"
)

log = logging.getLogger(__name__)


class PromptInputs(NamedTuple):
    """The prompts of one call, as `SALM.generate` takes them."""

    prompts: PromptsLike
    audios: ArrayLike | None = None
    audio_lens: ArrayLike | None = None


class OwnOptions(NamedTuple):
    """What each prompt of a batch has of its own: G data-parallel shards of R sequences."""

    limits: Int[Array, "G R"] | Int[np.ndarray, "G R"]
    """The largest number of new tokens."""
    key: Key[Array, ""] | None
    """From which the random keys of all prompts are derived, for sampling."""
    drafts: DraftText | DraftPrompts | None = None
    """[G, R, S] token ids and [G, R] lengths of draft texts; or what a draft LLM reads."""


@dataclass(frozen=True)
class Generated:
    """The result of `generate` with `return_dict_in_generate=True`, with transformers' names."""

    sequences: Int32[np.ndarray, "N T"]
    """Token ids. N is the number of prompts times `num_return_sequences`."""
    sequences_scores: Float[np.ndarray, " N"] | None
    """Scores of beam search: log-probability / length ^ length_penalty; None without beams."""
    drafted: Int32[np.ndarray, " N"] | None = None
    """Draft tokens that were checked; None without speculative decoding (our own field)."""
    accepted: Int32[np.ndarray, " N"] | None = None
    """Draft tokens that are part of the response (our own field)."""
    token_logprobs: Float[np.ndarray, "N T"] | None = None
    """Log-probability of each new token in nats, under the LLM's own distribution: before
    temperature and other processors. 0 after the end; None unless asked for (our own field)."""


def generate(
    engine: Engine,
    inputs: PromptInputs,
    request: GenerationRequest,
    draw_numbers: Sequence[int] | None = None,
) -> np.ndarray | Generated:
    """Generates token ids for prompts; see SALM.generate."""
    examples, ids = prepare_prompts(engine, inputs, enable_thinking=request.enable_thinking)
    numbers = range(len(examples)) if draw_numbers is None else draw_numbers
    if len(numbers) != len(examples):
        raise ValueError(f"{len(numbers)} draw_numbers for {len(examples)} prompts; give one each")
    split = [
        chunked.split_long_audio(e, request.max_audio_s, engine.sampling_rate) for e in examples
    ]
    if any(prompt.chunks for prompt in split):
        if request.drafting is not None and request.drafting.texts is not None:
            raise ValueError(TEXTS_OF_CHUNKS)
        run = partial(run_generation, engine)
        joined = chunked.generate_chunked(split, numbers, request, run, engine.tokenizer)
        return Generated(joined, None) if request.returns_dict else joined
    sequence_ids = np.asarray(numbers, np.int32)
    output = last_output(run_generation(engine, examples, request, sequence_ids=sequence_ids))
    sequences = output.trimmed()
    if not any(example.audio for example in examples):
        # as in NeMo, the output starts with the prompt if no prompt has audio
        prompt_ids = np.repeat(ids, request.decoding.return_sequences, axis=0)
        sequences = np.concatenate([prompt_ids, sequences], axis=1)
    if not request.returns_dict:
        return sequences
    kept = None if output.logprobs is None else output.logprobs[:, : output.trimmed().shape[1]]
    return Generated(sequences, output.scores, output.drafted, output.accepted, kept)


def stream(
    engine: Engine, inputs: PromptInputs, request: GenerationRequest, tokens_at_once: int
) -> Iterator[Piece]:
    """Generates text piece by piece; see SALM.stream."""
    if request.decoding.beams is not None:
        raise ValueError(
            "num_beams: beam search cannot be streamed, as its result is known only at the end; "
            "use generate, or num_beams=1"
        )
    if request.returns_dict:
        raise ValueError(
            "return_dict_in_generate: not supported by stream, which yields pieces; leave it out"
        )
    if tokens_at_once < 1:
        raise ValueError(f"tokens_at_once={tokens_at_once} must be at least 1")
    examples, _ = prepare_prompts(engine, inputs, enable_thinking=request.enable_thinking)
    chunked.refuse_long_audio(examples, request.max_audio_s, engine.sampling_rate)
    outputs = run_generation(engine, examples, request, tokens_at_once)
    return stream_pieces(outputs, engine.tokenizer)


def prepare_prompts(
    engine: Engine,
    inputs: PromptInputs,
    first: int = 0,
    *,
    enable_thinking: bool | None = None,
) -> tuple[list[SalmExample], np.ndarray]:
    """Tokenizes prompts and reads their audio. Returns (examples, left-padded ids [B, T]).

    Examples are named "prompt N", with N counted from `first`. Logs a warning for a recording that
    is shorter than one frame. Raises ValueError for invalid prompts, and for `enable_thinking` if
    the prompt format has no thinking mode.
    """
    if enable_thinking is not None and not engine.prompt_formatter.can_think:
        raise ValueError(
            f"prompt format {engine.prompt_formatter.name!r} has no thinking mode; leave "
            "enable_thinking out"
        )
    context = PromptContext(
        formatter=engine.prompt_formatter,
        sample_rate_hz=engine.sampling_rate,
        placeholder=engine.audio_locator_tag,
        placeholder_id=engine.audio_locator_tag_id,
        pad_id=engine.text_pad_id,
        bos_id=engine.text_bos_id,
        vocab_size=engine.text_vocab_size,
        enable_thinking=enable_thinking,
    )
    examples, ids = prompt_examples(*inputs, context, first)
    for example in examples:
        for samples in (len(a) for a in example.audio if not engine.frame_count(len(a))):
            log.warning(
                "%s: a recording of %d samples is shorter than one frame; it is left out",
                *(example.id, samples),
            )
    return examples, ids


def run_generation(
    engine: Engine,
    examples: Sequence[SalmExample],
    request: GenerationRequest,
    tokens_at_once: int | None = None,
    sequence_ids: np.ndarray | None = None,
) -> Iterator[PartialOutput]:
    """Generates for tokenized prompts. Yields all tokens so far every `tokens_at_once` tokens.

    Without `tokens_at_once` it yields only once, at the end. If the request has a stop condition,
    `tokens_at_once` is TOKENS_BETWEEN_CHECKS by default. If there are several outputs, the first
    has one token. `sequence_ids` seed the random draws of each prompt. By default they are the
    indices of the prompts in `examples`.
    """
    examples = with_transcripts(engine, examples)
    batch = _prepare_batch(engine, examples, request, sequence_ids)
    can_stop = bool(request.max_time_s or request.should_stop or request.stop_strings)
    if tokens_at_once is None and can_stop:
        tokens_at_once = TOKENS_BETWEEN_CHECKS
    outputs = _run(engine, batch, request, tokens_at_once)
    if not request.stop_strings:
        return outputs
    to_text = engine.tokenizer.ids_to_text
    return apply_stop_strings(outputs, request.stop_strings, to_text, batch.decoding.pad_id)


def _run(
    engine: Engine,
    batch: "_PreparedBatch",
    request: GenerationRequest,
    tokens_at_once: int | None,
) -> Iterator[PartialOutput]:
    start_s = time.monotonic()
    config = (batch.decoding, engine.placement)
    embeds = encode(*engine.network, batch.arrays, engine.placement)
    state = prefill(*engine.network, embeds, batch.arrays, batch.own, *config)
    last = int(np.max(batch.own.limits))
    until = last if tokens_at_once is None else 1
    while True:
        state, on_device = decode(*engine.decoding_network, state, np.int32(until), *config)
        output = batch.without_padding(jax.device_get(on_device))
        yield output
        elapsed_s = time.monotonic() - start_s
        is_late = request.max_time_s is not None and elapsed_s >= request.max_time_s
        is_stopped = request.should_stop is not None and request.should_stop()
        if output.ended.all() or until == last or is_late or is_stopped:
            return
        until = min(until + (tokens_at_once or last), last)


@dataclass(frozen=True)
class _PreparedBatch:
    """Prompts in arrays of one static shape: G data-parallel shards of R sequences."""

    groups: Sequence[Sequence[SalmExample]]
    """The examples of each shard."""
    arrays: SalmBatch[np.ndarray] | SalmBatch[Array]
    decoding: DecodingConfig[int]
    own: OwnOptions

    def without_padding(self, output: loops.GenerationOutput) -> PartialOutput:
        """Drops the sequences that only fill up the static shape."""
        groups, rows = self.own.limits.shape
        copies = self.decoding.return_sequences

        def real_rows(values: AnyArray) -> np.ndarray:
            by_group = values.reshape(groups, rows * copies, *values.shape[1:])
            pairs = zip(by_group, self.groups, strict=True)
            return np.concatenate([part[: len(group) * copies] for part, group in pairs])

        return PartialOutput(
            ids=real_rows(output.ids),
            lengths=real_rows(output.lengths),
            scores=None if output.scores is None else real_rows(output.scores),
            ended=real_rows(output.ended),
            drafted=None if output.drafted is None else real_rows(output.drafted),
            accepted=None if output.accepted is None else real_rows(output.accepted),
            logprobs=None if output.logprobs is None else real_rows(output.logprobs),
        )


def _prepare_batch(
    engine: Engine,
    examples: Sequence[SalmExample],
    request: GenerationRequest,
    sequence_ids: np.ndarray | None,
) -> _PreparedBatch:
    placement, request = engine.placement, with_drafter(engine, request)
    groups = split_evenly(examples, 1 if placement is None else placement.data_parallel_size)
    shape = prompt_shape(groups, engine.frame_count)
    batch = assemble_salm_batch(
        groups,
        shape,
        frame_count=engine.frame_count,
        placeholder_id=engine.audio_locator_tag_id,
        shift=False,
    )
    if engine.nemo_exact:
        batch = batch.without_id(engine.text_pad_id)
    # random draws of an example must not depend on the number of devices
    numbers = np.arange(len(examples)) if sequence_ids is None else sequence_ids
    by_group = np.zeros(batch.sequence_ids.shape, np.int32)
    for group, part in enumerate(split_evenly(numbers, len(groups))):
        by_group[group, : len(part)] = part
    batch = replace(batch, sequence_ids=by_group)
    limits = request.limits((batch.segments > 0).sum(axis=-1))
    return _PreparedBatch(
        groups=groups,
        arrays=batch if placement is None else placement.put_batch(batch),
        decoding=request.fitting(limits),
        own=OwnOptions(
            limits=limits,
            key=jax.random.key(request.seed) if request.decoding.do_sample else None,
            drafts=prepared_drafts(engine, request, groups, limits.shape),
        ),
    )


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def prefill(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    embeds: Float[Array, "B T D"],
    batch: SalmBatch[Array],
    own: OwnOptions,
    decoding: DecodingConfig,
    placement: Sharding | None = None,
) -> loops.GenerationState:
    """Runs the prompts through the LLM and chooses the first tokens (a `GenerationState`)."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        rows = embeds.shape[:2]
        # as in NeMo, logits processors do not see the prompt if a prompt has audio
        sees_prompt = batch.audio.shape[1] == 0 and reads_prompt(decoding.processors)
        lengths = jnp.sum(batch.segments > 0, axis=-1, dtype=jnp.int32).reshape(-1)
        if isinstance(decoding.drafter, LookupDrafter):
            text = DraftText(batch.tokens.reshape(rows), lengths)
        else:
            text = own.drafts and own.drafts.by_sequence()
        prompts = Prompts(
            embeds=embeds,
            lengths=lengths,
            attention_mask=batch.attention_mask.reshape(rows),
            limits=jnp.asarray(own.limits).reshape(-1),
            ids=batch.tokens.reshape(rows) if sees_prompt else None,
            rngs=salm_network.example_rngs(own.key, batch.sequence_ids),
            drafts=text,
            unpacked=batch.unpacked,
        )
        return loops.constrained(loops.prefill(network.llm, prompts, decoding))


@partial(jax.jit, static_argnames=("graphdef", "placement"), donate_argnames="state")
def decode(
    graphdef: nnx.GraphDef[Salm],
    variables: Layered,
    state: loops.GenerationState,
    until: Int[Array, ""],
    decoding: DecodingConfig,
    placement: Sharding | None = None,
) -> tuple[loops.GenerationState, loops.GenerationOutput]:
    """Generates until every sequence has `until` tokens or has ended.

    Returns the new state, and the output replicated on every device.
    """
    network: Salm = merge_layers(graphdef, variables)
    with sharding.use(placement):
        state = loops.constrained(loops.decode(network.llm, state, decoding, until))
        return state, sharding.on_every_device(loops.read_outputs(state, decoding))


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def generate_batch(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    batch: SalmBatch[Array],
    limits: Int[Array, "G R"],
    decoding: DecodingConfig,
    placement: Sharding | None = None,
) -> Int[Array, "B T"]:
    """`encode`, `prefill` and `decode` as one program, for ahead-of-time cost estimates."""
    config = (decoding, placement)
    embeds = encode(graphdef, variables, batch, placement)
    state = prefill(graphdef, variables, embeds, batch, OwnOptions(limits, None), *config)
    until = jnp.int32(decoding.max_new_tokens)
    return decode(graphdef, variables, state, until, *config)[1].ids
