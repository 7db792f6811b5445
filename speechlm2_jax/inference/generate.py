"""From prompts to answers: fixed shapes, three jitted programs per shape."""

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax import sharding
from speechlm2_jax.batches import (
    BatchShape,
    SalmBatch,
    SalmExample,
    assemble_salm_batch,
    full_batch,
)
from speechlm2_jax.generation import salm as loops
from speechlm2_jax.generation.decoding import DecodingConfig, Prompts
from speechlm2_jax.generation.processors import reads_prompt
from speechlm2_jax.inference.long_form import chunked
from speechlm2_jax.inference.padding import answer_shape
from speechlm2_jax.inference.prompts import PromptContext, prompt_examples
from speechlm2_jax.inference.request.generation_request import GenerationRequest, read_request
from speechlm2_jax.inference.text_stream import PartialOutput, Piece, cut_at, last_of, pieces
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.networks import salm as salm_network
from speechlm2_jax.networks.salm import Salm, SalmModes
from speechlm2_jax.sharding import Sharding

if TYPE_CHECKING:
    from speechlm2_jax.models.salm import SALM

STEPS_BETWEEN_CHECKS = 16
"""Tokens per call of the device where something may stop a running answer."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """What `generate` gives with `return_dict_in_generate=True`, by transformers' names."""

    sequences: np.ndarray
    """Int32 [B x answers, T]."""
    sequences_scores: np.ndarray | None
    """Float32 [B x answers], of beam search: log-probability over length ^ length_penalty."""


def generate(
    model: "SALM",
    graphdef: Any,
    asked: tuple[Any, Any, Any],
    generation_config: Any,
    overrides: Mapping[str, Any],
    draw_numbers: Sequence[int] | None = None,
) -> np.ndarray | Generated:
    """Answers (prompts, audios, audio_lens); see SALM.generate."""
    request = read_request(model, generation_config, overrides)
    examples, ids = prepare_prompts(model, asked, enable_thinking=request.enable_thinking)
    numbers = range(len(examples)) if draw_numbers is None else draw_numbers
    if len(numbers) != len(examples):
        raise ValueError(f"{len(numbers)} draw_numbers for {len(examples)} prompts; give one each")
    parts = [chunked.in_parts(e, request.max_audio_s, model.sampling_rate) for e in examples]
    if any(prompt.chunks for prompt in parts):
        speak_of = partial(run_generation, model, graphdef)
        joined = chunked.generate_chunked(parts, numbers, request, speak_of, model.tokenizer)
        return Generated(joined, None) if request.returns_dict else joined
    row_ids = np.asarray(numbers, np.int32)
    spoken = last_of(run_generation(model, graphdef, examples, request, row_ids=row_ids))
    answers = spoken.trimmed()
    if not any(example.audio for example in examples):
        before = np.repeat(ids, request.decoding.answers, axis=0)
        answers = np.concatenate([before, answers], axis=1)
    return Generated(answers, spoken.scores) if request.returns_dict else answers


def stream(
    model: "SALM",
    graphdef: Any,
    asked: tuple[Any, Any, Any],
    generation_config: Any,
    tokens_at_once: int,
    overrides: Mapping[str, Any],
) -> Iterator[Piece]:
    """Answers piece by piece; see SALM.stream."""
    request = read_request(model, generation_config, overrides)
    if request.decoding.beams is not None:
        raise ValueError("beam search knows its answer at the end only; use generate, or 1 beam")
    if request.returns_dict:
        raise ValueError("a stream has no dict to return; leave return_dict_in_generate out")
    if tokens_at_once < 1:
        raise ValueError(f"tokens_at_once={tokens_at_once} must be at least 1")
    examples, _ = prepare_prompts(model, asked, enable_thinking=request.enable_thinking)
    chunked.refuse(examples, request.max_audio_s, model.sampling_rate)
    reports = run_generation(model, graphdef, examples, request, tokens_at_once)
    return pieces(reports, model.tokenizer)


