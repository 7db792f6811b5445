"""Recordings as callers hand them over: paths and arrays, checked before anything hears them."""

from collections.abc import Iterable, Mapping
from io import BufferedIOBase
from os import PathLike
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import AudioError, check_samples, read_audio


class Clip(NamedTuple):
    """A recording, and the file that it came from."""

    samples: np.ndarray
    name: str | None = None


def clips_of(audio: Any, prompt: str, rate_hz: int) -> list[Clip]:
    """The recordings of a turn's `audio`: a path or an array [S], a list of them, or None.

    `prompt` names the prompt in errors. Raises AudioError for a recording that cannot be used and
    ValueError for what is no recording.
    """
    items = _items(audio)
    names = [prompt if len(items) == 1 else f"{prompt}, clip {i}" for i in range(len(items))]
    return [_clip(item, name, rate_hz) for item, name in zip(items, names, strict=True)]


def split_audio(audios: Any, audio_lens: Any, least: int = 1) -> list[np.ndarray]:
    """Cuts a padded batch [B, S] into its clips.

    Raises ValueError for a length below `least` or beyond S, and for what is no float batch.
    """
    try:
        array = np.asarray(audios)
    except ValueError as error:  # rows of several lengths
        raise ValueError(
            "audios must be one float array [B, S]; pad the rows to one length and give audio_lens"
        ) from error
    if array.ndim != 2:
        raise ValueError(f"audios must be float [B, S]; got shape {array.shape}")
    array = as_float(array, "audios")
    lengths = (
        np.full(len(array), array.shape[1]) if audio_lens is None else np.asarray(audio_lens, int)
    )
    if (
        lengths.shape != (len(array),)
        or (lengths < least).any()
        or (lengths > array.shape[1]).any()
    ):
        raise ValueError(
            f"audio_lens must be {len(array)} lengths from {least} to {array.shape[1]} samples"
        )
    return [row[:n] for row, n in zip(array, lengths, strict=True)]


def _items(audio: Any) -> list[Any]:
    if audio is None:
        return []
    is_one = isinstance(audio, Mapping) or not isinstance(audio, Iterable)
    return [audio] if is_one or _is_path(audio) or _is_array(audio) else list(audio)


def _is_path(item: Any) -> bool:
    return isinstance(item, str | PathLike | BufferedIOBase)


def _is_array(item: Any) -> bool:
    return hasattr(item, "__array__")


def _clip(item: Any, name: str, rate_hz: int) -> Clip:
    if _is_path(item):
        try:
            return Clip(read_audio(item, sample_rate_hz=rate_hz), str(item))
        except AudioError as error:
            raise AudioError(f"{name}: {error}", cause=error.cause) from error
    if not _is_array(item):
        raise ValueError(
            f"{name}: audio must be paths or 1-D float arrays [S]; got {type(item).__name__}"
        )
    array = np.asarray(item)
    if array.ndim != 1:
        raise ValueError(
            f"{name}: audio must be paths or 1-D float arrays [S]; got {array.dtype} "
            f"{array.shape}: mix channels first, as samples.mean(axis=1)"
        )
    return Clip(check_samples(as_float(array, name), name))


def as_float(array: np.ndarray, name: str) -> Float[np.ndarray, "..."]:
    """Samples as float32. Raises ValueError for integers, whose scale nobody has told."""
    if jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name}: audio is {array.dtype}, and must be floats from -1 to 1, as soundfile.read "
            "and librosa.load give them; divide int16 samples by 32768"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name}: audio must be float samples; got {array.dtype}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return np.asarray(array, np.float32)
