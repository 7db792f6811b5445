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

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.bounded_audio import TooLongAudio, read_bounded


class DecodedAudio(NamedTuple):
    """A recording as the model reads it."""

    samples: np.ndarray
    """Float32 [S]."""
    key: bytes
    """Equal for equal samples."""


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
        samples = read_bounded(BytesIO(data), sample_rate_hz=rate_hz, max_s=max_s)
    except AudioError as error:
        known = "not an audio file, or damaged: " if error.cause == "unreadable" else ""
        return UnusableAudio(known + _plain(str(error)))
    if isinstance(samples, TooLongAudio):
        return samples
    key = hashlib.blake2b(np.ascontiguousarray(samples).data, digest_size=16).digest()
    return DecodedAudio(samples, key)


def _plain(reason: str) -> str:
    """An error without the name of a buffer in memory, in one line."""
    head, colon, rest = reason.partition(">: ")
    return " ".join((rest if colon and head.startswith("<") else reason).split())
