"""The library for full duplex: build, train, stop, resume, load, run, save."""

import json
from pathlib import Path

import numpy as np
import pytest

import speechlm2_jax as slm
from tests.data_pipeline import duplex_corpus as corpus
from tests.training.stopping import as_after

DUPLEX = Path(__file__).parent / "data" / "duplex"
STEPS, SAVED_AT = 3, 1
KEYS = {"text", "tokens_text", "tokens_audio", "tokens_len", "audio", "audio_len"}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """A speech decoder with dropout on the golden parts, and four conversations."""
    folder = tmp_path_factory.mktemp("conversations")
    cuts = [corpus.cut(folder, f"c{n}", 0.8) for n in range(4)]
    source = corpus.write_cuts(folder / "cuts.jsonl", cuts)
    run = DUPLEX / "duplex_s2s_speech_decoder" / "cfg_input.json"
    model = json.loads(run.read_text())
    parts = ("pretrained_llm", "pretrained_audio_codec", "pretrained_asr")
    return {
        "model": {
            **model,
            **{key: str(DUPLEX / model[key]) for key in parts},
            "scoring_asr": None,
            "speech_decoder": {**model["speech_decoder"], "p_dropout": 0.2},
        },
        "data": {
            **corpus.BLOCK,
            "train_ds": {
                **source,
                "sample_rate": 22050,
                "batch_size": 2,
                "shuffle": True,
                "seed": 1,
            },
        },
    }


def fit(cfg, folder):
    model = slm.models.DuplexS2SSpeechDecoderModel(cfg["model"])
    dataset = slm.data.DuplexS2SDataset.from_config(cfg["data"], model.tokenizer)
    datamodule = slm.data.DataModule(cfg["data"], tokenizer=model.tokenizer, dataset=dataset)
    trainer = slm.Trainer(
        max_steps=STEPS,
        log_every_n_steps=1,
        precision="32-true",
        devices=1,
        accelerator="cpu",
    )
    slm.exp_manager(
        trainer,
        {
            "explicit_log_dir": str(folder),
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "checkpoint_callback_params": {"save_top_k": -1, "every_n_train_steps": 1},
        },
    )
    trainer.fit(model, datamodule, validation_metrics={})  # generation is tested elsewhere
    return model


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "text_loss", "audio_loss", "learning_rate", "grad_norm")
    return [{key: line[key] for key in keys} for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole_run(cfg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, fit(cfg, folder)


@pytest.mark.slow  # two runs; a SALM's is among the fast ones
def test_a_duplex_run_goes_on_bit_for_bit_from_a_checkpoint(cfg, whole_run, tmp_path):
    folder, model = whole_run
    copy = as_after(folder, tmp_path / "run", SAVED_AT)
    assert [row["step"] for row in rows(copy)] == [1]
    resumed = fit(cfg, copy)
    assert rows(copy) == rows(folder)
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    for path, value in model.variables.items():
        np.testing.assert_array_equal(value, resumed.variables[path], err_msg=path)


def test_the_duplex_snippet_of_the_library(whole_run, tmp_path):
    folder, trained = whole_run
    audio = np.random.default_rng(1).normal(scale=0.1, size=(2, 6000)).astype(np.float32)
    lengths = np.array([6000, 4000])
    model = slm.models.DuplexS2SSpeechDecoderModel.from_pretrained(folder).eval()
    result = model.offline_inference(input_signal=audio, input_signal_lens=lengths)
    assert set(result) == KEYS
    frames = [model.frame_count(n) for n in lengths.tolist()]
    assert isinstance(result["text"][0], str) and result["tokens_len"].tolist() == frames
    samples = [n * model.target_frame_samples for n in frames]
    assert result["audio"].shape == (2, samples[0]) and result["audio_len"].tolist() == samples
    assert result["tokens_audio"].shape[:2] == result["tokens_text"].shape == (2, frames[0])
    model.save_pretrained(tmp_path / "saved")
    saved = slm.models.DuplexS2SSpeechDecoderModel.from_pretrained(tmp_path / "saved")
    again = saved.offline_inference(audio, lengths, decode_audio=False)
    for key in ("tokens_text", "tokens_audio"):
        np.testing.assert_array_equal(again[key], result[key])
    for path, value in trained.variables.items():
        np.testing.assert_array_equal(value, saved.variables[path], err_msg=path)