def prepare_prompts(
    model: "SALM",
    asked: tuple[Any, Any, Any],
    first: int = 0,
    *,
    enable_thinking: bool | None = None,
) -> tuple[list[SalmExample], np.ndarray]:
    """Lays (prompts, audios, audio_lens) out as conversations, named from `first`; their ids.

    Logs a warning for a recording that is too short for one frame. Raises ValueError where
    thinking is spoken of and the prompt format knows no thoughts.
    """
    if enable_thinking is not None and not model.prompt_formatter.can_think:
        raise ValueError(
            f"prompt format {model.prompt_formatter.name!r} has no thinking mode; leave "
            "enable_thinking out"
        )
    context = PromptContext(
        formatter=model.prompt_formatter,
        sample_rate_hz=model.sampling_rate,
        placeholder=model.audio_locator_tag,
        placeholder_id=model.audio_locator_tag_id,
        pad_id=model.text_pad_id,
        bos_id=model.text_bos_id,
        vocab_size=model.text_vocab_size,
        enable_thinking=enable_thinking is not False,
    )
    examples, ids = prompt_examples(*asked, context, first)
    for example in examples:
        for samples in (len(a) for a in example.audio if not model.frame_count(len(a))):
            log.warning(
                "%s: a recording of %d samples is shorter than one frame; answered as if it were "
                "not there",
                *(example.id, samples),
            )
    return examples, ids


def run_generation(
    model: "SALM",
    graphdef: Any,
    examples: Sequence[SalmExample],
    request: GenerationRequest,
    steps_at_once: int | None = None,
    row_ids: np.ndarray | None = None,
) -> Iterator[PartialOutput]:
    """Answers prompts that are laid out already, saying how far it is every so many tokens.

    Without `steps_at_once` that is once, at the end, unless the request can stop it before. The
    first report, if there are several, comes with the first token. `row_ids` are the numbers by
    which random draws go; without, the places in `examples`.
    """
    asked = _lay_out(model, examples, request, row_ids)
    can_stop = bool(request.max_time_s or request.should_stop or request.stop_strings)
    if steps_at_once is None and can_stop:
        steps_at_once = STEPS_BETWEEN_CHECKS
    reports = _run(model, graphdef, asked, request, steps_at_once)
    if not request.stop_strings:
        return reports
    decode = model.tokenizer.ids_to_text
    return cut_at(reports, request.stop_strings, decode, asked.decoding.pad_id)


def _run(
    model: "SALM",
    graphdef: Any,
    asked: "_LaidOut",
    request: GenerationRequest,
    steps_at_once: int | None,
) -> Iterator[PartialOutput]:
    begun_s = time.monotonic()
    rest = (asked.decoding, asked.placement)
    variables = model.variables
    embeds = encode(graphdef, variables, asked.batch, asked.placement)
    state = prefill(graphdef, variables, embeds, asked.batch, asked.limits, asked.key, *rest)
    last = int(asked.limits.max())
    until = last if steps_at_once is None else 1
    while True:
        state, answers = decode(graphdef, variables, state, np.int32(until), *rest)
        spoken = asked.in_order(jax.device_get(answers))
        yield spoken
        elapsed_s = time.monotonic() - begun_s
        is_late = request.max_time_s is not None and elapsed_s >= request.max_time_s
        is_told = request.should_stop is not None and request.should_stop()
        if spoken.ended.all() or until == last or is_late or is_told:
            return
        until = min(until + (steps_at_once or last), last)


@dataclass(frozen=True)
class _LaidOut:
    """Prompts in the arrays of one static shape."""

    groups: Sequence[Sequence[SalmExample]]
    batch: Any
    decoding: DecodingConfig
    limits: np.ndarray
    """Int32 [G, R]."""
    key: Any
    placement: Sharding | None

    def in_order(self, answers: loops.GenerationOutput) -> PartialOutput:
        """Leaves out the rows that fill the shape."""
        groups, rows = self.limits.shape
        copies = self.decoding.answers

        def chosen(values: Any) -> np.ndarray:
            by_group = values.reshape(groups, rows * copies, *values.shape[1:])
            real = zip(by_group, self.groups, strict=True)
            return np.concatenate([part[: len(group) * copies] for part, group in real])

        return PartialOutput(
            ids=chosen(answers.ids),
            lengths=chosen(answers.lengths),
            scores=None if answers.scores is None else chosen(answers.scores),
            ended=chosen(answers.ended),
        )


def _lay_out(
    model: "SALM",
    examples: Sequence[SalmExample],
    request: GenerationRequest,
    row_ids: np.ndarray | None,
) -> _LaidOut:
    mesh = sharding.mesh_of(model.variables)
    placement = None if mesh is None else sharding.for_inference(mesh)
    groups = split_evenly(examples, 1 if placement is None else placement.data_parallel_size)
    shape = answer_shape(groups, model.frame_count)
    batch = assemble_salm_batch(
        groups,
        shape,
        frame_count=model.frame_count,
        placeholder_id=model.audio_locator_tag_id,
        shift=False,
    )
    if model.nemo_exact:
        batch = batch.without_id(model.text_pad_id)
    # what is drawn for an example must not depend on how many devices answer
    numbers = np.arange(len(examples)) if row_ids is None else row_ids
    by_group = np.zeros(batch.row_ids.shape, np.int32)
    for group, part in enumerate(split_evenly(numbers, len(groups))):
        by_group[group, : len(part)] = part
    batch = replace(batch, row_ids=by_group)
    limits = request.limits((batch.segments > 0).sum(axis=-1))
    return _LaidOut(
        groups=groups,
        batch=batch if placement is None else placement.put_batch(batch),
        decoding=request.fitting(limits),
        limits=limits,
        key=jax.random.key(request.seed) if request.decoding.do_sample else None,
        placement=placement,
    )


