"""The sequences of one request: their jobs for the device thread, and what comes back."""

import asyncio
import bisect
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float32, Int32

from speechlm2_jax.batches import SalmExample
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.generate import PromptInputs, prepare_prompts
from speechlm2_jax.inference.long_form.chunked import draw_number
from speechlm2_jax.inference.prompts import Dialog
from speechlm2_jax.serving.api_errors import ApiError, bad
from speechlm2_jax.serving.jobs import Clip, Progress, Sampling, ServedJob
from speechlm2_jax.serving.service import Service
from speechlm2_jax.serving.shapes import TooLongError


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a request asks for."""

    dialog: Dialog
    limit: int
    """Largest number of new tokens of each sequence."""
    keys: tuple[bytes, ...] = ()
    """The key of each recording (`DecodedAudio.key`)."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    is_streamed: bool = False
    received_s: float = field(default_factory=time.monotonic)
    """When the body of the request had been read, by the monotonic clock."""


@dataclass(frozen=True)
class ResponsePart:
    """The response to one part of a recording, or to the whole."""

    ids: Int32[np.ndarray, " T"]
    """Without the end token."""
    logprobs: Float32[np.ndarray, " T"]
    text: str
    is_open: bool
    """Whether it was ended by the limit of tokens."""


@dataclass(kw_only=True)
class Outcome:
    """A whole response."""

    text: str
    finish_reason: str
    """stop or length."""
    prompt_tokens: int
    completion_tokens: int
    audio_s: float
    parts: list[ResponsePart]


def engine_of(service: Service) -> Engine:
    """The model, for a request that was let in: it is finished also while the server shuts down."""
    assert service.engine is not None
    return service.engine


async def prepared(engine: Engine, ask: Ask) -> SalmExample:
    """The tokenized prompt. Raises ApiError for one that cannot be."""
    try:
        (example,), _ = await asyncio.to_thread(prepare_prompts, engine, PromptInputs([ask.dialog]))
    except ValueError as error:
        raise bad(str(error).removeprefix("prompt 0: ").removeprefix("prompt 0 ")) from error
    return example


class RowRuns:
    """Runs the rows of one request: its prompt, or one row for each part of its recording.

    `spans` are the first sample, and the sample after the last, of each part.
    """

    def __init__(
        self,
        service: Service,
        ask: Ask,
        rows: Sequence[SalmExample],
        spans: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.engine = engine_of(service)
        self.ask, self.rows, self._spans = ask, rows, spans
        self.parts: dict[int, ResponsePart] = {}
        self.ids: dict[int, np.ndarray] = {}
        """What was generated, with the end token."""
        self.text = ""
        """The whole response; set by what runs the rows."""
        self._service = service
        self._jobs: list[ServedJob] = []
        self._positions: dict[int, int] = {}

    async def events(
        self, deltas: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str | Outcome, None]:
        """Yields new text as it comes, and at the end the outcome; then the slots are free."""
        metrics, is_first = self._service.metrics, True
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    if is_first:
                        metrics.first_token_s.observe(time.monotonic() - self.ask.received_s)
                    is_first = False
                    yield delta
            outcome = self._outcome()
            metrics.count_audio(outcome.audio_s, time.monotonic() - self.ask.received_s)
            yield outcome
        finally:
            self._cancel()

    @asynccontextmanager
    async def started(
        self, number: int, is_streamed: bool, avoids_loops: bool = False
    ) -> AsyncIterator[AsyncIterator[Progress]]:
        """Submits the job of a row; gives its progress until the block is left."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Progress]()
        row, ask, scheduler = self.rows[number], self.ask, self._service.scheduler
        assert scheduler is not None
        job = ServedJob(
            tokens=row.tokens,
            clips=tuple(self._clip(number, n) for n in range(len(row.audio))),
            limit=ask.limit,
            sampling=replace(ask.sampling, draw=draw_number(0, number), avoids_loops=avoids_loops),
            report=lambda progress: loop.call_soon_threadsafe(queue.put_nowait, progress),
            is_streamed=is_streamed,
        )
        try:
            self._positions[number] = scheduler.submit(job)
        except TooLongError as error:
            raise bad(str(error), code="context_length_exceeded") from error
        self._jobs.append(job)

        async def progresses() -> AsyncIterator[Progress]:
            since_s, count = time.monotonic(), 0
            while True:
                progress = await queue.get()
                new, now_s = len(progress.ids) - count, time.monotonic()
                if count and new > 0:
                    self._service.metrics.interval_s.observe((now_s - since_s) / new)
                since_s, count = now_s, count + new
                if progress.error is not None:
                    raise ApiError(500, f"the model failed: {progress.error}")
                yield progress
                if progress.is_last:
                    return

        try:
            yield progresses()
        finally:
            scheduler.cancel(job)

    async def run(self, number: int, avoids_loops: bool = False) -> None:
        """Runs a row to its end; what it had generated before is replaced."""
        async with self.started(number, False, avoids_loops) as progresses:
            async for progress in progresses:
                if progress.is_last:
                    self.finish(number, progress)

    def finish(self, number: int, progress: Progress, stopped: str | None = None) -> None:
        """Keeps the response to a row; only what is needed for the text `stopped`, if given."""
        ids = self.without_end(progress.ids)
        is_open = stopped is None and len(ids) == len(progress.ids)
        if stopped is not None:
            ids = ids[: _tokens_of(stopped, ids, self.engine.tokenizer.ids_to_text)]
        text = self.engine.tokenizer.ids_to_text(ids)
        self.parts[number] = ResponsePart(ids, progress.logprobs[: len(ids)], text, is_open)
        self.ids[number] = progress.ids

    def without_end(self, ids: np.ndarray) -> np.ndarray:
        """The tokens of the text."""
        return ids[~np.isin(ids, [*self.engine.end_ids, self.engine.text_pad_id])]

    def _outcome(self) -> Outcome:
        parts = [self.parts[n] for n in range(len(self.rows))]
        samples = sum(len(a) for row in self.rows for a in row.audio)
        return Outcome(
            text=self.text,
            finish_reason="length" if any(part.is_open for part in parts) else "stop",
            prompt_tokens=sum(self._positions.values()),
            completion_tokens=sum(map(len, self.ids.values())),
            audio_s=samples / self.engine.sampling_rate,
            parts=parts,
        )

    def _cancel(self) -> None:
        """Frees the slots of jobs that have not ended."""
        scheduler = self._service.scheduler
        for job in self._jobs:
            if scheduler is not None:
                scheduler.cancel(job)

    def _clip(self, number: int, n: int) -> Clip:
        samples, keys = self.rows[number].audio[n], self.ask.keys
        key = keys[n] if n < len(keys) else None
        if key is not None and self._spans:
            start, end = self._spans[number]
            key += f"{start}:{end}".encode()
        return Clip(samples=samples, key=key)


def _tokens_of(text: str, ids: np.ndarray, to_text: Callable[[np.ndarray], str]) -> int:
    """The smallest number of the first tokens whose text holds `text`, its beginning."""
    return bisect.bisect_left(
        range(len(ids)), True, key=lambda n: to_text(ids[:n]).startswith(text)
    )
