"""Responses to dialogs, with their text as it comes: what `SALM.generate` gives."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

import numpy as np

from speechlm2_jax.inference.long_form import chunked
from speechlm2_jax.inference.long_form.chunks import Chunk
from speechlm2_jax.inference.text_stream import GrowingText
from speechlm2_jax.serving.api_errors import bad
from speechlm2_jax.serving.rows import Ask, Outcome, RowRuns, engine_of, prepared
from speechlm2_jax.serving.service import Service
from speechlm2_jax.serving.stop_strings import StoppedText


async def respond(service: Service, ask: Ask) -> AsyncGenerator[str | Outcome, None]:
    """Yields new text as it comes (if `ask.is_streamed`), and at the end the outcome.

    Closing the iterator frees the slots. Raises ApiError.
    """
    engine = engine_of(service)
    example, most_s = await prepared(engine, ask), service.options.max_audio_s
    try:
        prompt = await asyncio.to_thread(
            chunked.split_long_audio, example, most_s, engine.sampling_rate
        )
    except ValueError as error:
        raise bad(str(error).removeprefix("prompt 0: ")) from error
    chunks = prompt.chunks
    runs = RowRuns(service, ask, prompt.rows, [(chunk.start, chunk.end) for chunk in chunks])
    deltas = _of_chunks(runs, chunks) if chunks else _of_whole(runs)
    async with aclosing(runs.events(deltas)) as events:
        async for event in events:
            yield event


async def outcome_of(events: AsyncGenerator[str | Outcome, None]) -> Outcome:
    """The whole response. Raises ApiError."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Outcome):
                return event
    raise AssertionError("a response without an outcome")


async def _of_whole(runs: RowRuns) -> AsyncGenerator[str, None]:
    """Runs the only row; yields its text as it comes."""
    ask = runs.ask
    growing = GrowingText(runs.engine.tokenizer)
    shown = StoppedText(ask.stop)
    async with runs.started(0, ask.is_streamed or bool(ask.stop)) as progresses:
        async for progress in progresses:
            ids = runs.without_end(progress.ids)
            delta = shown.add(growing.add(ids, progress.is_last), progress.is_last)
            if delta and ask.is_streamed:
                yield delta
            if progress.is_last or shown.is_stopped:
                runs.finish(0, progress, shown.text if shown.is_stopped else None)
                runs.text = shown.text if shown.is_stopped else runs.parts[0].text
                return


async def _of_chunks(runs: RowRuns, chunks: Sequence[Chunk]) -> AsyncGenerator[str, None]:
    """Runs the chunks of a long recording; yields words that no later chunk can change."""
    assert not runs.ask.stop  # refused by the endpoint
    sent, last = "", len(chunks)
    async with row_tasks(runs, runs.run) as tasks:
        for count, task in enumerate(tasks, 1):
            await task
            if runs.ask.is_streamed and count < last:
                fixed = _fixed_text(runs, chunks, count)
                if len(fixed) > len(sent):
                    yield fixed[len(sent) :]
                    sent = fixed
    runs.text = _joined(runs, chunks, last)
    if runs.ask.is_streamed and runs.text.startswith(sent):
        yield runs.text[len(sent) :]


@asynccontextmanager
async def row_tasks(
    runs: RowRuns, run: Callable[[int], Awaitable[None]]
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """A task for each row, which awaits `run` of its number; a few run at once.

    All have ended when the block is left: those that run are cancelled.
    """
    places = asyncio.Semaphore(chunked.CHUNKS_AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await run(number)

    tasks = [asyncio.create_task(one(n)) for n in range(len(runs.rows))]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _joined(runs: RowRuns, chunks: Sequence[Chunk], count: int) -> str:
    """The joined text of the first `count` chunks, as `SALM.generate` joins it."""
    stops, tokenizer = runs.engine.end_ids, runs.engine.tokenizer
    prompt = chunked.ChunkedPrompt(tuple(runs.rows[:count]), tuple(chunks[:count]))
    ids = prompt.join([runs.ids[n] for n in range(count)], tokenizer, stops)
    return tokenizer.ids_to_text(runs.without_end(np.asarray(ids, np.int32)))


def _fixed_text(runs: RowRuns, chunks: Sequence[Chunk], count: int) -> str:
    """The words of the first `count` chunks that later chunks cannot change."""
    last = len(runs.parts[count - 1].text.split())
    words = _joined(runs, chunks, count).split()
    return " ".join(words[: max(len(words) - last, 0)])
