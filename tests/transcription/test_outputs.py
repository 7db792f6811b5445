"""Outputs of `speechlm2-jax transcribe`: one of each recording, in its folder, never a user's."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data.audio_location import ParquetCell
from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.transcription import inputs, opening
from speechlm2_jax.transcription.inputs import find_sources, safe_name
from speechlm2_jax.transcription.output_journal import JOURNAL
from speechlm2_jax.transcription.outputs import Outputs
from tests.transcription.conftest import RATE_HZ, run, texts, tone


def rows(path: str | Path = "transcripts.jsonl"):
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {row["audio_filepath"]: row["text"] for row in found}, len(found)


def shar(folder, ids, seconds):
    """A SHAR folder of one shard, with recordings of some seconds."""
    folder.mkdir()
    with tarfile.open(folder / "recording.000000.tar", "w") as tar:
        for name, own_s in zip(ids, seconds, strict=True):
            tone("own.wav", own_s)
            for suffix, data in ((".wav", Path("own.wav").read_bytes()), (".json", b"{}")):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    lines = []
    for name, own_s in zip(ids, seconds, strict=True):
        recording = {
            "id": name,
            "sources": [{"type": "shar", "channels": [0], "source": ""}],
            "sampling_rate": 16000,
            "num_samples": own_s * 16000,
            "duration": own_s,
        }
        cut = {"id": name, "start": 0, "duration": own_s, "channel": 0, "supervisions": []}
        lines.append(json.dumps(cut | {"recording": recording, "type": "MonoCut"}) + "\n")
    (folder / "cuts.000000.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("options", [(), ("--output-dir", "out")])
def test_each_recording_in_a_tar_has_its_text(folder, model, options):
    shar(Path("set"), ["rec-1.25", "rec-1.5", "../x", "/etc/y"], [1, 1, 2, 3])
    assert run("set", "--output", "txt,jsonl", *options) == 0
    root = Path("out" if options else "set")
    expected = {"rec-1.25": "1 s", "rec-1.5": "1 s", "_.._x": "2 s", "_etc_y": "3 s"}
    assert texts(root) == {f"{name}.txt": text for name, text in expected.items()}
    lines = root / "transcripts.jsonl" if options else Path("transcripts.jsonl")
    assert rows(lines)[1] == 4 and sum(map(len, model)) == 4
    assert run("set", "--output", "txt,jsonl", *options) == 0
    assert sum(map(len, model)) == 4


def given(monkeypatch, *clips):
    found = [
        Utterance(id=c.id, duration_s=1.0, text=None, read=lambda rate: np.zeros(rate), clip=c)
        for c in clips
    ]
    monkeypatch.setattr(inputs, "read_inputs", lambda name: found)
    return find_sources(["m.jsonl"])


def test_cells_channels_and_stretches_are_recordings_of_their_own(folder, monkeypatch):
    def clip(**keys):
        return AudioClip(duration_s=1.0, **keys)

    sources = given(
        monkeypatch,
        clip(id="7.flac", path="t.parquet", cell=ParquetCell(0, 3, "audio")),
        clip(id="7.flac", path="t.parquet", cell=ParquetCell(1, 3, "audio")),
        clip(id="c", path="a.wav", channel=0),
        clip(id="d", path="a.wav", channel=1),
        clip(id="e", path="a.wav", offset_s=0.5),
        clip(id="e", path="a.wav", offset_s=0.5),
        clip(id="mixed", path="", cut=object()),
        clip(id="other", path="", cut=object()),
    )
    outputs = Outputs(formats=("txt", "jsonl"), folder=Path("out"))
    assert outputs.prepare(sources) == sources
    names = [outputs._path(source, "txt").name for source in sources]
    assert names == [
        *("7_0_3.txt", "7_1_3.txt", "a.txt", "a_channel1.txt", "a_0.5.txt"),
        *("mixed.txt", "other.txt"),
    ]
    lines = [json.dumps(outputs._named(source)) for source in sources]
    assert len(set(lines)) == 7 and lines[1].endswith('parquet/7.flac", "place": "1_3"}')


def test_addresses_give_names_without_their_query(folder, monkeypatch):
    found = [
        Utterance(id="a.wav", duration_s=0.0, text=None, read=lambda rate: np.zeros(1), source=one)
        for one in ("https://h/x/a.wav?sig=ab/cd.ef", "https://h/y/a.wav?sig=ab/cd.ef")
    ]
    monkeypatch.setattr(inputs, "read_inputs", lambda name: found)
    sources = find_sources(["list"])
    outputs = Outputs(formats=("txt",), folder=Path("out"))
    outputs.prepare(sources)
    paths = [outputs._path(source, "txt").as_posix() for source in sources]
    assert paths == ["out/x/a.txt", "out/y/a.txt"]
    beside = Outputs(formats=("txt",))
    beside.prepare(sources[:1])
    assert beside._path(sources[0], "txt") == Path("a.txt")


def test_nothing_is_written_outside_the_output_folder(folder, model, monkeypatch):
    tone("x/a.wav", 1)
    tone("work/y/a.wav", 2)
    monkeypatch.chdir("work")
    assert run("../x/a.wav", "y/a.wav", "--output-dir", "out") == 0
    assert texts("out") == {"x/a.txt": "1 s", "work/y/a.txt": "2 s"}
    assert safe_name("../x") == "_.._x" and safe_name(" ") == " " and safe_name("") == "_"
    (source,) = find_sources(["y/a.wav"])
    object.__setattr__(source, "inside", Path("../b"))
    with pytest.raises(SettingsError, match="would not be in out"):
        Outputs(formats=("txt",), folder=Path("out")).prepare([source])


def test_overwrite_keeps_the_rows_of_other_recordings(folder, model):
    assert run("calls", "a.wav", "--output", "jsonl") == 0
    before, _ = rows()
    tone("a.wav", 7)
    assert run("a.wav", "--output", "jsonl", "--overwrite") == 0
    assert rows() == (before | {"a.wav": "7 s"}, 4)


def test_a_stopped_overwrite_resumes_without_the_option(folder, model, monkeypatch, capsys):
    names = [f"n/{n}.wav" for n in range(6)]
    for name in names:
        tone(name, 1)
    words = (*names, "--output", "txt,jsonl", "--output-dir", "out", "--batch-size", "1")
    assert run(*words) == 0
    for name in names:
        tone(name, 2)
    opened = opening.open_model("m", opening.Options())

    def stop(waves):
        if len(model) == 3:
            raise KeyboardInterrupt
        return opened.transcribe(waves)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        changed = opening.OpenedModel(name="m", sampling_rate=16_000, transcribe=stop)
        patch.setattr(opening, "open_model", lambda name, options: changed)
        run(*words, "--overwrite")
    err = capsys.readouterr().err
    assert "what is written is kept, and the same command without --overwrite resumes" in err
    assert sorted(texts("out").values()) == ["1 s"] * 2 + ["2 s"] * 4
    assert rows("out/transcripts.jsonl")[1] == 6
    model.clear()
    assert run(*words) == 0
    assert model == [[2, 2]] and set(texts("out").values()) == {"2 s"}
    assert set(rows("out/transcripts.jsonl")[0].values()) == {"2 s"}
    assert rows("out/transcripts.jsonl")[1] == 6


def test_a_further_format_adds_no_second_row(folder, model):
    assert run("calls", "--output", "jsonl") == 0
    before = Path("transcripts.jsonl").read_bytes()
    Path("transcripts.jsonl").write_bytes(before + before.split(b"\n")[0] + b"\n")  # killed
    assert run("calls", "--output", "jsonl,srt") == 0
    assert rows()[1] == 3 and len(list(Path("calls").rglob("*.srt"))) == 3
    Path("calls/day/c.srt").unlink()
    assert run("calls", "--output", "jsonl,srt,txt") == 0
    assert rows()[1] == 3 and Path("calls/day/c.srt").exists()


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_text_of_the_user_is_no_transcript(folder, model, capsys, options):
    Path("calls/day/c.txt").write_text("a reference")
    with pytest.raises(SystemExit, match="2"):
        run("calls", *options)
    err = capsys.readouterr().err
    assert "calls/day/c.txt is there already, and this command did not write it" in err
    assert "--output-dir" in err and err.count("\n") == 1 and model == []
    assert Path("calls/day/c.txt").read_text() == "a reference"
    assert run("calls", "--output-dir", "out", *options) == 0
    Path("transcripts.jsonl").write_text('{"audio_filepath": "a.wav", "text": "mine"}\n')
    with pytest.raises(SystemExit, match="2"):
        run("a.wav", "--output", "jsonl", *options)
    assert rows()[0] == {"a.wav": "mine"}


def test_a_journal_that_was_cut_off_spoils_one_line_alone(folder, model):
    assert run("calls", "--output-dir", "out") == 0
    journal = Path("out", JOURNAL)
    journal.write_text(journal.read_text() + '\n{"name": "b.w')
    assert run("a.wav", "calls", "--output-dir", "out") == 0
    assert run("a.wav", "calls", "--output-dir", "out") == 0
    assert [sorted(call) for call in model] == [[2, 3, 4], [1]]


def test_a_folder_that_cannot_be_written_is_told_before_a_model_is_loaded(
    folder, model, capsys, monkeypatch
):
    def fail(name, options):
        raise AssertionError

    monkeypatch.setattr(opening, "open_model", fail)
    for name in ("a.wav", "a.wav/out", "/proc/out"):
        with pytest.raises(SystemExit, match="2"):
            run("calls", "--output-dir", name)
        assert f"{name}: cannot be written (" in capsys.readouterr().err.replace("/day:", ":")


@pytest.mark.parametrize("options", [("--output-dir", "out"), ("--output", "jsonl")])
def test_one_command_at_a_time_writes_into_a_folder(folder, model, capsys, options):
    other = Outputs(formats=("jsonl",), folder=Path("out") if "out" in options else None)
    with other.locked(), pytest.raises(SystemExit, match="2"):
        run("calls", *options)
    err = capsys.readouterr().err
    assert ": another command is writing transcripts there; wait" in err
    assert err.count("\n") == 1 and model == []
    assert run("calls", *options) == 0


def test_a_transcript_that_cannot_be_written_is_left_out(folder, model, capsys):
    longest, too_long = "n" * 251, "m" * 252  # of 255 bytes that a name may have, with .txt
    for name in (too_long, longest, "z"):
        Path("long", f"{name}.au").parent.mkdir(exist_ok=True)
        soundfile.write(f"long/{name}.au", np.zeros(RATE_HZ), RATE_HZ, format="AU")
    assert run("long", "--output-dir", "out", "--output", "txt,jsonl") == 1
    assert texts("out") == {f"{longest}.txt": "1 s", "z.txt": "1 s"}
    err = capsys.readouterr().err
    assert f"long/{too_long}.au: left out: out/{too_long}.txt: cannot be written (File name" in err
    assert "left out: 1 recording" in err


def test_a_recording_whose_name_is_not_utf8_is_left_out(folder, model, capsys):
    os.link("calls/b.wav", b"calls/bad\xff.wav")
    assert run("calls", "--output", "txt,jsonl", "--output-dir", "out") == 1
    assert (
        r"calls/bad\xff.wav: left out: its name is not UTF-8; rename it" in capsys.readouterr().err
    )
    assert rows("out/transcripts.jsonl")[1] == 3 and len(texts("out")) == 3