def split_evenly(examples: Sequence[Any] | np.ndarray, groups: int) -> list[Any]:
    """Shares examples out in order, as evenly as can be."""
    bounds = np.linspace(0, len(examples), groups + 1).round().astype(int)
    return [examples[a:b] for a, b in itertools.pairwise(bounds)]


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def encode(
    graphdef: Any, variables: Variables, batch: SalmBatch, placement: Sharding | None = None
) -> Float[Array, "B T D"]:
    """Encodes audio and interleaves: what the LLM sees, however it is to answer.

    A program of its own, so that another way of answering compiles no encoder. `placement` says
    how the devices share the work, if weights lie on several.
    """
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        return salm_network.prepare(network, batch, SalmModes()).embeds


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def prefill(
    graphdef: Any,
    variables: Variables,
    embeds: Float[Array, "B T D"],
    batch: SalmBatch,
    limits: Int[Array, "G R"],
    key: Key[Array, ""] | None,
    decoding: DecodingConfig,
    placement: Sharding | None = None,
) -> Any:
    """Runs the prompts and chooses the first tokens: the state of the loop."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        rows = embeds.shape[:2]
        # as in NeMo: beside audio, processors see the answer alone
        is_seen = batch.audio.shape[1] == 0 and reads_prompt(decoding.processors)
        prompts = Prompts(
            embeds=embeds,
            lengths=jnp.sum(batch.segments > 0, axis=-1, dtype=jnp.int32).reshape(-1),
            attention_mask=batch.attention_mask.reshape(rows),
            limits=limits.reshape(-1),
            ids=batch.tokens.reshape(rows) if is_seen else None,
            rngs=salm_network.example_rngs(key, batch.row_ids),
        )
        return loops.constrained(loops.prefill(network.llm, prompts, decoding))


@partial(jax.jit, static_argnames=("graphdef", "placement"), donate_argnames="state")
def decode(
    graphdef: Any,
    variables: Variables,
    state: Any,
    until: Int[Array, ""],
    decoding: DecodingConfig,
    placement: Sharding | None = None,
) -> tuple[Any, loops.GenerationOutput]:
    """Chooses tokens up to number `until`: the state, and the answers on every device."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        state = loops.constrained(loops.decode(network.llm, state, decoding, until))
        answers = loops.read_outputs(state, decoding)
        return state, jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), answers)


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def generate_batch(
    graphdef: Any,
    variables: Variables,
    batch: SalmBatch,
    limits: Int[Array, "G R"],
    decoding: DecodingConfig,
    placement: Sharding | None = None,
) -> Int[Array, "B T"]:
    """All as one program, which is compiled ahead of time to be priced."""
    rest = (decoding, placement)
    embeds = encode(graphdef, variables, batch, placement)
    state = prefill(graphdef, variables, embeds, batch, limits, None, *rest)
    until = jnp.int32(decoding.max_new_tokens)
    return decode(graphdef, variables, state, until, *rest)[1].ids


def layout(model: "SALM", placement: Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Dtype and place of every variable where a model only answers: none needs to be fp32."""
    return {
        path: jax.ShapeDtypeStruct(
            info.shape,
            info.computed_in(model.compute_dtype),
            sharding=placement.named(info.axes, info.shape),
        )
        for path, info in model.infos.items()
    }


def compile_ahead(
    model: "SALM",
    graphdef: Any,
    placement: Sharding,
    shape: BatchShape,
    max_new_tokens: int,
) -> Any:
    """Compiles answering for devices that need not be here, `shape` being one group's prompts.

    Gives what `jax.jit(...).lower(...).compile()` does; nothing runs.
    """
    groups = placement.data_parallel_size
    batch = full_batch(
        shape, groups, frame_count=model.frame_count, placeholder_id=model.audio_locator_tag_id
    )
    arrays = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        *(batch, placement.batch(batch)),
    )
    variables = layout(model, placement)
    limits = np.full(arrays.row_ids.shape, max_new_tokens, np.int32)
    decoding = read_request(model).fitting(limits)
    lowered = generate_batch.lower(graphdef, variables, arrays, limits, decoding, placement)
    return lowered.compile()
