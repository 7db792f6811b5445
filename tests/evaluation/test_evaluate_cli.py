"""evaluate.py as typed: one line and exit 2 for bad input, rows and a table otherwise."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import evaluate
from speechlm2_jax import models
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.evaluation import run_directories
from speechlm2_jax.evaluation.devices import choose_devices
from speechlm2_jax.evaluation.provenance import fingerprint
from speechlm2_jax.evaluation.results import write_rows
from speechlm2_jax.settings import SettingsError
from tests.evaluation.fake_model import FakeModel
from tests.evaluation.run_case import evaluate_on_one_device, make_run, write_manifest


@pytest.fixture
def fake(monkeypatch):
    """Stands in for SALM.from_pretrained, and takes the default device back."""
    model = FakeModel()

    class Fake:
        @staticmethod
        def from_pretrained(name, *, dtype, **placed):
            if name == "nothing":
                raise OSError("no such\nmodel")
            assert dtype == "float32"
            return model

    monkeypatch.setitem(vars(models), "SALM", Fake)
    yield model
    jax.config.update("jax_default_device", None)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "no run with a checkpoint below runs/; train one with `python train.py --config "
             "salm`, or name a model with pretrained_name=PATH"),
        (["pretrained_name=m", "inputs=x", "report_rows=-1"], "report_rows=-1 must be at least 0"),
        (["pretrained_name=m", "inputs=x", "encoder_wer=true"],
         "encoder_wer: needs a run directory whose config.yaml names a pretrained_asr that is on "
         "this machine; leave it out"),
        (["pretrained_name=m", "inputs=x", "batchsize=3"],
         "batchsize: unknown key; did you mean 'batch_size'?"),
        (["pretrained_name=m", "inputs=x", "batch_size=many"],
         "batch_size: expected int, got 'many' (str)"),
        (["pretrained_name=m", "inputs=x", "batch_size=0"], "batch_size=0 must be at least 1"),
        (["pretrained_name=m", "inputs=x", "dtype=float16"],
         "dtype: expected one of 'float32', 'bfloat16', got 'float16' (str)"),
        (["pretrained_name=m", "inputs=x", "use_normalizer=german"],
         "use_normalizer='german' is unknown; use english, basic, leaderboard, none"),
        (["pretrained_name=m", "inputs=x", "cp_size=2"],
         "cp_size: set strategy or tp_size instead: whole layers, experts and sequences stay "
         "together (got 2)"),
        (["pretrained_name=m", "inputs=/no/such.json"],
         "inputs: no such file or folder: '/no/such.json'"),
        (["pretrained_name=m", "inputs=x", "generation.top_p=abc"],
         "generation.top_p='abc' must be a number in [0, 1]"),
        (["pretrained_name=m", "inputs=x", "generation.bad_words_ids=[350]"],
         "generation.bad_words_ids=[350] must be a list of lists of token ids, as [[3], [4, 5]]"),
        (["pretrained_name=m", "inputs=x", "generation.min_new_tokens=200"],
         "generation.min_new_tokens=200 exceeds max_new_tokens=128"),
        (["pretrained_name=m", "inputs=x", "controls=true", "swap_audio=true"],
         "controls: have swapped audio themselves; leave swap_audio out"),
        (["what"], "'what': expected key=value; see evaluate.py --help"),
        (["--batch-size", "3"], "unrecognized arguments: --batch-size; see evaluate.py --help"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate_on_one_device(argv) == 2
    assert capsys.readouterr().err == f"evaluate.py: {expected}\n"


def test_help_lists_the_keys(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(key in text for key in ("pretrained_name", "use_normalizer", "extra_eos_tokens"))


def test_a_model_that_cannot_be_loaded_is_one_line(fake, wav, capsys):
    argv = ["pretrained_name=nothing", f"inputs={wav('a.wav', 1)}", "dtype=float32"]
    assert evaluate_on_one_device(argv) == 2
    assert capsys.readouterr().err == "evaluate.py: pretrained_name: no such model\n"


def test_ids_that_the_model_lacks_are_one_line(wav, capsys):
    model = Path(__file__).parents[1] / "data" / "salm" / "llama_adapter_hf"
    argv = [f"pretrained_name={model}", f"inputs={wav('a.wav', 1)}", "output_manifest=null"]
    try:
        assert evaluate_on_one_device([*argv, "generation.forced_eos_token_id=99999"]) == 2
    finally:
        jax.config.update("jax_default_device", None)
    line = capsys.readouterr().err
    assert line.startswith("evaluate.py: generation.forced_eos_token_id: [99999] are not token ids")
    assert line.count("\n") == 1


def test_a_device_that_is_not_there_is_refused_not_replaced(capsys):
    for name in ("tpu", "cuda:3"):
        with pytest.raises(SettingsError, match=f"device: {name} not found .JAX sees cpu"):
            choose_devices(name)
    with pytest.raises(SettingsError, match="'quantum' is unknown"):
        choose_devices("quantum")


def test_devices_by_name():
    try:
        assert choose_devices("cpu") == jax.devices()
        assert choose_devices("cpu:3") == [jax.devices()[3]]
        assert choose_devices("auto", 2) == jax.devices()[:2]
        with pytest.raises(SettingsError, match="devices=9: there are 8 devices; -1 takes all"):
            choose_devices("auto", 9)
    finally:
        jax.config.update("jax_default_device", None)


def test_a_run_writes_rows_in_input_order_and_provenance(fake, wav, tmp_path, capsys):
    manifest = tmp_path / "test.json"
    rows = [(1, "one"), (3, "three"), (2, "too")]
    for seconds, _ in rows:
        wav(f"{seconds}.wav", seconds)
    manifest.write_text(
        "".join(
            json.dumps({"audio_filepath": f"{s}.wav", "duration": s, "text": t}) + "\n"
            for s, t in rows
        )
    )
    output = tmp_path / "out.jsonl"
    argv = [
        f"pretrained_name={manifest}",
        f"inputs={manifest}",
        f"output_manifest={output}",
        "batch_size=2",
        "dtype=float32",
        "verbose=false",
        "use_normalizer=none",
        "extra_eos_tokens=[<extra>]",
        "device=cpu",
    ]
    assert evaluate_on_one_device(argv) == 0
    *rows, last = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(a["id"], a["text"], a["pred_text"]) for a in rows] == [
        ("1", "one", "one"),
        ("3", "three", "three"),
        ("2", "too", "two"),
    ]
    record = last["provenance"]
    assert record["model"] == {"name": str(manifest), "sha256": fingerprint(str(manifest))}
    assert record["settings"]["extra_eos_tokens"] == ["<extra>"]
    assert record["device"]["platform"] == "cpu"
    assert record["versions"]["jax"] == jax.__version__
    assert record["totals"]["substitutions"] == 1
    assert record["totals"]["wer"] == pytest.approx(1 / 3)
    table = capsys.readouterr().out
    assert "33.33% over 3 words" in table
    assert "RTFx without warm-up" in table


@pytest.fixture
def newcomer(fake, wav, tmp_path, monkeypatch):
    """A working folder with one run and a test set, and nothing typed yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directories, "REPOSITORY", tmp_path / "project")
    make_run(tmp_path / "runs" / "salm", best=10)
    for seconds in (1, 2, 3):
        wav(f"corpus/{seconds}.wav", seconds)
    rows = [
        {"audio_filepath": f"{s}.wav", "duration": s, "text": t, "voice": v}
        for s, t, v in ((1, "one", "anna"), (2, "two extra", "ben"), (3, "four", "ben"))
    ]
    write_manifest(tmp_path / "corpus" / "test.jsonl", rows)
    return fake


