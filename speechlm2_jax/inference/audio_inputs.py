"""Reads, checks and resamples the recordings that users pass: paths, files or arrays."""

from collections.abc import Iterable, Mapping, Sequence
from io import BufferedIOBase, BytesIO
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.data.audio import AudioError, check_samples, read_audio, resample
from speechlm2_jax.data.audio_files import RATES_HZ
from speechlm2_jax.inference.content_parts import local_recording

_FORMS = "audio must be paths or 1-D float arrays [S]"
_WITH_RATE = '(rate, array) or {"array": ..., "sampling_rate": ...}'

Recording = (
    str
    | PathLike[str]
    | BufferedIOBase
    | bytes
    | ArrayLike
    | tuple[float, ArrayLike]
    | Mapping[str, object]
)
"""One recording in any of the forms that `clips_of` reads."""
Recordings = Recording | Sequence[Recording] | None


class AudioInput(NamedTuple):
    """A recording, and its file name if it has one."""

    samples: np.ndarray
    name: str | None = None


def clips_of(
    audio: Recordings, prompt: str, rate_hz: int, channel: int | None = None
) -> list[AudioInput]:
    """Reads a turn's `audio`: one recording, a list of them, or None.

    A recording is one of:
    - a path, an open file, or the bytes of a file;
    - a float array [S] at `rate_hz`;
    - `(rate, array)` of Gradio or `{"array", "sampling_rate"}` of datasets: the array is [S],
      [S, C] or [C, S], of floats or integers, and is resampled;
    - `{"path", "bytes"}`, undecoded audio of datasets.

    `channel` chooses one channel. None mixes all channels. `prompt` names the prompt in errors.
    Raises AudioError for an unusable recording and ValueError for a value that is not a recording.
    """
    items = items_of(audio)
    names = [prompt if len(items) == 1 else f"{prompt}, clip {i}" for i in range(len(items))]
    return [_clip(item, name, rate_hz, channel) for item, name in zip(items, names, strict=True)]


def split_audio(audios: object, audio_lens: ArrayLike | None, least: int = 1) -> list[np.ndarray]:
    """Splits a padded batch [B, S] into its clips, without their padding.

    Raises ValueError as `padded_batch` does.
    """
    audio, lengths = padded_batch(audios, audio_lens, ("audios", "audio_lens"), least=least)
    return [wave[:n] for wave, n in zip(audio, lengths.tolist(), strict=True)]


def padded_batch(
    signal: object, lengths: ArrayLike | None, names: tuple[str, str], *, least: int
) -> tuple[Float[np.ndarray, "B S"], Int32[np.ndarray, " B"]]:
    """Checks a padded batch: float samples [B, S] and lengths [B].

    If `lengths` is None, every length is S. `names` are the names of the two arguments in errors.
    Raises ValueError for a length below `least` or above S, and if `signal` is not a float batch.
    """
    name, name_of_lengths = names
    try:
        array = np.asarray(signal)
    except ValueError as error:  # clips of several lengths
        raise ValueError(
            f"{name} must be one float array [B, S]; pad the clips to one length and give "
            f"{name_of_lengths}"
        ) from error
    if array.ndim != 2:
        raise ValueError(f"{name} must be [B, S]; got shape {array.shape}")
    audio, most = as_float(array, name), array.shape[1]
    counts = np.full(len(array), most) if lengths is None else np.asarray(lengths, int)
    if counts.shape != array.shape[:1] or (counts < least).any() or (counts > most).any():
        raise ValueError(
            f"{name_of_lengths} must be {len(array)} lengths from {least} to {most} samples"
        )
    return audio, counts.astype(np.int32)


def items_of(audio: Any) -> list[Any]:
    """Returns a list of recordings unchanged, and one recording as a list of one."""
    if audio is None:
        return []
    is_one = isinstance(audio, Mapping | bytes) or not isinstance(audio, Iterable)
    is_one = is_one or _is_path(audio) or is_array(audio) or _is_rate_and_array(audio)
    return [audio] if is_one else list(cast(Iterable[Any], audio))


def _is_path(item: object) -> TypeGuard[str | Path | BufferedIOBase]:
    return isinstance(item, str | PathLike | BufferedIOBase)


def is_array(item: object) -> TypeGuard[ArrayLike]:
    """Whether a value can be converted to a NumPy array (it has `__array__`)."""
    return hasattr(item, "__array__")


def _is_rate_and_array(item: Any) -> TypeGuard[tuple[float, ArrayLike]]:
    is_pair = isinstance(item, tuple | list) and len(item) == 2
    return is_pair and _is_rate(item[0]) and is_array(item[1])


