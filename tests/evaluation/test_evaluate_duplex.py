"""evaluate.py with a real, tiny duplex model from a directory that NeMo 3.0.0 wrote."""

import gc
import json
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from speechlm2_jax.evaluation.duplex.scoring import DuplexScorer
from speechlm2_jax.models.asr import ASRModel
from tests.evaluation.run_case import evaluate_on_one_device
from tests.parity.duplex_golden import DATA
from tests.parity.salm_golden import working_in

FOLDER = DATA / "dataset"
ROLES = ("input_roles=[user,User]", "output_roles=[agent,Assistant]")
CUTS = ("multiturn", "bargein")


def write_cuts(path: Path, names=CUTS) -> Path:
    """Recorded conversations, and first of all one whose user cannot be read."""
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    golden = {cut["id"]: cut for cut in json.loads((FOLDER / "dataset.json").read_text())["cuts"]}
    cuts = []
    for name in names:
        cut = golden[name]
        user, agent = (
            Recording.from_file(FOLDER / cut[f"{voice}_wav"]) for voice in ("source", "target")
        )
        turns = [
            SupervisionSegment(
                *(f"{name}-{n}", user.id, turn["start"], turn["duration"]),
                text=turn["text"],
                speaker=turn["speaker"],
            )
            for n, turn in enumerate(cut["supervisions"])
            if turn["speaker"] != "other"
        ]
        values = {"channel": 0, "supervisions": turns, "custom": {"target_audio": agent}}
        cuts.append(MonoCut(name, 0.0, cut["duration"], recording=user, **values))
    lost = path.parent / "lost.wav"
    soundfile.write(lost, np.zeros(16000), 16000)
    gone = Recording.from_file(lost)
    lost.write_bytes(b"")
    cuts.insert(0, MonoCut("lost", 0.0, 1.0, **{**values, "supervisions": []}, recording=gone))
    CutSet.from_cuts(cuts).to_file(path)
    return path


@pytest.fixture
def loaded_asr(monkeypatch):
    """Weak references to the scoring ASR models that were loaded."""
    made, load = [], ASRModel.from_pretrained.__func__

    def loading(cls, *args, **options):
        made.append(weakref.ref(asr := load(cls, *args, **options)))
        return asr

    monkeypatch.setattr(ASRModel, "from_pretrained", classmethod(loading))
    return made


def test_conversations_are_generated_transcribed_scored_and_shown(tmp_path, loaded_asr, capsys):
    cuts = write_cuts(tmp_path / "dialogs.jsonl.gz")
    argv = [
        f"pretrained_name={DATA / 'duplex_s2s' / 'hf'}",
        f"inputs={cuts}",
        f"output_manifest={tmp_path / 'answers.jsonl'}",
        f"audio_folder={tmp_path / 'speech'}",
        f"report={tmp_path / 'report.html'}",
        f"benchmark_folder={tmp_path / 'folders'}",
        f"scoring_asr={DATA / 'assets' / 'asr_scoring.nemo'}",
        *ROLES,
        "batch_size=4",
        "dtype=float32",
        "device=cpu",
        "verbose=false",
    ]
    try:
        with working_in(DATA):
            assert evaluate_on_one_device(argv) == 0
    finally:
        jax.config.update("jax_default_device", None)
    gc.collect()
    assert [asr() for asr in loaded_asr] == [None], "the scoring ASR model is freed"
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    *rows, last = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == ["lost", *CUTS]
    assert "lost.wav" in rows[0]["error"]
    assert rows[1]["user_text"] == "hi can you help me" and rows[1]["text"] == "yes sure ok"
    # the end of the second turn falls into its text, which goes on after it
    starts = [turn["start"] for turn in rows[1]["user_turns"]]
    assert starts == pytest.approx([0.0, 1.12, 1.6])
    assert [turn.get("outside", False) for turn in rows[1]["user_turns"]] == [False, False, True]
    for row in rows[1:]:
        wave, rate = soundfile.read(row["audio"])
        assert rate == 22050
        assert len(wave) / rate == pytest.approx(row["duration"], abs=0.081)
        assert row["pred_text"] and row["heard"] is not None
        assert row["scores"]["events"]["turns"] + row["scores"]["events"].get("interruptions", 0)
    for number, row in enumerate(rows[1:], start=2):  # the first cannot be read
        folder = tmp_path / "folders" / "dialogs" / str(number)
        assert json.loads((folder / "metadata.json").read_text())["id"] == row["id"]
        user, agent = (soundfile.info(folder / f"{name}.wav") for name in ("input", "output"))
        assert user.frames == agent.frames and user.samplerate == agent.samplerate == 16000
    totals = last["provenance"]["totals"]
    assert totals["failed"] == {"unreadable": 1}
    scores = totals["by_set"]["dialogs"]["scores"]
    assert scores == totals["scores"]
    assert {"txt_bleu", "asr_bleu", "wer", "empty_text_rate", "audio_token_acc"} <= set(scores)
    assert {"right_text", "takeover_rate"} <= set(scores)
    silent = totals["scores_of_silence"]
    assert (silent["right_text"], silent["wer"], silent["takeover_rate"]) == (0.0, 1.0, 0.0)
    printed = capsys.readouterr().out
    assert "model | pads and silence" in printed and "| 100.00%" in printed
    assert "text BLEU" in printed and "RTFx" in printed
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:audio/ogg") == 3 * len(CUTS)
    assert all(f'title="{name}"' in page for name in ("lost", *CUTS))


