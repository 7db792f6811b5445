"""What is evaluated when the command line does not say: the newest run, as it was trained."""

import copy
from pathlib import Path

import pytest

from speechlm2_jax.evaluation import run_directories
from speechlm2_jax.evaluation.duplex.plan import _beside
from speechlm2_jax.evaluation.plan import make_plan
from speechlm2_jax.evaluation.run_directories import newest_run, read_run
from speechlm2_jax.object_store.folders import copy_folder
from speechlm2_jax.settings import SettingsError
from tests.evaluation.run_case import SETTINGS, make_run, write_manifest


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, apart from this project's own corpus and configs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directories, "REPOSITORY", tmp_path / "project")
    folders = (Path("configs"), tmp_path / "project" / "configs")
    monkeypatch.setattr(run_directories, "config_folders", lambda: folders)
    return tmp_path


def test_the_newest_run_is_the_one_saved_last(here):
    make_run(Path("runs/b"), saved_at_s=3e9)
    make_run(Path("runs/deep/a/version_0"), saved_at_s=4e9)
    make_run(Path("runs/c"), saved_at_s=2e9)
    assert newest_run().folder == Path("runs/deep/a/version_0")


def test_a_run_without_checkpoint_or_of_another_model_is_passed_over(here):
    make_run(Path("runs/salm"), saved_at_s=1e9)
    make_run(Path("runs/ctc"), saved_at_s=3e9, settings={"model": {"encoder": {}}})
    (make_run(Path("runs/started"), steps=()) / "checkpoints").mkdir()
    assert newest_run().folder == Path("runs/salm")


def test_without_a_run_the_error_names_the_command_that_makes_one(here):
    with pytest.raises(SettingsError, match="below runs/; train one with `python train.py --conf"):
        make_plan({})


def test_without_arguments_outputs_go_into_the_run(here):
    make_run(Path("runs/salm"))
    write_manifest(Path("corpus/test.jsonl"), [{"text": "a"}])
    config = make_plan({}).config
    assert config.pretrained_name == "runs/salm"
    assert config.inputs == "corpus/test.jsonl"
    assert config.output_manifest == "runs/salm/answers.jsonl"
    assert config.report == "runs/salm/report.html"
    assert not config.verbose
    swapped = make_plan({"swap_audio": True}).config
    assert swapped.output_manifest == "runs/salm/answers_swapped.jsonl"
    assert swapped.report == "runs/salm/report_swapped.html"
    noisy = make_plan({"noise": "white", "snr_db": 6})
    assert noisy.config.output_manifest == "runs/salm/answers_noise_6dB.jsonl"
    assert noisy.config.report == "runs/salm/report_noise_6dB.html"
    assert "\naudio  NOISY: white at 6 dB is mixed in" in noisy.summary()
    both = make_plan({"noise": "white", "swap_audio": True}).config
    assert both.output_manifest == "runs/salm/answers_swapped_noise_12dB.jsonl"


def test_outputs_of_a_run_at_an_address_go_into_the_working_folder(here, monkeypatch):
    monkeypatch.setenv("SPEECHLM2_JAX_RUN_CACHE", str(here / "cache"))
    copy = make_run(copy_folder("s3://bucket/runs/digits"))
    write_manifest(Path("corpus/test.jsonl"), [{"text": "a"}])
    plan = make_plan({"pretrained_name": str(copy)})
    assert plan.config.output_manifest == "digits/answers.jsonl"
    assert plan.config.report == "digits/report.html"
    assert "\noutput digits/, as the run is at an address" in plan.summary()
    assert read_run(copy).is_remote
    duplex = {"model": {"pretrained_audio_codec": "codec"}, "data": {}}
    run = read_run(make_run(copy_folder("s3://bucket/duplex"), settings=duplex))
    assert _beside(run)["report"] == "duplex/report.html"


def test_the_test_set_is_found_here_before_the_projects_own(here):
    make_run(Path("runs/salm"))
    with pytest.raises(SettingsError, match="inputs: no corpus/test.jsonl here or in"):
        make_plan({})
    own = write_manifest(here / "project" / "corpus" / "test.jsonl", [{"text": "a"}])
    assert make_plan({}).config.inputs == str(own)
    write_manifest(Path("corpus/test.jsonl"), [{"text": "a"}])
    assert make_plan({}).config.inputs == "corpus/test.jsonl"


def test_a_run_is_evaluated_with_prompt_dtype_and_normalizer_of_its_training(here):
    make_run(Path("runs/salm"))
    config = make_plan({"pretrained_name": "runs/salm", "inputs": "x.jsonl"}).config
    assert (config.user_prompt, config.system_prompt) == ("Write down:", "Be exact.")
    assert (config.dtype, config.use_normalizer) == ("float32", "basic")
    settings = copy.deepcopy(SETTINGS)
    settings["trainer"]["precision"] = "bf16-true"
    make_run(Path("runs/half"), settings=settings)
    assert make_plan({"pretrained_name": "runs/half", "inputs": "x"}).config.dtype == "bfloat16"


