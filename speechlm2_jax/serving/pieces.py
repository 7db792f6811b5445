"""Transcription of a recording of any length, as `SALM.transcribe` does it: cut at pauses."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from speechlm2_jax.inference.long_form.pauses import Stretch
from speechlm2_jax.inference.long_form.repetition import has_loop, without_loop
from speechlm2_jax.inference.recordings_to_text import joined_texts, speech_parts
from speechlm2_jax.inference.text_stream import GrowingText
from speechlm2_jax.serving.responses import row_tasks
from speechlm2_jax.serving.rows import Ask, Outcome, RowRuns, engine_of, prepared
from speechlm2_jax.serving.service import Service

log = logging.getLogger(__name__)


async def cut(service: Service, wave: np.ndarray) -> list[Stretch]:
    """The parts of a recording with speech, each at most `--max-audio-s` long."""
    engine = engine_of(service)
    most_s = service.options.max_audio_s
    return await asyncio.to_thread(speech_parts, wave, rate_hz=engine.sampling_rate, max_s=most_s)


async def transcribe_parts(
    service: Service, ask: Ask, parts: Sequence[Stretch]
) -> AsyncGenerator[str | Outcome, None]:
    """Yields new text as it comes (if `ask.is_streamed`), and at the end the outcome.

    The deltas join to the text of the outcome, unless the model repeats itself over the first part:
    then its deltas end there, and the outcome has another text. The first part is streamed token by
    token, the others part by part. Closing the iterator frees the slots. Raises ApiError.
    """
    engine = engine_of(service)
    example = await prepared(engine, ask)
    (wave,) = example.audio
    rows = [replace(example, audio=(wave[part.start : part.end],)) for part in parts]
    runs = RowRuns(service, ask, rows, [(part.start, part.end) for part in parts])
    async with aclosing(runs.events(_deltas(runs))) as events:
        async for event in events:
            yield event


def text_of_part(text: str) -> str:
    """The text of a part as it is written: without white space around it, a loop once."""
    return (without_loop(text) if has_loop(text) else text).strip()


async def _deltas(runs: RowRuns) -> AsyncGenerator[str, None]:
    first: asyncio.Queue[str | None] = asyncio.Queue()
    is_streamed = runs.ask.is_streamed

    async def run(number: int) -> None:
        try:
            if number or not is_streamed:
                await runs.run(number)
            else:
                await _stream_first(runs, first)
        finally:
            if not number:
                first.put_nowait(None)
        if has_loop(runs.parts[number].text):
            log.warning("the model repeated itself over a part; its text is generated again")
            await runs.run(number, avoids_loops=True)

    async with row_tasks(runs, run) as tasks:
        is_begun = False
        while is_streamed and tasks and (delta := await first.get()) is not None:
            yield delta
            is_begun = True
        texts = []
        for number, task in enumerate(tasks):
            await task
            text = text_of_part(runs.parts[number].text)
            texts.append(text)
            if is_streamed and number and text:
                yield f" {text}" if is_begun else text
                is_begun = True
    runs.text = joined_texts(texts)


async def _stream_first(runs: RowRuns, deltas: asyncio.Queue[str | None]) -> None:
    """Runs the first part; its text comes without white space around it, up to a loop."""
    growing, text, sent = GrowingText(runs.engine.tokenizer), "", ""
    async with runs.started(0, True) as progresses:
        async for progress in progresses:
            text += growing.add(runs.without_end(progress.ids), progress.is_last)
            shown = text.strip()
            if len(shown) > len(sent) and not has_loop(shown):
                deltas.put_nowait(shown[len(sent) :])
                sent = shown
            if progress.is_last:
                runs.finish(0, progress)
