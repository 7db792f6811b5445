"""Responses to dialogs: jobs for the device thread, and their text as it comes."""

import asyncio
import bisect
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from speechlm2_jax.batches import SalmExample
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.generate import PromptInputs, prepare_prompts
from speechlm2_jax.inference.long_form import chunked
from speechlm2_jax.inference.long_form.chunks import Chunk
from speechlm2_jax.inference.prompts import Dialog
from speechlm2_jax.inference.text_stream import GrowingText
from speechlm2_jax.serving.api_errors import ApiError, bad
from speechlm2_jax.serving.jobs import Clip, Progress, Sampling, ServedJob
from speechlm2_jax.serving.service import Service
from speechlm2_jax.serving.shapes import TooLongError
from speechlm2_jax.serving.stop_strings import StoppedText


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a request asks for."""

    dialog: Dialog
    limit: int
    keys: tuple[bytes, ...] = ()
    """The key of each recording (`DecodedAudio.key`)."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    is_streamed: bool = False
    received_s: float = field(default_factory=time.monotonic)
    """When the body of the request had been read, by the monotonic clock."""


@dataclass(frozen=True)
class ResponsePart:
    """The response to one chunk of a recording, or to the whole."""

    ids: np.ndarray
    """Without the end token."""
    logprobs: np.ndarray
    text: str
    chunk: Chunk | None


@dataclass(kw_only=True)
class Outcome:
    """A whole response."""

    text: str
    finish_reason: str
    """stop or length."""
    prompt_tokens: int
    completion_tokens: int
    audio_s: float
    parts: list[ResponsePart] = field(default_factory=list)


async def respond(service: Service, ask: Ask) -> AsyncGenerator[str | Outcome, None]:
    """Yields new text as it comes (if `ask.is_streamed`), and at the end the outcome.

    Closing the iterator frees the slots. Raises ApiError.
    """
    engine, _ = service.ready()
    try:
        rows, chunks = await asyncio.to_thread(_prepared, engine, ask, service.options.max_audio_s)
    except ValueError as error:
        raise bad(str(error).removeprefix("prompt 0: ").removeprefix("prompt 0 ")) from error
    run = _Run(service, engine, ask, rows, chunks)
    try:
        async with aclosing(run.chunked() if chunks else run.whole()) as deltas:
            is_first = True
            async for delta in deltas:
                if is_first:
                    service.metrics.first_token_s.observe(time.monotonic() - ask.received_s)
                is_first = False
                yield delta
        outcome = run.outcome()
        service.metrics.count_audio(outcome.audio_s, time.monotonic() - ask.received_s)
        yield outcome
    finally:
        run.cancel()


async def outcome_of(service: Service, ask: Ask) -> Outcome:
    """The whole response. Raises ApiError."""
    async with aclosing(respond(service, ask)) as events:
        async for event in events:
            if isinstance(event, Outcome):
                return event
    raise AssertionError("a response without an outcome")


def _prepared(
    engine: Engine, ask: Ask, max_audio_s: float
) -> tuple[tuple[SalmExample, ...], tuple[Chunk, ...]]:
    (example,), _ = prepare_prompts(engine, PromptInputs([ask.dialog]))
    prompt = chunked.split_long_audio(example, max_audio_s, engine.sampling_rate)
    return prompt.rows, prompt.chunks


