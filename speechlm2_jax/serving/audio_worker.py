"""What a worker process does: bytes of an audio file to samples.

Imports neither JAX nor a model, so that a worker starts quickly and takes little memory.
"""

import base64
import binascii
import hashlib
import os
from io import BytesIO
from typing import NamedTuple

import numpy as np

from speechlm2_jax.data.audio import AudioError, read_audio
from speechlm2_jax.data.audio_files import open_audio


class DecodedAudio(NamedTuple):
    """A recording as the model reads it."""

    samples: np.ndarray
    """Float32 [S]."""
    key: bytes
    """Equal for equal samples."""


class TooLongAudio(NamedTuple):
    """A recording beyond the limit; the rest of it was not decoded."""

    seconds: float
    is_whole: bool
    """Whether `seconds` is its length, and not only what was counted before it was given up."""


class UnusableAudio(NamedTuple):
    """A recording that cannot be used, and why."""

    reason: str


Decoded = DecodedAudio | TooLongAudio | UnusableAudio


def process_id() -> int:
    """The id of the worker process."""
    return os.getpid()


def decode(data: bytes | str, rate_hz: int, max_s: float) -> Decoded:
    """Decodes the bytes of an audio file, or their base64, at `rate_hz`."""
    if isinstance(data, str):
        try:
            data = base64.b64decode(data.rpartition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            return UnusableAudio(f"the data is not base64 ({error})")
    try:
        too_long = _beyond(data, max_s)
        if too_long is not None:
            return too_long
        samples = read_audio(BytesIO(data), sample_rate_hz=rate_hz)
    except AudioError as error:
        return UnusableAudio(_plain(str(error)))
    key = hashlib.blake2b(samples.tobytes(), digest_size=16).digest()
    return DecodedAudio(samples, key)


def _beyond(data: bytes, max_s: float) -> TooLongAudio | None:
    """The length of a recording that is too long, without decoding more than `max_s` of it."""
    with open_audio(BytesIO(data)) as file:
        if file.frames is not None:
            seconds = file.frames / file.rate_hz
            return TooLongAudio(seconds, True) if seconds > max_s else None
        count = 0
        for block in file.blocks(0, None):
            count += len(block)
            if count > max_s * file.rate_hz:
                return TooLongAudio(count / file.rate_hz, False)
    return None


def _plain(reason: str) -> str:
    """An error without the name of a buffer in memory, in one line."""
    head, colon, rest = reason.partition(">: ")
    return " ".join((rest if colon and head.startswith("<") else reason).split())
