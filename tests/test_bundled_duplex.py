"""The duplex configurations that run out of the box, their codec and their dialogs."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax import experiment
from speechlm2_jax.models import AudioCodec

ROOT = Path(__file__).parents[1]
DIALOGS, CODEC = ROOT / "corpus" / "dialogs", ROOT / "configs" / "parts" / "tiny_codec.nemo"
KINDS = ("s2s_duplex", "s2s_duplex_speech_decoder")
SHORT = (
    "trainer.devices=1",
    "+trainer.remat=none",
    "trainer.max_steps=2",
    "trainer.limit_train_batches=2",
    "trainer.log_every_n_steps=1",
    "model.lr_scheduler.warmup_steps=0",
    "data.train_ds.batch_size=2",
    "exp_manager.create_checkpoint_callback=false",
    "exp_manager.create_tensorboard_logger=false",
)
LEAST_SNR_DB = 8.0
"""Of the agent's voice, in dialogs that the codec was not fitted to."""


def cuts(split):
    return [json.loads(line) for line in (DIALOGS / f"{split}.jsonl").read_text().splitlines()]


def agent(cut):
    source = cut["custom"]["target_audio"]["sources"][0]["source"]
    return soundfile.read(DIALOGS / source, dtype="float32")[0]


def texts_of(split, speaker):
    turns = [turn for cut in cuts(split) for turn in cut["supervisions"]]
    return {turn["text"] for turn in turns if turn["speaker"] == speaker}


def test_dialogs_have_new_user_sentences_of_known_words():
    tested = (ROOT / "corpus" / "test.jsonl").read_text().splitlines()
    trained = texts_of("train", "user") | texts_of("validation", "user")
    assert not texts_of("train", "user") & texts_of("validation", "user")
    assert not trained & {json.loads(line)["text"] for line in tested}
    assert texts_of("validation", "agent") <= texts_of("train", "agent")


def test_responses_begin_at_a_frame_after_the_users_turn():
    for cut in cuts("validation"):
        user, response = cut["supervisions"]
        assert response["start"] >= user["start"] + user["duration"]
        assert response["start"] / 0.08 == pytest.approx(round(response["start"] / 0.08))


def test_the_codec_reconstructs_audio_and_silence_is_silent():
    codec = AudioCodec.from_pretrained(CODEC)
    wave = agent(cuts("validation")[0])
    codes, counts = codec.encode(wave[None], [len(wave)])
    decoded = np.asarray(codec.decode(codes, counts).audio)[0, : len(wave)]
    error = np.square(wave - decoded).sum()
    assert 10 * np.log10(np.square(wave).sum() / error) > LEAST_SNR_DB
    assert np.abs(decoded[: 10 * codec.samples_per_frame]).max() < 1e-5


@pytest.mark.slow  # a minute of compilation each
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_of_a_bundled_config_run(kind, tmp_path):
    overrides = [*SHORT, f"exp_manager.explicit_log_dir={tmp_path / 'run'}"]
    experiment.build(ROOT / "configs" / f"{kind}.yaml", overrides).fit()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert any("val_asr_bleu" in row for row in rows), "its speech is transcribed"
