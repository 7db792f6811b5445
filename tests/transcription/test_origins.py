"""Outputs of `speechlm2-jax transcribe` belong to the recording that they were made from."""

import json
import os
import shutil
from pathlib import Path

import pytest

from speechlm2_jax.transcription.output_journal import JOURNAL
from tests.transcription.conftest import run, texts, tone

OUT = ("--output-dir", "out")


def rows():
    """The text of each row of the transcripts, in their order."""
    lines = Path("out/transcripts.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_another_recording_of_the_same_name_is_refused(folder, model, capsys):
    tone("A/x.wav", 1)
    tone("B/x.wav", 2)
    assert run("A/x.wav", *OUT) == 0
    with pytest.raises(SystemExit, match="2"):
        run("B/x.wav", *OUT)
    err = capsys.readouterr().err.splitlines()[-1]
    first, second = Path("A/x.wav").absolute(), Path("B/x.wav").absolute()
    assert f"out/x.txt is the transcript of {first}, not of {second}" in err
    assert "--output-dir" in err and texts("out") == {"x.txt": "1 s"} and model == [[1]]
    assert run("B/x.wav", *OUT, "--overwrite") == 0
    assert texts("out") == {"x.txt": "2 s"}
    assert run("B/x.wav", *OUT) == 0 and model == [[1], [2]]


def test_a_changed_recording_is_transcribed_again(folder, model, capsys):
    words = ("a.wav", "calls", *OUT, "--output", "txt,jsonl")
    assert run(*words) == 0
    model.clear()
    tone("a.wav", 7)
    capsys.readouterr()
    assert run(*words) == 0
    err = capsys.readouterr().err
    assert "changed since they were transcribed, and transcribed again: a.wav\n" in err
    assert model == [[7]] and texts("out")["a.txt"] == "7 s"
    assert sorted(rows()) == ["2 s", "3 s", "4 s", "7 s"]
    assert run(*words) == 0 and model == [[7]]


def test_recordings_that_are_moved_with_their_transcripts_are_done(folder, model):
    assert run("calls") == 0
    shutil.move("calls", "moved")
    assert run("moved") == 0 and len(model) == 1


def test_a_journal_without_sources_still_counts(folder, model):
    assert run("a.wav", *OUT, "--output", "txt,jsonl") == 0
    lines = [{"name": name, "state": "written"} for name in ("a.txt", "transcripts.jsonl")]
    Path("out", JOURNAL).write_text("".join(f"\n{json.dumps(line)}" for line in lines))
    assert run("a.wav", *OUT, "--output", "txt,jsonl") == 0 and len(model) == 1
    again = {"name": json.dumps({"audio_filepath": "../a.wav"}), "state": "again"}
    with Path("out", JOURNAL).open("a") as file:
        file.write(f"\n{json.dumps(again)}")
    assert run("a.wav", *OUT, "--output", "txt,jsonl") == 0
    assert len(model) == 2 and rows() == ["1 s"]


def test_a_recording_has_one_row_however_its_path_is_written(folder, model):
    assert run("a.wav", *OUT, "--output", "jsonl") == 0
    assert run(os.path.abspath("a.wav"), *OUT, "--output", "jsonl") == 0
    assert len(model) == 1 and rows() == ["1 s"]
