"""Speaks with espeak-ng as a library, which tells when each of its phonemes and words begins.

Many times faster than the program, which starts anew for each sentence. The library keeps the phase
of its oscillators from one sentence to the next, so samples depend on what was said before; sounds
and times do not.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

LIBRARY = "libespeak-ng.so.1"
SYNCHRONOUS, PHONEME_EVENTS, DONT_EXIT = 2, 0x0001, 0x8000
LAST, WORD, PHONEME = 0, 1, 7
RATE, VOLUME, PITCH = 1, 2, 3
AMPLITUDE = 40  # some variants clip at the usual 100
UTF8 = 1


class WordEvent(NamedTuple):
    """The start of a word, or of several that espeak-ng joins."""

    start_s: float
    first: int
    """Its first character in the text."""
    length: int
    """Its characters."""


class _Id(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


class _Voice(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("unused", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Espeak:
    """The library, started once in a process; what it says comes through a callback."""

    def __init__(self) -> None:
        try:
            self.library: Any = ctypes.CDLL(LIBRARY)
        except OSError:
            raise RuntimeError("espeak-ng is missing; install it (Debian: espeak-ng)") from None
        self.rate_hz = self.library.espeak_Initialize(
            SYNCHRONOUS, 200, None, PHONEME_EVENTS | DONT_EXIT
        )
        self.waves: list[np.ndarray] = []
        self.phonemes: list[tuple[float, str]] = []
        self.words: list[WordEvent] = []
        self._callback = _Callback(self._take)  # kept: the library holds only its address
        self.library.espeak_SetSynthCallback(self._callback)

    def _take(self, wave: Any, samples: int, events: Any) -> int:
        if wave and samples > 0:
            self.waves.append(np.ctypeslib.as_array(wave, (samples,)).copy())
        index = 0
        while events[index].type != LAST:
            if events[index].type == WORD:
                event = events[index]
                first = event.text_position - 1
                self.words.append(WordEvent(event.audio_position / 1000, first, event.length))
            if events[index].type == PHONEME:
                name = events[index].id.string.decode("utf-8", "replace")
                self.phonemes.append((events[index].audio_position / 1000, name))
            index += 1
        return 0

    def set_voice(self, spec: str) -> None:
        """Chooses a voice by name, else by language, as the program does."""
        if self.library.espeak_SetVoiceByName(spec.encode()) == 0:
            return
        voice = _Voice(languages=spec.encode())
        if self.library.espeak_SetVoiceByProperties(ctypes.byref(voice)) != 0:
            raise RuntimeError(f"espeak-ng knows no voice {spec}")


@dataclass(frozen=True)
class SpokenText:
    """What espeak-ng says, and when."""

    wave: np.ndarray
    """int16 samples [S]."""
    rate_hz: int
    phonemes: list[tuple[float, str]]
    """(start in seconds, phoneme) in order."""
    words: list[WordEvent]


@cache
def _espeak() -> _Espeak:
    return _Espeak()


def speak(
    text: str, spec: str, speed_wpm: int, pitch: int
) -> tuple[np.ndarray, int, list[tuple[float, str]]]:
    """Returns int16 samples [S], their rate in Hz, and (start in seconds, phoneme) in order.

    Raises RuntimeError if the library is missing, does not know the voice or says nothing.
    """
    spoken = speak_words(text, spec, speed_wpm, pitch)
    return spoken.wave, spoken.rate_hz, spoken.phonemes


def speak_words(text: str, spec: str, speed_wpm: int, pitch: int) -> SpokenText:
    """Returns what espeak-ng says of a text in ASCII, with the times of phonemes and words.

    Raises RuntimeError if the library is missing, does not know the voice or says nothing.
    """
    espeak = _espeak()
    espeak.waves, espeak.phonemes, espeak.words = [], [], []
    espeak.set_voice(spec)
    for parameter, value in ((RATE, speed_wpm), (VOLUME, AMPLITUDE), (PITCH, pitch)):
        espeak.library.espeak_SetParameter(parameter, value, 0)
    content = text.encode()
    espeak.library.espeak_Synth(content, len(content) + 1, 0, 1, 0, UTF8, None, None)
    if not espeak.waves:
        raise RuntimeError(f"espeak-ng said nothing as {spec}: {text!r}")
    wave = np.concatenate(espeak.waves)
    return SpokenText(wave, espeak.rate_hz, espeak.phonemes, espeak.words)
