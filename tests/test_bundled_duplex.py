"""The duplex configurations that run out of the box, their codec and their dialogs."""

import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax import experiment, settings
from speechlm2_jax.data.duplex.readers import read_duplex
from speechlm2_jax.evaluation.duplex.inputs import read_dialogues
from speechlm2_jax.models import AudioCodec

ROOT = Path(__file__).parents[1]
DIALOGS, CODEC = ROOT / "corpus" / "dialogs", ROOT / "configs" / "parts" / "tiny_codec.nemo"
TESTS = ("smooth_turn_taking", "pause_handling", "user_backchannel", "user_interruption")
SPLITS = ("train", "validation", *(f"test/{name}" for name in TESTS))
KINDS = ("s2s_duplex", "s2s_duplex_speech_decoder")
SHORT = (
    "trainer.devices=1",
    "+trainer.remat=none",
    "trainer.max_steps=2",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "model.lr_scheduler.warmup_steps=0",
    "data.train_ds.num_buckets=1",
    "data.train_ds.batch_duration=32",
    "data.validation_ds.batch_size=2",
    "exp_manager.create_checkpoint_callback=false",
    "exp_manager.create_tensorboard_logger=false",
)
FRAME_S, RATE_HZ = 0.08, 16_000
LEAST_SNR_DB = 6.0
"""Of the agent's voice after a round trip through the codes."""


@cache
def dialogs(split):
    return list(read_duplex(None, [DIALOGS / f"{split}.jsonl.gz"]))


def texts_of(split, *speaker):
    return {turn.text for d in dialogs(split) for turn in d.turns_of(frozenset(speaker))}


def voices_of(split):
    tracks = {
        Path(t.cut.recording.sources[0].source).stem
        for d in dialogs(split)
        for t in d.source.cut.tracks
        if hasattr(t.cut, "recording")
    }
    return {name.split("_", 1)[1] for name in tracks if "_" in name}


def agent_turns(dialog):
    return dialog.turns_of(frozenset(["agent"]))


def test_dialogs_are_many_and_of_many_wordings_and_voices():
    assert len(dialogs("train")) >= 400
    responses = texts_of("train", "agent")
    assert len(responses) >= 24 and len(texts_of("train", "user")) >= 6 * len(responses)
    assert all(2 <= len(text.split()) <= 6 for text in responses)
    assert len(voices_of("train")) >= 16
    assert {len(agent_turns(dialog)) for dialog in dialogs("train")} == {1, 2, 3}
    kinds = Counter(event.kind for dialog in dialogs("train") for event in dialog.events)
    assert set(kinds) == {"pause", "back_channel", "interruption"} and min(kinds.values()) > 100
    pauses = [e.end_s - e.start_s for d in dialogs("train") for e in d.events if e.kind == "pause"]
    assert min(pauses) < 0.4 and max(pauses) > 1.0


def test_wordings_and_voices_of_the_tests_are_in_no_training_dialog():
    tested = (ROOT / "corpus" / "test.jsonl").read_text().splitlines()
    taught, voices = texts_of("train", "user"), voices_of("train")
    assert not taught & {json.loads(line)["text"] for line in tested}
    for split in SPLITS[1:]:
        assert not texts_of(split, "user") & taught and not voices_of(split) & voices
        assert texts_of(split, "agent") <= texts_of("train", "agent")
    for split in SPLITS[2:]:
        assert not texts_of(split, "user") & texts_of("validation", "user")
        assert not voices_of(split) & voices_of("validation")


def test_the_agent_begins_at_a_frame_after_each_question_and_stops_when_interrupted():
    for split in SPLITS:
        for dialog in dialogs(split):
            asked = dialog.turns_of(frozenset(["user"]))
            interrupted = [e.start_s for e in dialog.events if e.kind == "interruption"]
            for question, response in zip(asked, agent_turns(dialog), strict=True):
                frame = response.start_s / FRAME_S
                assert frame == pytest.approx(round(frame))
                assert 4 * FRAME_S <= response.start_s - question.end_s + 1e-6 <= 5 * FRAME_S
                within = [s for s in interrupted if response.start_s < s < response.end_s]
                for start in within:
                    assert 0.5 < response.end_s - start < 0.62
            assert len(interrupted) == sum(
                any(r.start_s < q.start_s < r.end_s for r in agent_turns(dialog)) for q in asked
            )


def test_each_test_set_has_the_events_that_it_is_named_after():
    kinds = {
        name: {event.kind for dialog in dialogs(f"test/{name}") for event in dialog.events}
        for name in TESTS
    }
    assert list(kinds.values()) == [set(), {"pause"}, {"back_channel"}, {"interruption"}]
    assert all(len(dialogs(f"test/{name}")) >= 40 for name in TESTS)


def test_a_folder_of_manifests_is_a_test_set_each():
    found = read_dialogues([str(DIALOGS / "test")], None)
    assert Counter(dialogue.set_name for dialogue in found) == {
        name: len(dialogs(f"test/{name}")) for name in TESTS
    }


def test_both_voices_lie_alongside_and_equal_responses_are_the_same_samples():
    found: dict[str, list[np.ndarray]] = {}
    for dialog in dialogs("test/user_backchannel")[:8]:
        waves = {"user": dialog.source.load(RATE_HZ), "agent": dialog.target.load(RATE_HZ)}
        assert {len(wave) for wave in waves.values()} == {round(dialog.duration_s * RATE_HZ)}
        for turn in dialog.turns:
            start, end = round(turn.start_s * RATE_HZ), round(turn.end_s * RATE_HZ)
            spoken = waves[turn.speaker][start:end].copy()
            assert np.sqrt(np.mean(spoken**2)) > 0.01
            if turn.speaker == "agent":
                found.setdefault(turn.text, []).append(spoken)
                waves["agent"][start:end] = 0
        assert np.abs(waves["agent"]).max() < 0.01, "silent between turns"
        (event,) = dialog.events
        sound = waves["user"][round(event.start_s * RATE_HZ) : round(event.end_s * RATE_HZ)]
        assert np.sqrt(np.mean(sound**2)) > 0.005
    again = [d for d in dialogs("test/pause_handling") if agent_turns(d)[0].text in found]
    (turn,) = agent_turns(again[0])
    wave = again[0].target.load(RATE_HZ)
    start, end = round(turn.start_s * RATE_HZ), round(turn.end_s * RATE_HZ)
    assert np.array_equal(wave[start:end], found[turn.text][0])


def test_dialogs_are_small():
    files = [path for path in DIALOGS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2.5e6


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundled_configs_read_the_dialogs(kind):
    data = settings.load(ROOT / "configs" / f"{kind}.yaml")["data"]
    (entry,) = data["train_ds"]["input_cfg"]
    assert (ROOT / entry["cuts_path"]).samefile(DIALOGS / "train.jsonl.gz")


def test_the_codec_reconstructs_audio_and_silence_is_silent():
    codec = AudioCodec.from_pretrained(CODEC)
    wave, _ = soundfile.read(DIALOGS / "audio" / "agent.ogg", dtype="float32", frames=4 * RATE_HZ)
    wave = np.pad(wave, (10 * codec.samples_per_frame, 0))
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
