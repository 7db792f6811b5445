"""Answers about recordings that are too long to be heard at once: chunk by chunk, then joined."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm2_jax.batches import SalmExample
from speechlm2_jax.inference.long_form.chunks import Chunk, cut
from speechlm2_jax.inference.long_form.join_texts import join
from speechlm2_jax.inference.request.generation_request import GenerationRequest
from speechlm2_jax.inference.text_stream import PartialOutput

CHUNKS_AT_ONCE = 8
"""Rows of a batch: what memory holds, however long the recordings are."""
CHUNK_STRIDE = 1 << 16
"""Between the numbers of a prompt's chunks, by which random draws go; prompts lie between."""


@runtime_checkable
class TextCoder(Protocol):
    """What turns ids into text and back."""

    def ids_to_text(self, ids: Any) -> str:
        """Decodes one row, without special tokens."""
        ...

    def text_to_ids(self, text: str) -> list[int]:
        """Encodes one text."""
        ...


Speak = Callable[..., Iterator[PartialOutput]]
"""Examples, request and `row_ids` -> how far their answers are."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChunkedPrompt:
    """One prompt as the rows that answer it: one, or one per chunk of its recording."""

    rows: tuple[SalmExample, ...]
    chunks: tuple[Chunk, ...] = ()
    """Of a prompt that is answered in chunks, those of its rows."""

    def join(self, answers: Sequence[np.ndarray], coder: TextCoder, stops: Sequence[int]) -> list:
        """Ids of the whole answer: of a joined text, and its end if the last chunk's has one."""
        if not self.chunks:
            return answers[0].tolist()
        ends = answers[-1][-1:].tolist()
        texts = [coder.ids_to_text([i for i in ids.tolist() if i not in stops]) for ids in answers]
        return [*coder.text_to_ids(join(texts, self.chunks)), *(i for i in ends if i in stops)]


def in_parts(example: SalmExample, max_s: float | None, rate_hz: int) -> ChunkedPrompt:
    """Cuts the recording of a prompt where it exceeds `max_s` seconds, and logs that.

    Raises ValueError for a prompt with several recordings of which one is too long.
    """
    too_long = [len(a) / rate_hz for a in example.audio if max_s and len(a) > int(max_s * rate_hz)]
    if not too_long:
        return ChunkedPrompt((example,))
    if len(example.audio) > 1:
        raise ValueError(
            f"{example.id}: one of its {len(example.audio)} recordings has {too_long[0]:.1f} s, "
            f"more than max_audio_s={max_s:g}, and only a prompt with one recording can be "
            "answered in chunks; ask about each by itself, shorten it, or raise max_audio_s "
            "(false: no limit)"
        )
    wave = max(example.audio, key=len)
    chunks = cut(wave, rate_hz=rate_hz, max_s=max_s)
    log.warning(
        "%s: %.1f s of audio are more than max_audio_s=%g; answered in %d overlapping chunks, "
        "whose texts are joined",
        *(example.id, too_long[0], max_s, len(chunks)),
    )
    rows = tuple(replace(example, audio=(wave[c.start : c.end],)) for c in chunks)
    return ChunkedPrompt(rows, tuple(chunks))


def row_number(prompt: int, chunk: int) -> int:
    """The number by which a row's random draws go: the prompt's own for a first chunk."""
    return (prompt + chunk * CHUNK_STRIDE) % 2**31


def refuse(examples: Sequence[SalmExample], max_s: float | None, rate_hz: int) -> None:
    """Raises ValueError if a prompt would have to be answered in chunks, for a stream."""
    for example in examples:
        seconds = max(map(len, example.audio), default=0) / rate_hz
        if max_s and seconds > max_s:
            raise ValueError(
                f"{example.id}: {seconds:.1f} s of audio are more than max_audio_s={max_s:g}, and "
                "an answer joined from chunks cannot be streamed; use generate, or raise "
                "max_audio_s (false: no limit)"
            )


def check(request: GenerationRequest) -> None:
    """Raises ValueError for what answers of joined chunks cannot have."""
    if request.decoding.answers > 1:
        raise ValueError(
            "num_return_sequences: a recording longer than max_audio_s has one answer, joined from "
            "its chunks; leave it out, or raise max_audio_s"
        )
    if request.returns_dict and request.decoding.beams is not None:
        raise ValueError(
            "return_dict_in_generate: the answer to a recording longer than max_audio_s is joined "
            "from chunks and has no score; leave it out, or raise max_audio_s"
        )


def generate_chunked(
    prompts: Sequence[ChunkedPrompt],
    numbers: Sequence[int],
    request: GenerationRequest,
    speak: Speak,
    coder: TextCoder,
) -> np.ndarray:
    """Answers prompts of which some are in chunks: ids [B, T], padded on the right.

    `numbers` are those by which the prompts' random draws go.
    Rows of like length go together, CHUNKS_AT_ONCE of them; a last batch is filled up, so that
    batches share their static shapes. Time limits are those of the whole.
    """
    check(request)
    deadline_s = time.monotonic() + (request.max_time_s or 0)
    rows = [(p, n) for p, parts in enumerate(prompts) for n in range(len(parts.rows))]
    rows.sort(key=lambda row: -sum(map(len, prompts[row[0]].rows[row[1]].audio)))
    at_once = -(-len(rows) // -(-len(rows) // CHUNKS_AT_ONCE))
    answers: dict[tuple[int, int], np.ndarray] = {}
    for start in range(0, len(rows), at_once):
        chosen = rows[start : start + at_once]
        filled = chosen + chosen[-1:] * (at_once - len(chosen))
        if request.max_time_s is not None:
            request = replace(request, max_time_s=max(deadline_s - time.monotonic(), 1e-9))
        row_ids = np.array([row_number(numbers[p], n) for p, n in filled], np.int32)
        *_, spoken = speak([prompts[p].rows[n] for p, n in filled], request, row_ids=row_ids)
        for row, ids, length in zip(chosen, spoken.ids, spoken.lengths, strict=False):
            answers[row] = ids[:length]
    stops = request.decoding.stop_ids
    joined = [
        parts.join([answers[p, n] for n in range(len(parts.rows))], coder, stops)
        for p, parts in enumerate(prompts)
    ]
    ids = np.full((len(joined), max(map(len, joined))), request.decoding.pad_id, np.int32)
    for row, said in zip(ids, joined, strict=True):
        row[: len(said)] = said
    return ids
