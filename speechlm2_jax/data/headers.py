"""How long recordings are, by their files: as much as reading them would give."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from speechlm2_jax.data.audio import AudioError, audio_length
from speechlm2_jax.data.manifest_values import MAX_SECONDS

_THREADS = 8


def file_duration_s(path: str) -> float | None:
    """Seconds of a recording; None if it is missing, damaged, empty or absurdly long."""
    try:
        duration_s = audio_length(path).duration_s
    except AudioError:
        return None
    return duration_s if 0 < duration_s < MAX_SECONDS else None


def file_durations_s(paths: Iterable[str]) -> dict[str, float | None]:
    """The same of several files, each read once, by path."""
    once = sorted(set(paths))
    if len(once) < 2:
        return {path: file_duration_s(path) for path in once}
    with ThreadPoolExecutor(min(_THREADS, len(once)), thread_name_prefix="headers") as pool:
        return dict(zip(once, pool.map(file_duration_s, once), strict=True))