def _is_rate(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _clip(item: object, name: str, rate_hz: int, channel: int | None) -> AudioInput:
    if isinstance(item, str):
        item = local_recording(item, name)
    if isinstance(item, Mapping):
        return _clip_of_dict(item, name, rate_hz, channel)
    if _is_rate_and_array(item):
        return AudioInput(
            _mixed_and_resampled(np.asarray(item[1]), item[0], name, rate_hz, channel)
        )
    if isinstance(item, bytes):
        return _read(BytesIO(item), name, None, rate_hz, channel)
    if _is_path(item):
        return _read(item, name, str(item), rate_hz, channel)
    if not is_array(item):
        raise ValueError(f"{name}: {_FORMS}; got {type(item).__name__}; or {_WITH_RATE}")
    array = np.asarray(item)
    if array.ndim != 1:
        raise ValueError(
            f"{name}: {_FORMS}; got {array.dtype} {array.shape}: mix channels first, as "
            f"samples.mean(axis=1), or give {_WITH_RATE}"
        )
    return AudioInput(check_samples(as_float(array, name), name))


def _read(
    source: str | Path | BufferedIOBase,
    name: str,
    file: str | None,
    rate_hz: int,
    channel: int | None,
) -> AudioInput:
    try:
        return AudioInput(read_audio(source, sample_rate_hz=rate_hz, channel=channel), file)
    except AudioError as error:
        reason = str(error) if file is not None else str(error).replace(f"{source}: ", "")
        raise AudioError(f"{name}: {reason}", cause=error.cause) from error


def _clip_of_dict(
    item: Mapping[str, Any], name: str, rate_hz: int, channel: int | None
) -> AudioInput:
    """Reads a recording of Hugging Face datasets: an array, the bytes of a file, or a path."""
    if item.get("array") is not None and item.get("sampling_rate") is not None:
        array = np.asarray(item["array"])
        return AudioInput(
            _mixed_and_resampled(array, item["sampling_rate"], name, rate_hz, channel)
        )
    path = item.get("path")
    if isinstance(item.get("bytes"), bytes):
        file = None if path is None else str(path)
        clip = _read(BytesIO(item["bytes"]), name, None, rate_hz, channel)
        return clip._replace(name=file)
    if path is not None and item.get("array") is None:
        return _clip(path, name, rate_hz, channel)
    raise ValueError(
        f"{name}: {_FORMS}; got dict of {sorted(map(str, item))}, which must have array and "
        "sampling_rate, or bytes, or path"
    )


def _mixed_and_resampled(
    array: np.ndarray, own_hz: object, name: str, rate_hz: int, channel: int | None
) -> Float[np.ndarray, " S"]:
    """Mixes audio [S], [S, C] or [C, S], and resamples it from `own_hz` to `rate_hz`."""
    least, most = RATES_HZ
    if not _is_rate(own_hz) or not least <= own_hz <= most or own_hz != int(own_hz):
        raise ValueError(
            f"{name}: the sample rate must be from {least} to {most} Hz, got {own_hz!r}"
        )
    if array.ndim not in (1, 2):
        raise ValueError(f"{name}: audio must be [S], [S, C] or [C, S]; got shape {array.shape}")
    samples = _scaled(array, name)
    if samples.ndim == 2:
        samples = samples if samples.shape[0] > samples.shape[1] else samples.T  # [S, C]
        if channel is not None and channel >= samples.shape[1]:
            raise AudioError(
                f"{name}: there is no channel {channel}, it has {samples.shape[1]}",
                cause="no_such_channel",
            )
        samples = samples.mean(axis=1) if channel is None else samples[:, channel]
    return check_samples(resample(check_samples(samples, name), int(own_hz), rate_hz), name)


def _scaled(array: np.ndarray, name: str) -> Float[np.ndarray, "..."]:
    """Samples as float32; integers are scaled by the range of their dtype, as in WAV files."""
    if not jnp.issubdtype(array.dtype, jnp.integer):
        return as_float(array, name)
    middle = 128.0 if array.dtype == np.uint8 else 0.0
    if np.issubdtype(array.dtype, np.unsignedinteger) and not middle:
        raise ValueError(f"{name}: audio is {array.dtype}; give int16, int32 or floats")
    return ((array - middle) / 2.0 ** (8 * array.dtype.itemsize - 1)).astype(np.float32)


def as_float(array: np.ndarray, name: str) -> Float[np.ndarray, "..."]:
    """Samples as float32. Raises ValueError for integers, whose scale is unknown."""
    if jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name}: audio is {array.dtype}; expected floats from -1 to 1, as soundfile.read and "
            "librosa.load return them; divide int16 samples by 32768"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name}: audio must be float samples; got {array.dtype}")
    with np.errstate(over="ignore"):  # `check_samples` refuses what overflows to infinity
        return np.asarray(array, np.float32)
