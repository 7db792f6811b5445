"""A random decoder whose responses are generated with drafts, in a batch and in slots."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from speechlm2_jax.generation import salm, slots
from speechlm2_jax.generation.decoding import DecodingConfig, Prompts
from speechlm2_jax.generation.draft_llm import DraftPrompts, LlmDrafter
from speechlm2_jax.generation.drafts import DraftText, TextDrafter
from speechlm2_jax.layers.module import Variables, merge, split
from speechlm2_jax.llm.config import DecoderConfig, LayerKind
from speechlm2_jax.llm.decoder import Decoder

PAD, NEW, VOCABULARY = 0, 12, 31
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=24,
    init_std=0.4,
)
NARROW = replace(CONFIG, pattern=(LayerKind(window=4), LayerKind(chunk=5)))
PROMPTS = [[3, 7, 11, 5, 2], [9, 4], [8, 8, 1, 30], [6, 2, 6], [22], [1, 2, 3, 4, 5, 6]]
CLASSES = 2 * np.arange(VOCABULARY, dtype=np.int32)
WIDTH = NEW + 6
"""Of the draft texts."""
NO_STOP = (99, 99, 99)
GREEDY = DecodingConfig(max_new_tokens=NEW, stop_ids=NO_STOP, pad_id=PAD)
DRAFTED = replace(GREEDY, drafter=TextDrafter(tokens=4, classes=CLASSES))


@partial(jax.jit, static_argnames="graphdef")
def run(
    graphdef: nnx.GraphDef[Decoder],
    variables: Variables,
    prompts: Prompts,
    config: DecodingConfig,
    until: jax.Array,
) -> salm.GenerationOutput:
    decoder: Decoder = merge(graphdef, variables)
    prompts = prompts._replace(unpacked=False)  # static; jit makes an array of it
    state = salm.decode(decoder, salm.prefill(decoder, prompts, config), config, until)
    return salm.read_outputs(state, config)


@partial(jax.jit, static_argnames=("graphdef", "size"))
def free_slots(
    graphdef: nnx.GraphDef[Decoder],
    variables: Variables,
    config: DecodingConfig,
    size: slots.SlotShape,
) -> slots.Slots:
    return slots.empty(merge(graphdef, variables), size, config, jnp.dtype("float32"))


@partial(jax.jit, static_argnames="graphdef")
def admitted(
    graphdef: nnx.GraphDef[Decoder],
    variables: Variables,
    state: slots.Slots,
    prompts: Prompts,
    config: DecodingConfig,
    at: jax.Array,
) -> slots.Slots:
    """Puts one prompt into slot `at`."""
    decoder: Decoder = merge(graphdef, variables)
    prefilled = salm.prefill(decoder, prompts._replace(unpacked=False), config)
    return slots.admit(state, prefilled, at[None, None])


@partial(jax.jit, static_argnames="graphdef")
def run_slots(
    graphdef: nnx.GraphDef[Decoder],
    variables: Variables,
    state: slots.Slots,
    config: DecodingConfig,
    enough: jax.Array,
) -> slots.Slots:
    return slots.decode(merge(graphdef, variables), state, config, enough)


class Case:
    """A random decoder and prompts of different lengths."""

    def __init__(self, config: DecoderConfig, prompts: list[list[int]] = PROMPTS):
        self.network = split(Decoder(config, rngs=nnx.Rngs(0)))
        ids, lengths = padded(prompts)
        self.ids, self.vocabulary = jnp.asarray(ids), config.vocab_size
        decoder: Decoder = merge(*self.network)
        self.prompts = Prompts(
            embeds=decoder.embed(self.ids),
            lengths=jnp.asarray(lengths),
            attention_mask=jnp.arange(ids.shape[1])[None] < lengths[:, None],
            limits=jnp.full(len(ids), NEW, jnp.int32),  # as strong a type as any test's
        )

    def run(self, config: DecodingConfig, until: int = NEW, **changed) -> salm.GenerationOutput:
        prompts = self.prompts._replace(**changed)
        return run(*self.network, prompts, config, jnp.int32(until))

    def run_in_slots(
        self, config: DecodingConfig, drafts: DraftText | DraftPrompts
    ) -> dict[int, list[int]]:
        """The responses to all prompts on three slots, which are filled again as they end."""
        longest = self.prompts.embeds.shape[1] + 3  # the slots have room for longer prompts
        width = drafts.ids.shape[1] if isinstance(config.drafter, TextDrafter) else longest
        state = free_slots(*self.network, config, slots.SlotShape(3, longest, width))
        busy: dict[int, int] = {}
        responses: dict[int, list[int]] = {}
        for number in range(len(PROMPTS)):
            at = next(n for n in range(3) if n not in busy)
            busy[at] = number
            prompts = self.prompts._replace(drafts=drafts, unpacked=())
            one = jax.tree.map(lambda x, n=number: x[n : n + 1], prompts)
            state = admitted(*self.network, state, one, config, jnp.int32(at))
            is_last = number == len(PROMPTS) - 1
            if len(busy) < 3 and not is_last:
                continue
            state = run_slots(*self.network, state, config, jnp.int32(3 if is_last else 1))
            output = slots.read(state)
            for slot in [s for s in busy if output.ended[s]]:
                ids = np.asarray(output.ids)[slot, : int(output.lengths[slot])]
                responses[busy.pop(slot)] = ids.tolist()
        return responses

    def draft_llm(self, config: DecoderConfig, tokens: int) -> tuple[LlmDrafter, DraftPrompts]:
        """A draft LLM of this architecture, and what it reads of the same prompts."""
        graphdef, variables = split(Decoder(config, rngs=nnx.Rngs(0)))
        drafter = LlmDrafter(
            tokens=tokens,
            graphdef=graphdef,
            variables=variables,
            vocabulary=self.vocabulary,
            dtype="float32",
        )
        embeds = merge(graphdef, variables).embed(self.ids)
        return drafter, DraftPrompts(embeds, self.prompts.attention_mask)


def padded(rows: list[list[int]], width: int | None = None) -> DraftText:
    out = np.zeros((len(rows), width or max(map(len, rows))), np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return DraftText(out, np.array([len(ids) for ids in rows], np.int32))