def test_without_arguments_the_newest_run_is_evaluated_and_its_page_written(newcomer, capsys):
    assert evaluate_on_one_device(["extra_eos_tokens=[<extra>]"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "run    runs/salm, step 10 (best val_wer)\n"
        "data   corpus/test.jsonl\n"
        "prompt 'Be exact.' 'Write down:', as trained\n"
    )
    assert "50.00% over 4 words" in printed
    assert "ben" in printed
    assert printed.endswith(
        "answers: runs/salm/answers.jsonl\nreport:  runs/salm/report.html  (open it in a browser)\n"
    )
    call = newcomer.calls[0]
    assert call["prompts"][0] == [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "Write down: <|audio|>"},
    ]
    *rows, last = map(json.loads, Path("runs/salm/answers.jsonl").read_text().splitlines())
    assert [row["voice"] for row in rows] == ["anna", "ben", "ben"]
    assert last["provenance"]["model"]["step"] == 10
    assert Path("runs/salm/report.html").read_text().count("<audio") == 3


def test_controls_have_the_audio_of_others_and_silence_of_the_same_length(newcomer, capsys):
    assert evaluate_on_one_device(["extra_eos_tokens=[<extra>]"]) == 0
    model, swapped, silent = newcomer.calls
    assert all(call["prompts"][0] == model["prompts"][0] for call in (swapped, silent))
    np.testing.assert_array_equal(silent["audio_lens"], model["audio_lens"])
    assert np.any(model["audios"])
    assert not np.any(silent["audios"])
    *rows, last = map(json.loads, Path("runs/salm/answers.jsonl").read_text().splitlines())
    assert [row["pred_text"] for row in rows] == ["one", "two", "three"]
    assert [row["controls"]["silent"] for row in rows] == ["one", "two", "three"]
    others = [row["controls"]["swapped"] for row in rows]
    assert sorted(others) == ["one", "three", "two"]
    assert all(other != row["pred_text"] for other, row in zip(others, rows, strict=True))
    comparisons = last["provenance"]["totals"]["comparisons"]
    assert comparisons["silent"]["other"] == comparisons["silent"]["model"]
    assert comparisons["swapped"]["other"]["value"] == 100.0
    printed = capsys.readouterr().out
    assert "WER, swapped audio    100.00%" in printed
    page = Path("runs/salm/report.html").read_text()
    assert "<dt>silence</dt><dd>three</dd>" in page


