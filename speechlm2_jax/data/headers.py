"""How long recordings are, by their files: as much as reading them would give."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.audio_files import open_audio
from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.manifest_values import MAX_SECONDS

_THREADS = 8


class FoundSeconds(float):
    """Seconds that are there of a recording that may have been longer.

    Its header tells more, as that of a file that was not copied whole, or nothing, as of an MP3.
    """


def file_duration_s(location: AudioLocation) -> float | None:
    """Seconds of a recording; None if it is missing, damaged, empty or absurdly long."""
    try:
        with open_audio(location.source("a recording")) as file:
            seconds, is_complete = file.length() / file.rate_hz, file.is_complete
    except AudioError:
        return None
    if not 0 < seconds < MAX_SECONDS:
        return None
    return seconds if is_complete else FoundSeconds(seconds)


def file_durations_s(locations: Iterable[AudioLocation]) -> dict[AudioLocation, float | None]:
    """The same of several recordings, each read once."""
    once = sorted(set(locations), key=_order)
    if len(once) < 2:
        return {location: file_duration_s(location) for location in once}
    with ThreadPoolExecutor(min(_THREADS, len(once)), thread_name_prefix="headers") as pool:
        return dict(zip(once, pool.map(file_duration_s, once), strict=True))


def _order(location: AudioLocation) -> tuple[object, ...]:
    """So that files are read from front to end."""
    return location.path, location.byte_range or (), location.cell or ()