@pytest.mark.slow
def test_an_interrupted_evaluation_is_resumed_with_the_same_scores(tmp_path, monkeypatch, capsys):
    cuts = write_cuts(tmp_path / "dialogs.jsonl")
    generate, processed = DuplexScorer.generate, []

    def interrupted(self, examples, batch_size=0):
        if len(processed) == 1:
            processed.append(None)
            raise KeyboardInterrupt
        processed.append(examples[0].id)
        return generate(self, examples, batch_size)

    def run(name):
        argv = [
            f"pretrained_name={DATA / 'duplex_s2s' / 'hf'}",
            f"inputs={cuts}",
            f"output_manifest={tmp_path / name}.jsonl",
            f"audio_folder={tmp_path / 'speech'}",
            f"report={tmp_path / name}.html",
            f"scoring_asr={DATA / 'assets' / 'asr_scoring.nemo'}",
            *(*ROLES, "batch_size=1", "dtype=float32", "device=cpu", "verbose=false"),
        ]
        try:
            with working_in(DATA):
                return evaluate_on_one_device(argv)
        finally:
            jax.config.update("jax_default_device", None)

    assert run("whole") == 0
    monkeypatch.setattr(DuplexScorer, "generate", interrupted)
    assert run("resumed") == 130
    assert "1 of 3 responses are in" in capsys.readouterr().err
    assert run("resumed") == 0
    assert sorted(filter(None, processed)) == sorted(CUTS), "none twice"
    found = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    ]
    assert found[0][:-1] == found[1][:-1]
    totals = [rows[-1]["provenance"]["totals"] for rows in found]
    assert totals[0]["scores"] == totals[1]["scores"] and len(totals[0]["scores"]) > 8
    assert (tmp_path / "resumed.html").read_text().count("data:audio/ogg") == 3 * len(CUTS)


def test_a_speaker_in_neither_role_is_refused_before_any_weight_is_read(tmp_path, capsys):
    cuts = write_cuts(tmp_path / "dialogs.jsonl")
    model = DATA / "duplex_s2s" / "hf"
    assert evaluate_on_one_device([f"pretrained_name={model}", f"inputs={cuts}"]) == 2
    error = capsys.readouterr().err
    assert "'User'" in error and "input_roles ['user']" in error and "did you mean" in error


@pytest.mark.parametrize(
    ("argument", "why"),
    [("user_prompt=hi", "no text prompt"), ("max_new_tokens=3", "one token per frame")],
)
def test_arguments_of_other_models_are_refused(argument, why, tmp_path, capsys):
    argv = [f"pretrained_name={DATA / 'duplex_s2s' / 'hf'}", f"inputs={tmp_path}", argument]
    assert evaluate_on_one_device(argv) == 2
    assert why in capsys.readouterr().err