def test_controls_are_left_out_on_demand_and_where_no_swap_exists(newcomer, capsys):
    assert evaluate_on_one_device(["controls=false"]) == 0
    assert len(newcomer.calls) == 1
    assert "controls=true tests it" in capsys.readouterr().out
    only = {"audio_filepath": "1.wav", "duration": 1, "text": "one"}
    write_manifest(Path("corpus/test.jsonl"), [only])
    assert evaluate_on_one_device(["report=null"]) == 0
    assert len(newcomer.calls) == 3
    printed = capsys.readouterr().out
    assert "note   controls: no swapped audio, as it needs two or more utterances" in printed
    assert "with silence" in printed


def test_references_and_recordings_of_the_training_are_counted_and_marked(newcomer, capsys):
    seen = [
        {"audio_filepath": "corpus/2.wav", "duration": 2, "text": "other words"},
        {"audio_filepath": "copy.wav", "duration": 3, "text": "One!", "voice": "anna"},
    ]
    shutil.copy("corpus/3.wav", "copy.wav")
    write_manifest(Path("train.jsonl"), seen)
    assert evaluate_on_one_device(["extra_eos_tokens=[<extra>]"]) == 0
    *rows, last = map(json.loads, Path("runs/salm/answers.jsonl").read_text().splitlines())
    assert [row.get("seen_text") for row in rows] == [True, None, None]
    assert [row.get("seen_audio") for row in rows] == [None, True, True]
    found = last["provenance"]["totals"]["training"]
    assert (found["rows"], found["texts"], found["recordings"]) == (2, 1, 2)
    assert (found["seen_texts"]["wer"], found["new_texts"]["wer"]) == (0.0, 2 / 3)
    assert "1 references, 2 recordings (of 2 rows)" in capsys.readouterr().out
    page = Path("runs/salm/report.html").read_text()
    assert page.count(">reference in the training data</em>") == 1
    assert page.count(">recording in the training data</em>") == 2
    assert "WER is 0.0\u00a0% on these references, 66.7\u00a0% on the others" in page


