"""What the page shows of one data set: figures, histograms, and its first conversations."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from speechlm2_jax.data.bucketing import Measures, describe
from speechlm2_jax.data.conversations import AudioTurn, Conversation
from speechlm2_jax.data.datamodule import DataModule
from speechlm2_jax.data.duplex.conversations import DuplexConversation
from speechlm2_jax.data.index.contents import IndexedContents
from speechlm2_jax.data.prepare import Prepared
from speechlm2_jax.data.tokenizer import Tokenizer

BINS = 32
"""Bars of a histogram."""
BATCHES = 500
"""Padding is that of so many batches."""


@dataclass(frozen=True, kw_only=True)
class ShownToken:
    """One token of a prompt."""

    text: str
    is_trained: bool
    """Whether the loss counts it."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A conversation as the page shows it."""

    id: str
    bucket: int
    batch: int
    seconds: float
    positions: int
    pieces: tuple[ShownToken, ...]
    texts: tuple[tuple[str, str], ...]
    """(speaker, text) of duplex turns, which have no prompt."""
    read: Callable[[int], Float[np.ndarray, " S"]]
    """Sampling rate in Hz -> its recordings, one after another; a duplex one mixed."""


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Shares of the batches that are padding, 0 to 1."""

    positions: float
    audio: float | None
    """None for data without clips."""
    batches: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A planned batch, and the lengths of what it holds."""

    number: int
    bucket: int
    indices: tuple[int, ...]
    groups: int
    measures: Measures


def planned_batches(datamodule: DataModule, name: str, count: int = BATCHES) -> list[Batch]:
    """The first batches of a pass over a data set."""
    contents = datamodule.prepared(name).contents
    plans = enumerate(itertools.islice(datamodule.plans(name), count))
    found: list[Batch] = []
    for number, plan in plans:
        indices = tuple(i for group in plan.groups for i in group)
        found.append(
            Batch(
                number=number,
                bucket=plan.bucket,
                indices=indices,
                groups=len(plan.groups),
                measures=_measured(contents, indices),
            )
        )
    return found


def _measured(contents: Any, indices: Sequence[int]) -> Measures:
    """Lengths of some conversations."""
    if isinstance(contents, IndexedContents):
        return contents.measured(indices)
    return contents.measures.take(np.asarray(indices, np.int64))


def padding(prepared: Prepared, batches: Sequence[Batch]) -> Padding:
    """Measures batches; audio as if all clips of one row were as long as the longest."""
    used, had, with_audio, room = 0, 0, 0, 0
    for batch in batches:
        shape: Any = prepared.sampler.plan.buckets[batch.bucket].shape
        used += int(batch.measures.positions.sum())
        had += batch.groups * shape.sequences * shape.tokens
        with_audio += int((batch.measures.samples * batch.measures.clips).sum())
        room += batch.groups * shape.clips * getattr(shape, "samples", 0)
    return Padding(
        positions=1 - used / max(had, 1),
        audio=1 - with_audio / room if room else None,
        batches=len(batches),
    )


def histogram(values: Real[np.ndarray, " N"], unit: str) -> dict[str, Any]:
    """Bars of equal width up to the largest value: heights in percent of the highest."""
    counts, edges = np.histogram(values, bins=BINS, range=(0, max(float(values.max()), 1e-9)))
    highest = max(int(counts.max()), 1)
    bars = [
        {
            "height": 100 * int(n) / highest,
            "title": f"{low:.4g} to {high:.4g} {unit}: {int(n):,}",
        }
        for n, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
    quantiles = np.quantile(values, [0.05, 0.5, 0.95])
    return {
        "bars": bars,
        "last": f"{edges[-1]:.4g} {unit}",
        "note": "5 %, median, 95 %: " + ", ".join(f"{q:.4g}" for q in quantiles) + f" {unit}",
    }


def plan_table(prepared: Prepared) -> str:
    """The buckets as a table of text."""
    contents: Any = prepared.contents
    return describe(prepared.sampler.plan, contents.columns)


def examples(
    prepared: Prepared, batches: Sequence[Batch], tokenizer: Tokenizer, count: int
) -> Iterator[Example]:
    """The first conversations of batches."""
    places = ((batch, n) for batch in batches for n in range(len(batch.indices)))
    for batch, n in itertools.islice(places, count):
        conversation: Any = prepared.contents.conversations[batch.indices[n]]
        is_duplex = isinstance(conversation, DuplexConversation)
        turns = conversation.turns if is_duplex else ()
        yield Example(
            id=conversation.id,
            bucket=batch.bucket,
            batch=batch.number,
            seconds=conversation.duration_s if is_duplex else conversation.audio_duration_s,
            positions=int(batch.measures.positions[n]),
            pieces=() if is_duplex else pieces(conversation, tokenizer),
            texts=tuple((str(turn.speaker), turn.text) for turn in turns),
            read=_mixed(conversation) if is_duplex else _joined(conversation),
        )


def pieces(conversation: Conversation, tokenizer: Tokenizer) -> tuple[ShownToken, ...]:
    """The tokens of a conversation as texts, and which of them the loss counts."""
    prompt = conversation.prompt
    if prompt is None:
        return ()
    ids = [int(i) for i in prompt.input_ids]
    mask = np.zeros(len(ids), bool) if prompt.mask is None else prompt.mask
    tags = {turn.locator_tag for turn in conversation.turns if isinstance(turn, AudioTurn)}
    ends = [
        tokenizer.ids_to_text(ids[:n], remove_special_tokens=False) for n in range(len(ids) + 1)
    ]
    found: list[ShownToken] = []
    for before, after, one, is_trained in zip(ends, ends[1:], ids, mask, strict=False):
        text = after[len(before) :] if after.startswith(before) else ""
        text = text or tokenizer.ids_to_tokens([one])[0]
        shown = f" {text.strip()} " if text.strip() in tags else text
        found.append(ShownToken(text=shown, is_trained=bool(is_trained)))
    return tuple(found)


def _joined(conversation: Conversation) -> Callable[[int], Float[np.ndarray, " S"]]:
    def read(rate_hz: int) -> np.ndarray:
        waves = [clip.load(rate_hz) for clip in conversation.clips]
        return np.concatenate([np.zeros(0, np.float32), *waves])

    return read


def _mixed(conversation: DuplexConversation) -> Callable[[int], Float[np.ndarray, " S"]]:
    def read(rate_hz: int) -> np.ndarray:
        waves = [clip.load(rate_hz) for clip in (conversation.source, conversation.target)]
        mixed = np.zeros(max(map(len, waves)), np.float32)
        for wave in waves:
            mixed[: len(wave)] += wave / 2
        return mixed

    return read
