"""The library: build, train, stop, resume, load, generate, save."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

import speechlm2_jax as slm
from tests.training.stopping import as_after

DATA = Path(__file__).parent / "data"
TAG = "<|audioplaceholder|>"
RATE_HZ = 16000
STEPS, STOP_AT = 4, 2


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """The golden parts, and six recordings of which two cannot be used."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        wave = rng.normal(scale=0.1, size=4000 + 800 * i).astype(np.float32)
        if i == 4:
            wave[100] = np.nan
        soundfile.write(folder / f"{i}.wav", wave, RATE_HZ, subtype="FLOAT")
        duration = len(wave) / RATE_HZ
        rows.append({"audio_filepath": f"{i}.wav", "duration": duration, "text": f"say {i}"})
    (folder / "5.wav").write_bytes(b"no audio")
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = json.loads((DATA / "salm" / "llama_adapter.json").read_text())["cfg_in"]
    source = {
        "type": "lhotse_as_conversation",
        "manifest_filepath": str(manifest),
        "audio_locator_tag": TAG,
        "tags": {"context": "Repeat:"},
    }
    return {
        "model": {
            **model,
            "pretrained_llm": str(DATA / "llm" / "llama"),
            "pretrained_asr": str(DATA / "salm" / "asr.nemo"),
        },
        "data": {
            "train_ds": {
                "sample_rate": RATE_HZ,
                "prompt_format": "llama2",
                "token_equivalent_duration": 0.08,
                "input_cfg": [source],
                "shuffle": True,
                "seed": 1,
                "batch_size": 2,
                "use_bucketing": True,
                "num_buckets": 1,
            }
        },
    }


def _fit(cfg, folder, max_steps):
    model = slm.models.SALM(cfg["model"])
    datamodule = slm.data.DataModule(
        cfg["data"],
        tokenizer=model.tokenizer,
        dataset=slm.data.SALMDataset(tokenizer=model.tokenizer),
    )
    trainer = slm.Trainer(
        max_steps=max_steps,
        log_every_n_steps=1,
        precision="32-true",
        devices=1,
        accelerator="cpu",
        strategy=slm.ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
    )
    slm.exp_manager(
        trainer,
        {
            "explicit_log_dir": str(folder),
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "checkpoint_callback_params": {"save_top_k": -1, "every_n_train_steps": STOP_AT},
        },
    )
    trainer.fit(model, datamodule, validation_metrics={})  # generation is tested elsewhere
    return model, datamodule


def _rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "learning_rate", "grad_norm")
    return [{k: row[k] for k in keys} for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def whole_run(cfg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model, datamodule = _fit(cfg, folder, STEPS)
    return folder, model, datamodule


def test_a_stopped_run_resumes_bit_for_bit(cfg, whole_run, tmp_path):
    folder, model, _ = whole_run
    copy = as_after(folder, tmp_path / "run", STOP_AT)
    assert [row["step"] for row in _rows(copy)] == list(range(1, STOP_AT + 1))
    resumed, _ = _fit(cfg, copy, STEPS)
    assert _rows(copy) == _rows(folder)
    assert len(_rows(folder)) == STEPS
    for path, value in model.variables.items():
        np.testing.assert_array_equal(
            np.asarray(value), np.asarray(resumed.variables[path]), err_msg=path
        )


def test_bad_audio_is_counted_and_stops_nothing(whole_run):
    folder, _, datamodule = whole_run
    assert sum(datamodule.dropped.values()) >= 2
    log = (folder / "train.log").read_text()
    assert "4.wav" in log or "4" in log


def test_a_run_directory_generates_as_the_model_that_was_trained(whole_run, tmp_path):
    folder, trained, _ = whole_run
    audio = np.random.default_rng(1).normal(scale=0.1, size=(1, 5000)).astype(np.float32)
    prompts = [[{"role": "user", "content": f"Repeat: {trained.audio_locator_tag}"}]]
    asked = dict(prompts=prompts, audios=audio, audio_lens=np.array([5000]), max_new_tokens=6)
    expected = trained.generate(**asked)
    loaded = slm.models.SALM.from_pretrained(folder).eval()
    np.testing.assert_array_equal(loaded.generate(**asked), expected)
    assert isinstance(loaded.tokenizer.ids_to_text(expected[0]), str)
    loaded.save_pretrained(tmp_path / "saved")
    saved = slm.models.SALM.from_pretrained(tmp_path / "saved")
    for path, value in trained.variables.items():
        np.testing.assert_array_equal(np.asarray(value), saved.variables[path], err_msg=path)
    np.testing.assert_array_equal(saved.generate(**asked), expected)


def test_the_public_perception_gives_frames_and_lengths(whole_run):
    _, model, _ = whole_run
    signal = np.zeros((2, 8000), np.float32)
    signal[0] += 0.1
    frames, lengths = model.perception(
        input_signal=signal, input_signal_length=np.array([8000, 4000])
    )
    assert frames.shape == (2, model.frame_count(8000), 48)
    assert list(lengths) == [model.frame_count(8000), model.frame_count(4000)]


def test_modules_are_known_by_nemos_names():
    assert slm.modules.AudioPerceptionModule.__name__ == "AudioPerception"
    assert slm.modules.TransformerARSpeechDecoder.__name__ == "SpeechDecoder"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = slm.nothing