def test_the_longest_recording_of_training_is_the_longest_input(here):
    settings = {
        **SETTINGS,
        "data": {"train_ds": {**SETTINGS["data"]["train_ds"], "max_duration": 12}},
    }
    make_run(here / "runs" / "a")
    make_run(here / "runs" / "b", settings=settings)
    arguments = {"inputs": "x", "pretrained_name": "runs/b"}
    assert make_plan(arguments).config.max_audio_s == 12.0
    assert make_plan({**arguments, "max_audio_s": 8}).config.max_audio_s == 8.0
    assert make_plan({**arguments, "pretrained_name": "runs/a"}).config.max_audio_s == 40.0


def test_arguments_of_the_command_line_win(here):
    make_run(Path("runs/salm"))
    arguments = {
        "inputs": "x.jsonl",
        "user_prompt": "",
        "use_normalizer": None,
        "dtype": "bfloat16",
        "output_manifest": None,
    }
    config = make_plan(arguments).config
    assert {key: getattr(config, key) for key in arguments} == arguments


def test_inputs_that_are_named_keep_nemos_outputs(here):
    make_run(Path("runs/salm"))
    config = make_plan({"inputs": "x.jsonl"}).config
    assert (config.output_manifest, config.report) == ("generations.jsonl", None)
    assert config.verbose
    assert not config.encoder_wer


def test_a_model_that_is_no_run_keeps_nemos_defaults(here):
    Path("nemo").mkdir()
    config = make_plan({"pretrained_name": "nemo", "inputs": "x.jsonl"}).config
    assert (config.use_normalizer, config.dtype) == ("english", "bfloat16")
    assert (config.user_prompt, config.output_manifest) == (None, "generations.jsonl")


def test_the_step_is_the_best_else_the_last(here):
    run = read_run(make_run(Path("runs/a"), best=10))
    assert run is not None
    assert run.step == (10, "best val_wer")
    plan = make_plan({"pretrained_name": "runs/a", "inputs": "x.jsonl"})
    assert plan.step == 10
    assert plan.summary() == (
        "run    runs/a, step 10 (best val_wer)\n"
        "data   x.jsonl\n"
        "prompt 'Be exact.' 'Write down:', as trained"
    )
    (here / "set").mkdir()
    (here / "set" / "b.txt").touch()
    noted = make_plan({"pretrained_name": "runs/a", "inputs": "set"}).summary()
    assert "\nnote   files left out: 1 (1 .txt); supported audio: .wav" in noted
    unranked = read_run(make_run(Path("runs/b")))
    assert unranked is not None
    assert unranked.step == (20, "the last")


def test_the_encoder_is_scored_beside_only_where_its_file_is_found(here):
    make_run(Path("runs/salm"))
    write_manifest(Path("corpus/test.jsonl"), [{"text": "a"}])
    assert make_plan({}).encoder_file is None
    nemo = here / "project" / "configs" / "parts" / "encoder.nemo"
    nemo.parent.mkdir(parents=True)
    nemo.touch()
    assert make_plan({}).encoder_file == nemo
    assert make_plan({"swap_audio": True}).encoder_file is None
    assert make_plan({"encoder_wer": False}).encoder_file is None
    assert make_plan({"inputs": "x"}).encoder_file is None
    assert make_plan({"inputs": "x", "encoder_wer": True}).encoder_file == nemo


def test_drafts_come_from_the_runs_encoder_or_a_named_file(here):
    make_run(Path("runs/salm"))
    write_manifest(Path("corpus/test.jsonl"), [{"text": "a"}])
    assert make_plan({}).draft_file is None
    with pytest.raises(SettingsError, match="draft: encoder needs a run directory"):
        make_plan({"draft": "encoder"})
    with pytest.raises(SettingsError, match="draft: .*asr.nemo"):
        make_plan({"draft": "asr.nemo"})
    nemo = here / "project" / "configs" / "parts" / "encoder.nemo"
    nemo.parent.mkdir(parents=True)
    nemo.touch()
    assert make_plan({"draft": "encoder", "encoder_wer": False}).draft_file == nemo
    assert make_plan({"draft": str(nemo)}).draft_file == nemo


def test_a_voice_is_unseen_if_training_never_names_it(here):
    make_run(Path("runs/salm"))
    rows = [{"text": "a", "voice": "anna"}, {"text": "b", "voice": "ben"}, {"text": "c"}]
    write_manifest(Path("corpus/test.jsonl"), rows)
    assert [u.is_unseen for u in make_plan({}).utterances()] == [False, False, False]
    write_manifest(Path("train.jsonl"), [{"text": "d", "voice": "anna"}])
    assert [u.is_unseen for u in make_plan({}).utterances()] == [False, True, False]


def test_a_manifest_may_say_itself_which_voices_are_unseen(here):
    make_run(Path("runs/salm"))
    rows = [{"text": "a", "voice": "x", "unseen_voice": True}, {"text": "b", "speaker": "y"}]
    write_manifest(Path("corpus/test.jsonl"), rows)
    found = make_plan({}).utterances()
    assert [(u.voice, u.is_unseen) for u in found] == [("x", True), ("y", False)]


def test_an_output_that_is_a_folder_is_refused(here):
    plan = make_plan({"pretrained_name": "m", "inputs": "x", "report": str(here)})
    with pytest.raises(SettingsError, match="report: .* is a folder; name a file"):
        plan.output("report")
