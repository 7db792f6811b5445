"""`speechlm2-jax transcribe`: recordings from anywhere, files of every format, and a restart."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from speechlm2_jax.evaluation.inputs import read_inputs
from speechlm2_jax.inference.timed_text import Transcript
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.transcription import opening
from speechlm2_jax.transcription.inputs import find_sources
from speechlm2_jax.transcription.opening import Options, choose_model, open_model
from speechlm2_jax.transcription.outputs import Outputs
from speechlm2_jax.transcription.progress import AudioProgress, duration
from speechlm2_jax.transcription.run import transcribe_all
from tests.evaluation.run_case import make_run
from tests.transcription.conftest import RATE_HZ, run, texts, tone


def test_the_text_of_one_recording_is_printed(folder, model, capsys):
    assert run("a.wav") == 0
    assert capsys.readouterr().out == "1 s\n"
    assert not Path("a.txt").exists()


def test_outputs_lie_beside_the_recordings(folder, model, capsys):
    assert run("a.wav", "calls", "--output", "srt,json") == 0
    assert sorted(p.as_posix() for p in Path().rglob("*.srt")) == [
        "a.srt",
        "calls/b.flac.srt",
        "calls/b.wav.srt",
        "calls/day/c.srt",
    ]
    assert Path("calls/day/c.srt").read_text() == "1\n00:00:00,000 --> 00:00:03,000\n3 s\n\n"
    assert json.loads(Path("calls/b.wav.json").read_text())["audio_filepath"] == "calls/b.wav"
    err = capsys.readouterr().err
    assert "transcribed 4 recordings, 10.0 s of audio" in err and "audio per second" in err
    assert err.endswith("\nwritten to the folders of the recordings\n")
    assert not list(Path().rglob("*.part"))


def test_a_restart_goes_on_where_it_ended(folder, model, capsys):
    assert run("calls", "--output-dir", "out") == 0
    assert Path("out/day/c.txt").read_text() == "3 s\n"
    Path("out/day/c.txt").unlink()
    model.clear()
    assert run("calls", "--output-dir", "out") == 0
    err = capsys.readouterr().err
    assert model == [[3]] and "2 of 3 are transcribed already" in err
    assert "transcribed 1 recording, " in err and err.endswith("\nwritten to out/day/c.txt\n")
    assert run("calls", "--output-dir", "out") == 0
    assert model == [[3]] and "nothing is left to do" in capsys.readouterr().err
    assert run("calls", "--output-dir", "out", "--overwrite") == 0
    assert sorted(model[-1]) == [2, 3, 4]


def test_jsonl_has_a_line_for_each_recording_and_goes_on(folder, model):
    assert run("calls", "--output", "jsonl") == 0
    lines = Path("transcripts.jsonl").read_text().splitlines(keepends=True)
    Path("transcripts.jsonl").write_text("".join(lines[:2]) + lines[2][:9])  # killed in the middle
    model.clear()
    assert run("calls", "--output", "jsonl") == 0
    assert [len(call) for call in model] == [1]
    assert Path("transcripts.jsonl").read_text().splitlines(keepends=True) == lines
    rows = [json.loads(line) for line in lines]
    assert {row["audio_filepath"]: row["text"] for row in rows} == {
        "calls/b.flac": "2 s",
        "calls/b.wav": "4 s",
        "calls/day/c.ogg": "3 s",
    }


def test_a_recording_that_cannot_be_read_is_named_and_left_out(folder, model, capsys):
    Path("calls/bad.wav").write_bytes(b"RIFF")
    assert run("calls", "--output", "txt") == 1
    err = capsys.readouterr().err
    assert "calls/bad.wav: left out: " in err and "left out: 1 recording\n" in err
    assert Path("calls/day/c.txt").exists() and not Path("calls/bad.txt").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere.wav"], "no such file or folder: 'nowhere.wav'"),
        (["b*.wav"], "no file or folder matches 'b*.wav'"),
        (["a.wav", "--output", "doc"], "--output: 'doc' is no format; use txt, json"),
        (["calls/notes.txt"], "calls/notes.txt is neither audio nor a manifest"),
        (["a.wav", "--set", "max_new_tokens=5"], "--set max_new_tokens: use --max-new-tokens"),
        (["a.wav", "--set", "batch_size=5"], "--set batch_size: use --batch-size"),
        (
            ["a.wav", "--set", "num_beans=5"],
            "--set: generate does not know 'num_beans'; did you mean",
        ),
        (["a.wav", "--set", "num_beams=many"], "--set num_beams"),
        (["a.wav", "--timestamps", "word"], "--timestamps: txt shows no times; add a format"),
        (["a.wav", "--aligner", "x"], "--aligner: txt shows no times; add a format"),
    ],
)
def test_bad_input_is_one_line(folder, model, capsys, words, error):
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    err = capsys.readouterr().err
    assert err.startswith(f"speechlm2-jax transcribe: {error}") and err.count("\n") == 1


def names(inputs, stdin=""):
    return [source.name for source in find_sources(inputs, io.StringIO(stdin))]


def test_inputs_are_files_folders_patterns_lists_and_manifests(folder):
    assert names(["calls/**/*.ogg", "a.wav"]) == ["calls/day/c.ogg", "a.wav"]
    assert names(["a.wav", "a.wav", "-"], "calls/b.flac\n\ncalls/b.wav\n") == [
        "a.wav",
        "calls/b.flac",
        "calls/b.wav",
    ]
    rows = [
        {"audio_filepath": "a.wav", "duration": 0.5},
        {"audio_filepath": "a.wav", "duration": 0.5, "offset": 0.5},
    ]
    Path("m.jsonl").write_text("".join(json.dumps({**row, "text": ""}) + "\n" for row in rows))
    first, second = find_sources(["m.jsonl"])
    assert first.stem.name == "a" and second.stem.name == "a_0.5"
    assert len(second.utterance.read(RATE_HZ)) == RATE_HZ // 2
    with pytest.raises(SettingsError, match="nothing to transcribe"):
        find_sources(["-"], io.StringIO("\n"))


def test_the_json_of_a_stretch_tells_where_it_begins(folder):
    row = {"audio_filepath": "a.wav", "duration": 0.5, "offset": 0.5, "text": ""}
    Path("m.jsonl").write_text(json.dumps(row))
    (source,) = find_sources(["m.jsonl"])
    outputs = Outputs(formats=("json",), folder=Path("out"))
    outputs.write(source, Transcript("x"))
    assert json.loads(Path("out/a_0.5.json").read_text())["offset"] == 0.5


def test_files_are_written_whole(folder, monkeypatch):
    (source,) = find_sources(["a.wav"])
    Path("out").write_text("a file where the folder should be")
    outputs = Outputs(formats=("jsonl",), folder=Path("out"))
    with pytest.raises(SettingsError, match="cannot be written .* --output-dir"):
        outputs.write(source, Transcript("x"))

    def fail(self, target):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(SettingsError, match="No space left"):
        Outputs(formats=("txt",)).write(source, Transcript("x"))
    assert [p.name for p in Path().iterdir() if p.suffix in (".txt", ".part")] == []


def test_without_a_run_public_models_are_named(folder):
    with pytest.raises(SettingsError, match=r"no trained model below runs/ .*canary-qwen-2\.5b"):
        choose_model(None)
    assert choose_model("x") == "x"


def test_the_newest_run_that_transcribes_is_chosen(folder):
    salm = {"pretrained_llm": "llm", "perception": {}}
    duplex = {"pretrained_llm": "llm", "pretrained_audio_codec": "codec"}
    ctc = {"tokenizer": {}, "preprocessor": {}, "encoder": {}}
    for name, model, saved_at_s in (
        ("salm", salm, 1e9),
        ("duplex", duplex, 3e9),
        ("ctc", ctc, 2e9),
    ):
        run = make_run(Path("runs", name), saved_at_s=saved_at_s, settings={"model": model})
        Path(run, "model").mkdir()
        Path(run, "model/config.json").write_text(json.dumps(model))
    assert choose_model(None) == "runs/ctc"
    shutil.rmtree("runs/ctc")
    assert choose_model(None) == "runs/salm"
    shutil.rmtree("runs/salm")
    with pytest.raises(SettingsError, match="no trained model below runs/ that transcribes"):
        choose_model(None)


def test_recordings_of_unknown_duration_are_read_one_at_a_time(folder, model):
    known = find_sources(["a.wav"]) * 5
    unknown = [replace(s, utterance=replace(s.utterance, duration_s=0.0)) for s in known[:2]]
    opened = opening.open_model("m", Options())
    transcribe_all(
        [*known, *unknown], opened, None, AudioProgress(7, 7.0, stream=io.StringIO()), group_size=4
    )
    assert model == [[1] * 4, [1], [1], [1]]


def test_progress_counts_audio():
    now = [0.0]
    lines = io.StringIO()
    progress = AudioProgress(3, 30.0, stream=lines, clock=lambda: now[0])
    for _ in range(3):
        now[0] += 4.0
        progress.update(10.0)
    assert lines.getvalue() == "2 of 3 recordings, 20.0 s of audio, 2.5 s of audio per second\n"
    assert progress.speed() == pytest.approx(2.5)
    assert [duration(s) for s in (3.21, 260, 7500)] == ["3.2 s", "4 min 20 s", "2 h 5 min"]


@pytest.mark.parametrize("inputs", [("x/a.wav", "y/a.wav"), ("x", "y"), ("?/*.wav",)])
def test_recordings_of_one_name_from_several_folders_each_have_their_text(inputs, folder, model):
    tone("x/a.wav", 1)
    tone("y/a.wav", 2)
    for calls in ([[1, 2]], []):  # the second time nothing is left to do
        model.clear()
        assert run(*inputs, "--output-dir", "out") == 0
        assert texts("out") == {"x/a.txt": "1 s", "y/a.txt": "2 s"} and model == calls


def test_the_text_of_a_recording_is_not_taken_for_that_of_its_sibling(folder, model):
    tone("z/a.wav", 1)
    tone("z/a.flac", 2)
    tone("z/me@home.wav", 3)
    assert run("z/a.wav", "z/me@home.wav") == 0
    assert run("z/a.flac", "z/me@home.wav", "./z/me@home.wav") == 0
    assert texts("z") == {"a.wav.txt": "1 s", "a.flac.txt": "2 s", "me@home.txt": "3 s"}
    assert model == [[1, 3], [2]]


def test_outputs_that_nothing_tells_apart_are_refused(folder, model, capsys):
    for name, seconds in (("z/a.wav", 1), ("z/a.flac", 2), ("z/a.wav.flac", 3)):
        tone(name, seconds)
    with pytest.raises(SystemExit):
        run("z", "--output", "srt")
    assert "would have the same output" in capsys.readouterr().err and not list(
        Path().rglob("*.srt")
    )


def test_jsonl_in_another_folder_is_a_manifest(folder, model):
    row = {"audio_filepath": "calls/b.flac", "duration": 1.0, "offset": 1.0}
    Path("rows.jsonl").write_text(json.dumps(row))
    for _ in range(2):
        assert run("rows.jsonl", "a.wav", "--output", "jsonl", "--output-dir", "o/p") == 0
    written = read_inputs("o/p/transcripts.jsonl")
    assert [(one.text, one.read(RATE_HZ).shape) for one in written] == [("1 s", (RATE_HZ,))] * 2
    assert [one.source.rpartition("@")[2] for one in written] == ["1.0", "0.0"] and len(model) == 1


def test_what_is_written_is_kept_until_the_first_new_transcript(folder, model, monkeypatch):
    assert run("a.wav", "--output", "jsonl") == 0
    before = Path("transcripts.jsonl").read_text()

    def refuse(name, options):
        raise SettingsError("no such model")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(opening, "open_model", refuse)
        run("a.wav", "--output", "jsonl", "--overwrite")
    assert Path("transcripts.jsonl").read_text() == before
    assert run("--output", "jsonl", "calls", "--overwrite", "a.wav") == 0
    assert len(Path("transcripts.jsonl").read_text().splitlines()) == 4


def test_rows_of_different_durations_at_one_place_are_refused(folder):
    rows = [{"audio_filepath": "a.wav", "offset": 0.5, "duration": n} for n in (0.1, 0.2)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SettingsError, match=r"a\.wav: two rows of .* start at 0\.5 s"):
        names(["rows.jsonl"])


def test_options_of_an_llm_are_refused_for_an_asr_model():
    options = Options(dtype="bfloat16", max_new_tokens=3)
    with pytest.raises(SettingsError, match="--dtype, --max-new-tokens: leave out"):
        open_model("configs/parts/tiny_encoder.nemo", options)
