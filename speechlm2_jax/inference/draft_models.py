"""A draft LLM beside a SALM: whether they fit, and the prompts as the draft LLM reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax import sharding
from speechlm2_jax.batches import BatchShape, SalmBatch, SalmExample, assemble_salm_batch
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.generation.draft_llm import DraftPrompts, LlmDrafter
from speechlm2_jax.inference.encode import encode
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.padding import prompt_shape
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import abstract, split
from speechlm2_jax.layers.unstacked import Layered, merge_layers
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.pretrained.quantization import Quantization
from speechlm2_jax.sharding import Sharding

NOT_QUANTIZED = Quantization()


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftModel:
    """An LLM whose proposals are drafts: of a SALM, or alone."""

    graphdef: nnx.GraphDef[Decoder]
    variables: Layered
    """Of the LLM, for a loop that decodes."""
    tokenizer: Tokenizer
    dtype: str
    engine: Engine | None = None
    """Of the SALM; an LLM alone reads the prompts without their audio."""

    def drafter(self, engine: Engine, tokens: int) -> LlmDrafter:
        """The drafter of `tokens` tokens per pass of the model `engine`.

        Raises ValueError where the two do not fit.
        """
        self._check(engine)
        return LlmDrafter(
            tokens=tokens,
            graphdef=self.graphdef,
            variables=self._placed(self.variables, engine),
            vocabulary=engine.text_vocab_size,
            dtype=self.dtype,
        )

    def shape(self, engine: Engine, groups: Sequence[Sequence[SalmExample]]) -> BatchShape:
        """The static shape of the prompts as the draft LLM reads them."""
        own = [[self._example(engine, example) for example in group] for group in groups]
        return prompt_shape(own, self._reader(engine).frame_count)

    def prompts(
        self,
        engine: Engine,
        drafter: LlmDrafter,
        groups: Sequence[Sequence[SalmExample]],
        shape: BatchShape,
    ) -> DraftPrompts:
        """The prompts as inputs of the draft LLM; audio is encoded by the SALM that it is of."""
        placement = engine.placement
        batch: SalmBatch = assemble_salm_batch(
            [[self._example(engine, example) for example in group] for group in groups],
            shape,
            frame_count=self._reader(engine).frame_count,
            placeholder_id=self._reader(engine).audio_locator_tag_id,
            shift=False,
        )
        batch = batch if placement is None else placement.put_batch(batch)
        if self.engine is not None:
            network = (self.engine.graphdef, self._placed(self.engine.variables, engine))
            return DraftPrompts(encode(*network, batch, placement), batch.attention_mask)
        ids = jnp.asarray(batch.tokens).reshape(-1, shape.tokens)
        embeds = _embed(self.graphdef, drafter.variables, ids, self.dtype, placement)
        return DraftPrompts(embeds, batch.attention_mask)

    def _placed(self, variables: Any, engine: Engine) -> Any:
        """The variables on all devices of the model."""
        placement = engine.placement
        return variables if placement is None else jax.device_put(variables, placement.named(()))

    def _reader(self, engine: Engine) -> Engine:
        return engine if self.engine is None else self.engine

    def _check(self, engine: Engine) -> None:
        tags = [engine.audio_locator_tag]
        if self.engine is not None:
            tags.append(self.engine.audio_locator_tag)
            if self.engine.sampling_rate != engine.sampling_rate:
                raise ValueError(
                    f"assistant_model: reads audio of {self.engine.sampling_rate} Hz, but the "
                    f"model reads {engine.sampling_rate} Hz; use a SALM of the same rate"
                )
        unlike = _difference(engine.tokenizer, self.tokenizer, tuple(tags))
        if unlike is not None:
            raise ValueError(
                f"assistant_model: token {unlike[0]} is {unlike[1]!r} for the model and "
                f"{unlike[2]!r} for the draft LLM; use a draft LLM with the model's tokenizer"
            )

    def _example(self, engine: Engine, example: SalmExample) -> SalmExample:
        """A prompt with the placeholders of the draft LLM; without audio if it reads none."""
        is_audio = example.tokens == engine.audio_locator_tag_id
        if self.engine is not None:
            own = np.where(is_audio, self.engine.audio_locator_tag_id, example.tokens)
            return replace(example, tokens=own)
        text = example.tokens[~is_audio]
        text = text if len(text) else np.array([engine.text_pad_id], example.tokens.dtype)
        return replace(example, tokens=text, audio=(), loss_mask=np.zeros(len(text), bool))


@lru_cache(maxsize=4)
def decoder_graphdef(
    config: DecoderConfig,
    lora: LoraConfig | None = None,
    quantization: Quantization = NOT_QUANTIZED,
) -> nnx.GraphDef[Decoder]:
    """The LLM of this architecture without weights."""

    def make(rngs: nnx.Rngs) -> Decoder:
        return quantization.applied_to_llm(Decoder(config, rngs=rngs, lora=lora))

    return split(abstract(make))[0]


@lru_cache(maxsize=4)
def _difference(
    own: Tokenizer, other: Tokenizer, tags: tuple[str, ...]
) -> tuple[int, str | None, str | None] | None:
    """The first id that two tokenizers read otherwise: (id, token, other token); None if none.

    Audio placeholders (`tags`) do not count: only one tokenizer may have them.
    """
    tokens, others = (t.ids_to_tokens(list(range(len(t)))) for t in (own, other))
    for index in range(max(len(tokens), len(others))):
        pair = [side[index] if index < len(side) else None for side in (tokens, others)]
        if pair[0] != pair[1] and any(token not in (None, *tags) for token in pair):
            return index, pair[0], pair[1]
    return None


@partial(jax.jit, static_argnames=("graphdef", "dtype", "placement"))
def _embed(
    graphdef: nnx.GraphDef[Decoder],
    variables: Layered,
    ids: Int[Array, "B T"],
    dtype: str,
    placement: Sharding | None,
) -> Float[Array, "B T D"]:
    decoder: Decoder = merge_layers(graphdef, variables)
    with sharding.use(placement):
        return decoder.embed(ids).astype(dtype)
