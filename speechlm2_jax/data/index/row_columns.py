"""What an index keeps of each row: 32 bytes, and the durations of rows with several recordings."""

from collections.abc import Mapping, Sequence

import numpy as np

from speechlm2_jax.data.conversations import AudioTurn, Conversation, Timed
from speechlm2_jax.data.prompts import OUTPUT_ROLE, PromptLengths

SKIPPED = 1
"""Flag of a row: a blank line, or one to be skipped."""
NO_RESPONSE, WRONG_PLACEHOLDERS, ENDS_IN_AUDIO, HAS_RESPONSE = 1, 2, 4, 8
"""Flags of a prompt."""

ROW_TYPES = {
    "offset": np.dtype("<u8"),
    "length": np.dtype("<u4"),
    "duration_s": np.dtype("<f8"),
    "clips": np.dtype("<u2"),
    "flags": np.dtype("u1"),
}
"""Place of a line in its file, seconds of all its recordings, and how many these are."""
PACKED_TYPES = {
    "offset": np.dtype("<u8"),
    "member": np.dtype("<u4"),
    "duration_s": np.dtype("<f8"),
    "clips": np.dtype("<u2"),
    "flags": np.dtype("u1"),
}
"""The same of a row whose recording is packed: the 512-byte block of its tar in place of the length
of its line."""
AGENT_MEMBER = "agent_member"
"""The same in the tar of the agents' recordings, where there are two tars."""
PAIR_TYPES = {
    "offset": np.dtype("<u8"),
    "target": np.dtype("<u8"),
    "question": np.dtype("<u4"),
    "flags": np.dtype("u1"),
}
"""Of a pair of lines: the places of both in their files, and the number of its question."""
SHARD_TYPES = {"shard_rows": np.dtype("<u4")}
"""Rows of each shard."""
SEVERAL_TYPES = {"several": np.dtype("<u8"), "several_s": np.dtype("<f8")}
"""Of each recording in rows that have several: the row, and its duration."""
SEVERAL_MEMBER_TYPES = {"several_member": np.dtype("<u4")}
"""Of the same recordings, where they are packed: the 512-byte block of the tar."""
PROMPT_TYPES = {
    "tokens": np.dtype("<u4"),
    "context": np.dtype("<u4"),
    "prompt_flags": np.dtype("u1"),
}
"""Tokens of the whole prompt and of what is before its last turn."""


def packed_types(tars: int) -> dict[str, np.dtype]:
    """The columns of rows of shards that have so many tars each."""
    names = list(PACKED_TYPES)
    if tars > 1:
        names.insert(names.index("member") + 1, AGENT_MEMBER)
    return {name: PACKED_TYPES.get(name, PACKED_TYPES["member"]) for name in names}


def no_recordings(rows: int) -> dict[str, np.ndarray]:
    """The columns of recordings of rows without any, which take no memory."""
    types = {**ROW_TYPES, **SEVERAL_TYPES}
    return {
        name: np.broadcast_to(types[name].type(0), 0 if name in SEVERAL_TYPES else rows)
        for name in ("duration_s", "clips", *SEVERAL_TYPES)
    }


def row_columns(
    places: Sequence[tuple[int, ...]],
    conversations: Sequence[Timed | None],
    types: Mapping[str, np.dtype] = ROW_TYPES,
) -> dict[str, np.ndarray]:
    """The columns of `types` and SEVERAL_TYPES; rows of the latter count from 0.

    Args:
        places: the first columns of each row: offset of its line, and its length (`packed_types`:
            the members of its recordings).
        conversations: of each line; None for one without.
        types: those of rows.
    """
    clips = [() if one is None else one.clip_durations_s for one in conversations]
    several = [(row, seconds) for row, of in enumerate(clips) if len(of) > 1 for seconds in of]
    values: dict[str, Sequence[float]] = dict(zip(types, zip(*places, strict=True), strict=False))
    values |= {
        "duration_s": list(map(sum, clips)),
        "clips": list(map(len, clips)),
        "flags": [SKIPPED if one is None else 0 for one in conversations],
        "several": [row for row, _ in several],
        "several_s": [duration_s for _, duration_s in several],
    }
    types = {**types, **SEVERAL_TYPES}
    return {name: np.asarray(values.get(name, ()), kind) for name, kind in types.items()}


def prompt_columns(
    conversations: Sequence[Conversation | None],
    lengths: Sequence[PromptLengths | None],
) -> dict[str, np.ndarray]:
    """The columns of PROMPT_TYPES; None for a line without a conversation."""
    pairs = list(zip(conversations, lengths, strict=True))
    values = {
        "tokens": [0 if of is None else of.tokens for of in lengths],
        "context": [0 if of is None else of.context for of in lengths],
        "prompt_flags": [0 if not one or of is None else _flags(one, of) for one, of in pairs],
    }
    return {name: np.asarray(column, PROMPT_TYPES[name]) for name, column in values.items()}


def _flags(conversation: Conversation, lengths: PromptLengths) -> int:
    last = conversation.turns[-1]
    return (
        (last.role != OUTPUT_ROLE) * NO_RESPONSE
        | (lengths.placeholders != len(conversation.clips)) * WRONG_PLACEHOLDERS
        | isinstance(last, AudioTurn) * ENDS_IN_AUDIO
        | lengths.has_response * HAS_RESPONSE
    )
