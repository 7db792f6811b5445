"""From prompts to answers: fixed shapes, one jitted program per shape."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from speechlm2_jax import sharding
from speechlm2_jax.batches import (
    BatchShape,
    SalmBatch,
    SalmExample,
    assemble_salm_batch,
    full_batch,
)
from speechlm2_jax.generation.salm import DecodingConfig, decode
from speechlm2_jax.generation.sampling import SamplingConfig
from speechlm2_jax.layers.module import Variables, bind
from speechlm2_jax.models.prompting import PromptContext, prompt_examples
from speechlm2_jax.models.shapes import answer_shape
from speechlm2_jax.networks import salm as salm_network
from speechlm2_jax.networks.salm import Salm, SalmModes
from speechlm2_jax.sharding import Sharding

if TYPE_CHECKING:
    from speechlm2_jax.models.salm import SALM

DEFAULT_NEW_TOKENS = 20
"""transformers' own default."""
SAMPLING_DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What transformers samples with where nothing is said."""
OPTIONS = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "eos_token_id",
    "pad_token_id",
    "num_beams",
    "repetition_penalty",
)


def generate(
    model: "SALM",
    definition: Any,
    asked: tuple[Any, Any, Any],
    generation_config: Any,
    overrides: Mapping[str, Any],
) -> np.ndarray:
    """Answers (prompts, audios, audio_lens); see SALM.generate."""
    context = PromptContext(
        formatter=model.prompt_formatter,
        sample_rate_hz=model.sampling_rate,
        placeholder_id=model.audio_locator_tag_id,
        pad_id=model.text_pad_id,
    )
    examples, ids = prompt_examples(*asked, context)
    decoding = decoding_config(model, generation_config, overrides)
    answers = answer_examples(model, definition, examples, decoding, overrides.get("seed", 0))
    has_audio = any(example.audio for example in examples)
    return answers if has_audio else np.concatenate([ids, answers], axis=1)


def answer_examples(
    model: "SALM",
    definition: Any,
    examples: Sequence[SalmExample],
    decoding: DecodingConfig,
    seed: int = 0,
) -> np.ndarray:
    """Answers prompts that are laid out already: int32 ids [B, T], T that of the longest answer."""
    variables = model.variables
    mesh = sharding.mesh_of(variables)
    placement = None if mesh is None else sharding.for_answering(mesh)
    groups = deal(examples, 1 if placement is None else placement.data_parallel_size)
    shape = answer_shape(groups, model.frame_count)
    batch = assemble_salm_batch(
        groups,
        shape,
        frame_count=model.frame_count,
        placeholder_id=model.audio_locator_tag_id,
        pad_id=model.text_pad_id,
        shift=False,
    )
    # what is drawn for an example must not depend on how many devices answer
    first = np.cumsum([0, *map(len, groups)])[:-1, None]
    batch = replace(batch, row_ids=(first + np.arange(shape.rows)).astype(np.int32))
    key = jax.random.key(seed) if decoding.sampling.do_sample else None
    placed = batch if placement is None else placement.put_batch(batch)
    new = np.asarray(answer(definition, variables, placed, decoding, key, placement=placement))
    by_group = new.reshape(len(groups), shape.rows, -1)
    answers = [ids[: len(group)] for ids, group in zip(by_group, groups, strict=True)]
    return _trim(np.concatenate(answers), decoding.stop_ids)


def deal(examples: Sequence[SalmExample], groups: int) -> list[Sequence[SalmExample]]:
    """Shares examples out in order, as evenly as can be."""
    bounds = np.linspace(0, len(examples), groups + 1).round().astype(int)
    return [examples[a:b] for a, b in itertools.pairwise(bounds)]


@partial(jax.jit, static_argnames=("definition", "decoding", "placement"))
def answer(
    definition: Any,
    variables: Variables,
    batch: SalmBatch,
    decoding: DecodingConfig,
    key: Key[Array, ""] | None,
    *,
    placement: Sharding | None = None,
) -> Int[Array, "B T"]:
    """Encodes audio, interleaves, and decodes; rows are padded after they stop.

    `placement` says how the devices share the work, if weights lie on several.
    """
    network: Salm = bind(definition, variables)
    with sharding.use(placement):
        inputs = salm_network.prepare(network, batch, SalmModes())
        rows = inputs.embeds.shape[:2]
        ids = decode(
            network.llm,
            inputs.embeds,
            lengths=jnp.sum(batch.segments > 0, axis=-1, dtype=jnp.int32).reshape(-1),
            is_key=batch.is_key.reshape(rows),
            config=decoding,
            keys=salm_network.example_keys(key, batch.row_ids),
        )
        return sharding.constrain(ids, None, None)


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
    definition: Any,
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
    decoding = decoding_config(model, None, {"max_new_tokens": max_new_tokens})
    lowered = answer.lower(definition, variables, arrays, decoding, None, placement=placement)
    return lowered.compile()


def decoding_config(model: "SALM", config: Any, overrides: Mapping[str, Any]) -> DecodingConfig:
    """Reads a GenerationConfig and keywords, the latter winning.

    What neither says is greedy decoding that stops at the tokenizer's end-of-sequence token.
    Raises ValueError for a keyword or a strategy that is not supported.
    """
    unknown = set(overrides) - {*OPTIONS, "seed"}
    if unknown:
        raise ValueError(
            f"generate does not know {sorted(unknown)}; it takes {', '.join((*OPTIONS, 'seed'))}"
        )
    asked = {name: getattr(config, name, None) for name in OPTIONS} | dict(overrides)
    for name in ("num_beams", "repetition_penalty"):
        if asked[name] not in (None, 1, 1.0):
            raise ValueError(f"generate: {name}={asked[name]} is not supported; leave it at 1")
    stop = asked["eos_token_id"] if asked["eos_token_id"] is not None else model.text_eos_id
    stops = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    sampling = SamplingConfig()
    if asked["do_sample"]:
        given: dict[str, Any] = {
            k: v if asked[k] is None else asked[k] for k, v in SAMPLING_DEFAULTS.items()
        }
        sampling = SamplingConfig(do_sample=True, **given)
    pad_id = asked["pad_token_id"]
    return DecodingConfig(
        max_new_tokens=int(asked["max_new_tokens"] or DEFAULT_NEW_TOKENS),
        stop_ids=tuple(int(s) for s in stops),
        pad_id=model.text_pad_id if pad_id is None else int(pad_id),
        sampling=sampling,
    )


def _trim(answers: np.ndarray, stop_ids: tuple[int, ...]) -> np.ndarray:
    """Drops the columns after the last row stopped."""
    stopped = np.isin(answers, stop_ids)
    width = answers.shape[1]
    lengths = np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, width)
    return answers[:, : lengths.max(initial=0)]