class _Run:
    """The jobs of one request."""

    def __init__(
        self,
        service: Service,
        engine: Engine,
        ask: Ask,
        rows: Sequence[SalmExample],
        chunks: Sequence[Chunk],
    ) -> None:
        self._service, self._engine, self._ask = service, engine, ask
        self._rows, self._chunks = rows, chunks
        self._jobs: list[ServedJob] = []
        self._parts: dict[int, ResponsePart] = {}
        self._ids: dict[int, np.ndarray] = {}
        self._positions = 0
        self._stopped_text: str | None = None

    async def whole(self) -> AsyncGenerator[str, None]:
        """Runs the only row; yields its text as it comes."""
        ask = self._ask
        growing = GrowingText(self._engine.tokenizer)
        shown = StoppedText(ask.stop)
        async with self._started(0, ask.is_streamed or bool(ask.stop)) as progresses:
            async for progress in progresses:
                ids = self._without_end(progress.ids)
                delta = shown.add(growing.add(ids, progress.is_last), progress.is_last)
                if delta and ask.is_streamed:
                    yield delta
                if progress.is_last or shown.is_stopped:
                    self._finish(0, progress, shown.text if shown.is_stopped else None)
                    return

    async def chunked(self) -> AsyncGenerator[str, None]:
        """Runs the chunks of a long recording; yields words that no later chunk can change."""
        assert not self._ask.stop  # refused by the endpoint
        places = asyncio.Semaphore(chunked.CHUNKS_AT_ONCE)

        async def one(number: int) -> None:
            async with places, self._started(number, False) as progresses:
                async for progress in progresses:
                    if progress.is_last:
                        self._finish(number, progress, None)

        sent = ""
        tasks = [asyncio.create_task(one(n)) for n in range(len(self._rows))]
        try:
            for number, task in enumerate(tasks):
                await task
                if self._ask.is_streamed and number + 1 < len(tasks):
                    fixed = self._fixed_text(number + 1)
                    if len(fixed) > len(sent):
                        yield fixed[len(sent) :]
                        sent = fixed
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._ask.is_streamed and (text := self._joined()).startswith(sent):
            yield text[len(sent) :]

    def outcome(self) -> Outcome:
        """The whole response, once all rows have ended."""
        parts = [self._parts[n] for n in range(len(self._rows))]
        text = self._stopped_text if self._stopped_text is not None else self._joined()
        is_open = [
            self._stopped_text is None and len(self._ids[n]) == len(part.ids)
            for n, part in enumerate(parts)
        ]
        rate = self._engine.sampling_rate
        return Outcome(
            text=text,
            finish_reason="length" if any(is_open) else "stop",
            prompt_tokens=self._positions,
            completion_tokens=sum(map(len, self._ids.values())),
            audio_s=sum(len(a) for row in self._rows for a in row.audio) / rate,
            parts=parts,
        )

    def cancel(self) -> None:
        """Frees the slots of jobs that have not ended."""
        scheduler = self._service.scheduler
        for job in self._jobs:
            if scheduler is not None:
                scheduler.cancel(job)

    @asynccontextmanager
    async def _started(
        self, number: int, is_streamed: bool
    ) -> AsyncIterator[AsyncIterator[Progress]]:
        """Submits the job of a row; gives its progress until the block is left."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Progress]()
        row, ask, scheduler = self._rows[number], self._ask, self._service.scheduler
        assert scheduler is not None
        job = ServedJob(
            tokens=row.tokens,
            clips=tuple(self._clip(number, n) for n in range(len(row.audio))),
            limit=ask.limit,
            sampling=replace(ask.sampling, draw=chunked.draw_number(0, number)),
            report=lambda progress: loop.call_soon_threadsafe(queue.put_nowait, progress),
            is_streamed=is_streamed,
        )
        try:
            self._positions += scheduler.submit(job)
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

    def _clip(self, number: int, n: int) -> Clip:
        samples, keys = self._rows[number].audio[n], self._ask.keys
        key = keys[n] if n < len(keys) else None
        if key is not None and self._chunks:
            chunk = self._chunks[number]
            key += f"{chunk.start}:{chunk.end}".encode()
        return Clip(samples=samples, key=key)

    def _finish(self, number: int, progress: Progress, stopped: str | None) -> None:
        ids = self._without_end(progress.ids)
        if stopped is not None:
            ids = ids[: _tokens_of(stopped, ids, self._engine.tokenizer.ids_to_text)]
        text = self._engine.tokenizer.ids_to_text(ids)
        chunk = self._chunks[number] if self._chunks else None
        self._parts[number] = ResponsePart(ids, progress.logprobs[: len(ids)], text, chunk)
        self._ids[number] = progress.ids
        self._stopped_text = stopped

    def _without_end(self, ids: np.ndarray) -> np.ndarray:
        return ids[~np.isin(ids, [*self._engine.end_ids, self._engine.text_pad_id])]

    def _joined(self) -> str:
        """The text of all rows, as `SALM.generate` joins it."""
        return self._text_of(len(self._rows)) if self._chunks else self._parts[0].text

    def _text_of(self, count: int, words: int | None = None) -> str:
        """The joined text of the first `count` chunks; only its first `words`."""
        stops, tokenizer = self._engine.end_ids, self._engine.tokenizer
        prompt = chunked.ChunkedPrompt(tuple(self._rows[:count]), tuple(self._chunks[:count]))
        ids = prompt.join([self._ids[n] for n in range(count)], tokenizer, stops)
        text = tokenizer.ids_to_text(self._without_end(np.asarray(ids, np.int32)))
        return text if words is None else " ".join(text.split()[:words])

    def _fixed_text(self, count: int) -> str:
        """The words of the first `count` chunks that later chunks cannot change."""
        last = len(self._parts[count - 1].text.split())
        return self._text_of(count, max(len(self._text_of(count).split()) - last, 0))


def _tokens_of(text: str, ids: np.ndarray, to_text: Callable[[np.ndarray], str]) -> int:
    """The smallest number of the first tokens whose text holds `text`, its beginning."""
    return bisect.bisect_left(
        range(len(ids)), True, key=lambda n: to_text(ids[:n]).startswith(text)
    )
