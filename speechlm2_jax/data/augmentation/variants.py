"""The examples that augmentation makes of a conversation, with the lengths that they will have.

Nothing is read here: at other speeds, truncated, in windows or padded, a conversation is planned
for like any other.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from speechlm2_jax.data.augmentation.changes import ClipChanges, Direction
from speechlm2_jax.data.augmentation.config import AugmentationConfig
from speechlm2_jax.data.augmentation.effects import changed_length
from speechlm2_jax.data.config import DataLoaderConfig, LoaderConfig
from speechlm2_jax.data.conversations import AudioClip, AudioTurn, Conversation

SPEEDS = (1.0, 0.9, 1.1)
"""NeMo's: each conversation as it is, slower and faster."""
_CHANGE_LENGTHS = ("truncate_duration", "cut_into_windows_duration", "pad_min_duration")


def variants(
    conversation: Conversation,
    config: AugmentationConfig,
    sample_rate_hz: int,
    speeds: Sequence[float],
) -> list[Conversation]:
    """All examples of a conversation: at each speed, cut off or in windows, padded."""
    return [
        _padded(window, config)
        for speed in speeds
        for window in _windows(
            _truncated(_at_speed(conversation, speed, sample_rate_hz), config), config
        )
    ]


def with_variants(
    conversations: Sequence[Conversation], config: DataLoaderConfig
) -> Sequence[Conversation]:
    """Those of many conversations.

    Speeds are spread: each shard comes once per speed, and neighbours have different ones.
    """
    speeds = speeds_of(config)
    if not changed_by(config):
        return conversations
    return [
        one
        for shard in _shards(conversations)
        for turn in range(len(speeds))
        for number, conversation in enumerate(shard)
        for one in variants(
            conversation, config, config.sample_rate, [speeds[(number + turn) % len(speeds)]]
        )
    ]


def speeds_of(config: DataLoaderConfig) -> tuple[float, ...]:
    """How fast each conversation comes."""
    return SPEEDS if config.perturb_speed else (1.0,)


def changed_by(config: LoaderConfig) -> list[str]:
    """The settings that make other examples of conversations, of other lengths."""
    names = ("perturb_speed", *_CHANGE_LENGTHS)
    return [name for name in names if getattr(config, name, None)]


def unindexed(config: LoaderConfig) -> list[str]:
    """Those of them that make more or fewer examples, by more than the lengths in an index."""
    drops = config.truncate_duration and not config.keep_excessive_supervisions
    windows = config.cut_into_windows_duration
    found = {"cut_into_windows_duration": windows, "keep_excessive_supervisions": drops}
    return [name for name, is_set in found.items() if is_set]


def faster(clip: AudioClip, speed: float, sample_rate_hz: int) -> AudioClip:
    """A recording played so many times as fast."""
    samples = changed_length(clip.samples(sample_rate_hz), speed)
    changes = ClipChanges(read_s=clip.duration_s, speed=speed)
    return replace(clip, duration_s=samples / sample_rate_hz, changes=changes)


def shortened(clip: AudioClip, start_s: float, duration_s: float, room_s: float = 0.0) -> AudioClip:
    """A stretch of a recording, whose start may be moved by up to `room_s` seconds at random."""
    changes = clip.changes or ClipChanges(read_s=clip.duration_s)
    speed, room_s = changes.speed, changes.room_s + room_s * changes.speed
    changes = replace(changes, read_s=duration_s * speed, room_s=room_s)
    source = replace(clip, duration_s=clip.changes.read_s) if clip.changes else clip
    part = source.stretch(start_s * speed, duration_s * speed)
    return replace(part, duration_s=duration_s, changes=changes)


def padded(clip: AudioClip, duration_s: float, direction: Direction) -> AudioClip:
    """A recording with silence, up to a length."""
    changes = clip.changes or ClipChanges(read_s=clip.duration_s)
    return replace(clip, duration_s=duration_s, changes=replace(changes, padding=direction))


