"""A folder of recordings, and a model that writes how long they are."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.commands import transcribe
from speechlm2_jax.inference.timed_text import Segment, Transcript
from speechlm2_jax.transcription import opening
from speechlm2_jax.transcription.opening import OpenedModel

RATE_HZ = 16_000


def tone(path, seconds):
    """Writes a recording of some seconds."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(int(seconds * RATE_HZ), 0.1, np.float32), RATE_HZ)


def run(*words: str) -> int:
    """Runs the command with the model of the tests."""
    return transcribe.main([*words, "--model", "m"])


def texts(folder):
    """The texts in a folder, by their paths in it."""
    paths = Path(folder).rglob("*.txt")
    return {path.relative_to(folder).as_posix(): path.read_text().strip() for path in paths}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with recordings of 1, 2, 3 and 4 seconds, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    for seconds, name in enumerate(("a.wav", "calls/b.flac", "calls/day/c.ogg", "calls/b.wav"), 1):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        wave = np.sin(np.arange(seconds * RATE_HZ) / 30).astype(np.float32)
        soundfile.write(name, 0.3 * wave, RATE_HZ)
    Path("calls/notes.txt").write_text("no recording")
    return tmp_path


@pytest.fixture
def model(monkeypatch):
    """A model that writes how many seconds it was given; `model` has their lengths."""
    calls: list[list[int]] = []

    def seconds(waves):
        calls.append([len(wave) // RATE_HZ for wave in waves])
        return [
            Transcript(f"{n} s", segments=[Segment(text=f"{n} s", start=0, end=n)], duration_s=n)
            for n in calls[-1]
        ]

    def open_model(name, options):
        assert name == "m"
        return OpenedModel(name=name, sampling_rate=RATE_HZ, transcribe=seconds)

    monkeypatch.setattr(opening, "open_model", open_model)
    monkeypatch.setattr(
        "speechlm2_jax.compilation_cache.keep_compiled_programs", lambda folder: None
    )
    return calls