def test_other_seeds_give_mean_and_spread(newcomer, capsys):
    rows = [("1", "one", "one"), ("2", "two extra", "two extra"), ("3", "four", "four")]
    lines = [{"id": i, "text_raw": t, "pred_text_raw": p} for i, t, p in rows]
    write_rows(Path("other/answers.jsonl"), lines, {})
    argv = ["extra_eos_tokens=[<extra>]", "controls=false"]
    assert evaluate_on_one_device([*argv, "seeds=[other]"]) == 0
    *_, last = map(json.loads, Path("runs/salm/answers.jsonl").read_text().splitlines())
    found = last["provenance"]["totals"]["seeds"]
    assert found["values"] == {"this one": 50.0, "other": 0.0}
    assert (found["mean"], round(found["deviation"], 2)) == (25.0, 35.36)
    assert "WER, 2 seeds" in capsys.readouterr().out
    page = Path("runs/salm/report.html").read_text()
    assert "Over 2 seeds WER is 25.0\u00a0%, standard deviation 35.4 (50.0, 0.0)." in page
    assert "Mean of 2 seeds" in page
    calls = len(newcomer.calls)
    write_rows(Path("other/answers.jsonl"), lines[:2], {})
    assert evaluate_on_one_device([*argv, "seeds=[other]"]) == 2
    assert "seeds: 3 and 2 responses with a reference" in capsys.readouterr().err
    assert len(newcomer.calls) == calls, "found before anything is generated"


def test_swapped_audio_is_scored_against_each_rows_own_words(newcomer, capsys):
    assert evaluate_on_one_device(["swap_audio=true", "extra_eos_tokens=[<extra>]"]) == 0
    *rows, last = map(json.loads, Path("runs/salm/answers_swapped.jsonl").read_text().splitlines())
    seconds = {"1": "one", "2": "two", "3": "three"}
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert all(row["audio_of"] != row["id"] for row in rows)
    assert [row["pred_text"] for row in rows] == [seconds[row["audio_of"]] for row in rows]
    assert [row["text"] for row in rows] == ["one", "two extra", "four"]
    assert last["provenance"]["totals"]["wer"] == 1.0
    printed = capsys.readouterr().out
    assert "audio  SWAPPED" in printed
    assert "WER, audio swapped" in printed


@pytest.fixture
def encoder(newcomer, monkeypatch):
    """Stands in for CTCModel; the run's encoder file is there."""
    nemo = Path("configs/parts/encoder.nemo")
    nemo.parent.mkdir(parents=True)
    nemo.touch()

    class CTCModel:
        sampling_rate = 16_000
        has_head = True

        @classmethod
        def from_pretrained(cls, path):
            assert Path(path) == nemo.absolute()
            if not cls.has_head:
                raise ConversionError("encoder.nemo: no CTC head")
            return cls()

        def transcribe(self, waves):
            return ["one" for _ in waves]

    monkeypatch.setitem(vars(models), "CTCModel", CTCModel)
    return CTCModel


def test_the_encoder_alone_is_printed_beside(encoder, capsys):
    assert evaluate_on_one_device(["report_rows=0"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "encoder alone (CTC) 75.00% over 4 words" in printed
    assert "Encoder alone" in Path("runs/salm/report.html").read_text()


def test_an_encoder_without_a_head_is_an_error_only_where_its_score_was_asked_for(encoder, capsys):
    encoder.has_head = False
    assert evaluate_on_one_device(["report=null"]) == 0
    printed = capsys.readouterr().out
    assert "note   encoder_wer: encoder.nemo: no CTC head\n" in printed
    assert "encoder alone" not in printed
    assert evaluate_on_one_device(["encoder_wer=true"]) == 2
    assert capsys.readouterr().err == "evaluate.py: encoder_wer: encoder.nemo: no CTC head\n"


def test_fingerprints_follow_contents_not_places(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "notes.txt").write_text(name)
    first = fingerprint(str(tmp_path / "a"))
    assert first == fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"others")
    assert first != fingerprint(str(tmp_path / "b"))
    assert fingerprint("nvidia/on-the-hub") is None
