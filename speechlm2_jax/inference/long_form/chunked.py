"""Generation for recordings longer than `max_audio_s`.

The model generates a response for each chunk, and the texts of the responses are joined.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.batches import SalmExample
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.inference.long_form.chunks import Chunk, cut
from speechlm2_jax.inference.long_form.join_texts import join
from speechlm2_jax.inference.request.generation_request import GenerationRequest
from speechlm2_jax.inference.text_stream import PartialOutput

CHUNKS_AT_ONCE = 8
"""Chunks per batch. The limit bounds memory, however long the recordings are."""
CHUNK_STRIDE = 1 << 16
"""Difference between the draw numbers of consecutive chunks of a prompt. It is large, so
that the numbers of other prompts lie in between."""


@runtime_checkable
class TextCoder(Protocol):
    """Turns ids into text and back."""

    def ids_to_text(self, ids: ArrayLike) -> str:
        """Decodes one sequence, without special tokens."""
        ...

    def text_to_ids(self, text: str) -> list[int]:
        """Encodes one text."""
        ...


RunGeneration = Callable[..., Iterator[PartialOutput]]
"""`run_generation` with its engine: (examples, request, sequence_ids=...) -> outputs."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChunkedPrompt:
    """One prompt as one example, or as one example per chunk of its recording."""

    rows: tuple[SalmExample, ...]
    chunks: tuple[Chunk, ...] = ()
    """The chunk of each example; empty for a prompt without long audio."""

    def join(self, responses: Sequence[np.ndarray], coder: TextCoder, stops: Sequence[int]) -> list:
        """Ids of the whole response: the joined text, then the end token of the last chunk if any.

        `stops` are the end tokens.
        """
        if not self.chunks:
            return responses[0].tolist()
        ends = responses[-1][-1:].tolist()
        texts = [
            coder.ids_to_text([i for i in ids.tolist() if i not in stops]) for ids in responses
        ]
        return [*coder.text_to_ids(join(texts, self.chunks)), *(i for i in ends if i in stops)]


def split_long_audio(example: SalmExample, max_s: float | None, rate_hz: int) -> ChunkedPrompt:
    """Cuts the recording of a prompt into chunks if it is longer than `max_s`.

    Logs a warning if it does. Raises ValueError for a prompt with several recordings if one of them
    is too long.
    """
    too_long = [len(a) / rate_hz for a in example.audio if max_s and len(a) > int(max_s * rate_hz)]
    if not too_long:
        return ChunkedPrompt((example,))
    if len(example.audio) > 1:
        raise ValueError(
            f"{example.id}: one of its {len(example.audio)} recordings has {too_long[0]:.1f} s, "
            f"more than max_audio_s={max_s:g}, and only a prompt with one recording can be split "
            "into chunks; use one prompt per recording, shorten it, or raise max_audio_s "
            "(false: no limit)"
        )
    wave = max(example.audio, key=len)
    chunks = cut(wave, rate_hz=rate_hz, max_s=max_s)
    log.warning(
        "%s: %.1f s of audio are more than max_audio_s=%g; split into %d overlapping chunks, whose "
        "texts are joined",
        *(example.id, too_long[0], max_s, len(chunks)),
    )
    rows = tuple(replace(example, audio=(wave[c.start : c.end],)) for c in chunks)
    return ChunkedPrompt(rows, tuple(chunks))


def draw_number(prompt: int, chunk: int) -> int:
    """The number that seeds a chunk's random draws. The first chunk has the prompt's own number."""
    return (prompt + chunk * CHUNK_STRIDE) % 2**31


def refuse_long_audio(examples: Sequence[SalmExample], max_s: float | None, rate_hz: int) -> None:
    """Raises ValueError for a prompt that would be split into chunks; `stream` cannot join them."""
    for example in examples:
        seconds = max(map(len, example.audio), default=0) / rate_hz
        if max_s and seconds > max_s:
            raise ValueError(
                f"{example.id}: {seconds:.1f} s of audio are more than max_audio_s={max_s:g}, and "
                "a response joined from chunks cannot be streamed; use generate, or raise "
                "max_audio_s (false: no limit)"
            )


def check(request: GenerationRequest) -> None:
    """Raises ValueError for a setting that is not supported with chunks."""
    if request.decoding.return_sequences > 1:
        raise ValueError(
            "num_return_sequences: a recording longer than max_audio_s has one response, joined "
            "from its chunks; leave it out, or raise max_audio_s"
        )
    if request.decoding.keeps_logprobs:
        raise ValueError(
            "token_logprobs: the response to a recording longer than max_audio_s is joined from "
            "chunks and has none; cut the recording, or raise max_audio_s"
        )
    if request.returns_dict and request.decoding.beams is not None:
        raise ValueError(
            "return_dict_in_generate: the response to a recording longer than max_audio_s is "
            "joined from chunks and has no score; leave it out, or raise max_audio_s"
        )


def generate_chunked(
    prompts: Sequence[ChunkedPrompt],
    numbers: Sequence[int],
    request: GenerationRequest,
    run: RunGeneration,
    coder: TextCoder,
) -> Int32[np.ndarray, "B T"]:
    """Generates for prompts of which some are split into chunks. Pads the ids on the right.

    `numbers` seed the random draws of the prompts. Chunks of similar length share a batch of at
    most CHUNKS_AT_ONCE. The last batch is filled up with copies, so that all batches have the same
    size. A time limit holds for all batches together.
    """
    check(request)
    deadline_s = time.monotonic() + (request.max_time_s or 0)
    rows = [(p, n) for p, prompt in enumerate(prompts) for n in range(len(prompt.rows))]
    rows.sort(key=lambda row: -sum(map(len, prompts[row[0]].rows[row[1]].audio)))
    at_once = -(-len(rows) // -(-len(rows) // CHUNKS_AT_ONCE))
    responses: dict[tuple[int, int], np.ndarray] = {}
    for start in range(0, len(rows), at_once):
        chosen = rows[start : start + at_once]
        filled = chosen + chosen[-1:] * (at_once - len(chosen))
        if request.max_time_s is not None:
            request = replace(request, max_time_s=max(deadline_s - time.monotonic(), 1e-9))
        sequence_ids = np.array([draw_number(numbers[p], n) for p, n in filled], np.int32)
        *_, output = run(
            [prompts[p].rows[n] for p, n in filled], request, sequence_ids=sequence_ids
        )
        for row, ids, length in zip(chosen, output.ids, output.lengths, strict=False):
            responses[row] = ids[:length]
    stops = request.decoding.stop_ids
    joined = [
        prompt.join([responses[p, n] for n in range(len(prompt.rows))], coder, stops)
        for p, prompt in enumerate(prompts)
    ]
    return pad_right(joined, request.decoding.pad_id, dtype=np.int32)[0]
