"""Texts as drafts of speculative decoding: tokens of each text, letters of each token."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from jaxtyping import Int32

from speechlm2_jax.batches import SalmExample
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.generation.draft_llm import DraftPrompts, LlmDrafter
from speechlm2_jax.generation.drafts import LETTERS, START, Drafter, DraftText, TextDrafter
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.groups import split_evenly
from speechlm2_jax.inference.padding import round_up
from speechlm2_jax.inference.request.generation_request import (
    DraftRequest,
    DraftTranscriber,
    GenerationRequest,
)

SPACES = "\u2581\u0120\u010a "
"""How tokens write a space or a new line: SentencePiece's mark, byte-level BPE's two, a space."""
DRAFT_UNIT = 16
"""Draft texts are padded to 16, 24, 32, 48, ... tokens: few programs are compiled."""


def with_drafter(engine: Engine, request: GenerationRequest) -> GenerationRequest:
    """The request with the drafter of its texts or its draft LLM.

    Raises ValueError for a draft LLM that does not fit the model.
    """
    drafting = request.drafting
    if drafting is None:
        return request
    if drafting.model is not None:
        drafter: Drafter = drafting.model.drafter(engine, drafting.tokens)
    else:
        classes = token_classes(engine.tokenizer, engine.text_vocab_size)
        drafter = TextDrafter(tokens=drafting.tokens, classes=classes)
    return replace(request, decoding=replace(request.decoding, drafter=drafter))


def prepared_drafts(
    engine: Engine,
    request: GenerationRequest,
    groups: Sequence[Sequence[SalmExample]],
    shape: tuple[int, ...],
) -> DraftText | DraftPrompts | None:
    """What the drafter reads of the examples, in arrays of (G groups, R sequences) = `shape`.

    Raises ValueError for an ASR model of another sampling rate, and for another number of texts.
    """
    drafting = request.drafting
    if drafting is None:
        return None
    if drafting.model is not None:
        assert isinstance(request.decoding.drafter, LlmDrafter)
        size = drafting.model.shape(engine, groups)
        return drafting.model.prompts(engine, request.decoding.drafter, groups, size)
    examples = [example for group in groups for example in group]
    drafts = draft_tokens(engine, examples, drafting, drafting.texts)
    width = round_up(max(map(len, drafts), default=1), DRAFT_UNIT)
    text = padded_drafts(split_evenly(drafts, shape[0]), (*shape, width))
    return text if engine.placement is None else engine.placement.put_batch(text)


def draft_tokens(
    engine: Engine,
    examples: Sequence[SalmExample],
    drafting: DraftRequest,
    texts: Sequence[str] | None,
) -> list[list[int]]:
    """The token ids of each example's draft: its own of `texts`, or a transcript without them.

    Raises ValueError for an ASR model of another sampling rate, and for another number of texts.
    """
    if drafting.transcriber is not None:
        texts = _transcripts(engine, examples, drafting.transcriber)
    texts = list(texts or ())
    if len(texts) != len(examples):
        raise ValueError(f"{len(texts)} drafts for {len(examples)} prompts; give one each")
    rows = engine.text_vocab_size
    return [[i for i in ids if i < rows] for ids in engine.tokenizer.texts_to_ids(texts)]


def padded_drafts(groups: Sequence[Sequence[Sequence[int]]], shape: tuple[int, ...]) -> DraftText:
    """Drafts in arrays of (G groups, R sequences, S tokens) = `shape`. Longer ones are cut."""
    ids, lengths = np.zeros(shape, np.int32), np.zeros(shape[:-1], np.int32)
    for group, own in enumerate(groups):
        for n, tokens in enumerate(own):
            kept = tokens[: shape[-1]]
            ids[group, n, : len(kept)], lengths[group, n] = kept, len(kept)
    return DraftText(ids, lengths)


@lru_cache(maxsize=4)
def token_classes(tokenizer: Tokenizer, vocabulary: int) -> Int32[np.ndarray, " V"]:
    """The class of each token for `TextDrafter`: its letters without case, and if a word starts."""
    classes = np.zeros(vocabulary, np.int32)
    known: dict[str, int] = {"": 0}
    count = min(len(tokenizer), vocabulary)
    for index, token in enumerate(tokenizer.ids_to_tokens(list(range(count)))):
        text = token.lstrip(SPACES)
        letters = "".join(c for c in text.rstrip(SPACES) if c.isalnum()).casefold()
        number = known.setdefault(letters, len(known))
        classes[index] = LETTERS * number + START * (len(text) < len(token))
    return classes


def _transcripts(
    engine: Engine, examples: Sequence[SalmExample], model: DraftTranscriber
) -> list[str]:
    """The transcripts of each prompt's recordings, joined by spaces."""
    if model.sampling_rate != engine.sampling_rate:
        raise ValueError(
            f"assistant_model: transcribes audio of {model.sampling_rate} Hz, but the model reads "
            f"{engine.sampling_rate} Hz; use an ASR model of the same rate, or drafts"
        )
    clips = [clip for example in examples for clip in example.audio]
    texts = iter(model.transcribe(clips) if clips else ())
    return [" ".join(str(next(texts)) for _ in example.audio) for example in examples]