def truncation(duration_s: float, config: AugmentationConfig) -> tuple[float, float]:
    """Where the stretch begins that `truncate_duration` leaves, and its room, in seconds."""
    assert config.truncate_duration is not None
    left_s = duration_s - config.truncate_duration
    start_s = left_s if config.truncate_offset_type == "end" else 0.0
    return start_s, left_s if config.truncate_offset_type == "random" else 0.0


def windows(duration_s: float, config: AugmentationConfig) -> list[tuple[float, float]]:
    """Start and length of each window of a recording, in seconds, as Lhotse counts them."""
    from lhotse.utils import compute_num_windows

    width_s = config.cut_into_windows_duration
    assert width_s is not None
    hop_s = config.cut_into_windows_hop or width_s
    starts = [n * hop_s for n in range(compute_num_windows(duration_s, width_s, hop_s))]
    return [(start_s, round(min(width_s, duration_s - start_s), 8)) for start_s in starts]


def _with_clips(
    conversation: Conversation, change: Callable[[AudioClip], AudioClip]
) -> Conversation:
    """A conversation whose recordings are changed."""
    turns = [
        replace(turn, clip=change(turn.clip)) if isinstance(turn, AudioTurn) else turn
        for turn in conversation.turns
    ]
    return replace(conversation, turns=tuple(turns))


def _at_speed(conversation: Conversation, speed: float, sample_rate_hz: int) -> Conversation:
    if speed == 1.0:
        return conversation
    played = _with_clips(conversation, lambda clip: faster(clip, speed, sample_rate_hz))
    return replace(played, id=f"{conversation.id}_sp{speed}")


def _truncated(conversation: Conversation, config: AugmentationConfig) -> Conversation:
    most_s = config.truncate_duration
    if most_s is None or all(clip.duration_s <= most_s for clip in conversation.clips):
        return conversation

    def cut(clip: AudioClip) -> AudioClip:
        if clip.duration_s <= most_s:
            return clip
        start_s, room_s = truncation(clip.duration_s, config)
        return shortened(clip, start_s, most_s, room_s)

    return _with_text(_with_clips(conversation, cut), config)


def _windows(conversation: Conversation, config: AugmentationConfig) -> Iterator[Conversation]:
    """The windows of the only recording; a conversation of several stays whole."""
    if config.cut_into_windows_duration is None or len(conversation.clips) != 1:
        yield conversation
        return
    stretches = windows(conversation.clips[0].duration_s, config)
    for number, stretch in enumerate(stretches):
        part = _with_clips(conversation, functools.partial(_stretch, stretch=stretch))
        part = replace(part, id=f"{conversation.id}-{number}")
        yield part if len(stretches) == 1 else _with_text(part, config)


def _stretch(clip: AudioClip, stretch: tuple[float, float]) -> AudioClip:
    return shortened(clip, *stretch)


def _with_text(conversation: Conversation, config: AugmentationConfig) -> Conversation:
    """A conversation of part of its audio: without the response unless it is kept."""
    if config.keep_excessive_supervisions or conversation.response is None:
        return conversation
    return replace(conversation, turns=conversation.turns[:-1])


def _padded(conversation: Conversation, config: AugmentationConfig) -> Conversation:
    least_s = config.pad_min_duration
    if least_s is None or all(clip.duration_s >= least_s for clip in conversation.clips):
        return conversation

    def pad(clip: AudioClip) -> AudioClip:
        is_short = clip.duration_s < least_s
        return padded(clip, least_s, config.pad_direction) if is_short else clip

    return _with_clips(conversation, pad)


def _shards(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    """The conversations of each shard, in order."""
    shard: list[Conversation] = []
    for conversation in conversations:
        if shard and conversation.shard != shard[-1].shard:
            yield shard
            shard = []
        shard.append(conversation)
    yield shard
