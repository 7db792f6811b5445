"""`concatenate_samples`: which conversations of a batch are joined, how, and within its shape."""

import json
from itertools import islice

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.augmentation.concatenation import Concatenation
from speechlm2_jax.data.augmentation.loudness import at_loudness, loudness_lufs
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import assert_same, frames, write_manifest

RATE_HZ = 16000
HOW = Concatenation(gap_s=0.1, duration_factor=1.0, loudness_lufs=None)


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_lhotse_joins_the_same_recordings(factor):
    from lhotse import CutSet
    from lhotse.dataset.cut_transforms.concatenate import CutConcatenate
    from lhotse.testing.dummies import dummy_cut, dummy_recording

    random = np.random.default_rng(0)
    for _ in range(20):
        lengths = (random.integers(4, 120, 9) * 800).tolist()
        cuts = [
            dummy_cut(n, duration=m / RATE_HZ, recording=dummy_recording(n, duration=m / RATE_HZ))
            for n, m in enumerate(lengths)
        ]
        theirs = CutConcatenate(gap=0.1, duration_factor=factor)(CutSet.from_cuts(cuts))
        ours = HOW.joins(lengths, RATE_HZ, int(max(lengths) * factor))
        expected = [
            [t.cut.id for t in cut.tracks if t.cut.id.startswith("dummy")]
            if hasattr(cut, "tracks")
            else [cut.id]
            for cut in theirs
        ]
        assert [[cuts[n].id for n in one] for one in ours] == expected


def test_a_joined_recording_has_silence_between():
    one, two = np.full(800, 0.5, np.float32), np.full(400, -0.5, np.float32)
    joined = HOW.sound([one, two], RATE_HZ)
    np.testing.assert_array_equal(joined, np.concatenate([one, np.zeros(1600), two]))


def test_loudness_is_that_of_bs_1770():
    for rate_hz in (16000, 48000):
        wave = np.sin(2 * np.pi * 997 * np.arange(3 * rate_hz) / rate_hz).astype(np.float32)
        assert loudness_lufs(wave, rate_hz) == pytest.approx(-3.01, abs=0.15)
        soft = at_loudness(np.concatenate([wave, np.zeros(2 * rate_hz)]), rate_hz, -25.0)
        assert loudness_lufs(soft, rate_hz) == pytest.approx(-25.0, abs=0.01)
        # silence is left out of the mean
        assert 20 * np.log10(soft.max()) == pytest.approx(-22.0, abs=0.4)
    silence = np.zeros(RATE_HZ, np.float32)
    np.testing.assert_array_equal(at_loudness(silence, RATE_HZ, -25.0), silence)
    low = np.sin(2 * np.pi * 30 * np.arange(48000) / 16000).astype(np.float32)
    assert loudness_lufs(low, 16000) < -8  # the ear's weighting


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Sixteen recordings of 0.2 to 2 s; every fourth has a context of its own."""
    folder, rows = tmp_path_factory.mktemp("joined"), []
    for n, seconds in enumerate(np.linspace(0.2, 2.0, 16)):
        samples = round(seconds * RATE_HZ)
        soundfile.write(folder / f"{n:02d}.wav", np.full(samples, (n + 1) / 40), RATE_HZ, "FLOAT")
        row = {"audio_filepath": f"{n:02d}.wav", "duration": samples / RATE_HZ, "text": f"t{n:02d}"}
        rows.append(row | ({"context": "other"} if n % 4 == 3 else {}))
    return write_manifest(folder / "m.jsonl", rows)


@pytest.fixture
def make(manifest, tokenizer):
    def one(which="train_ds", **keys):
        cfg = {"manifest_filepath": str(manifest), "prompt_format": "qwen", "shuffle": True}
        cfg |= {"token_equivalent_duration": 0.08, "batch_size": 8, "db_norm": None}
        module = DataModule({which: cfg | keys}, tokenizer, SALMDataset(tokenizer))
        module.setup(frame_count=frames)
        return module

    return one


def examples(batch):
    """By id: the values of the recording, and the text of the whole conversation."""
    arrays, found = batch.arrays, {}
    for row, name in enumerate(batch.ids):
        clip = arrays.audio_index[0, row].max() // frames(arrays.audio.shape[-1])
        length = arrays.audio_lengths[0, clip]
        found[name] = (arrays.audio[0, clip, :length], arrays.tokens[0, row], arrays, row)
    return found


def test_short_conversations_of_one_context_are_joined_and_each_comes_once(make, tokenizer):
    module = make(concatenate_samples=True, num_buckets=1, use_bucketing=True)
    batches = list(islice(module.train_batches(), 2))
    names = [n for batch in batches for name in batch.ids for n in name.split("+")]
    assert sorted(names) == [f"{n:02d}" for n in range(16)]
    assert any("+" in name for batch in batches for name in batch.ids)
    shape = module.plan().buckets[0].shape
    for batch in batches:
        for name, (wave, _, arrays, row) in examples(batch).items():
            parts = [int(n) for n in name.split("+")]
            assert len({n % 4 == 3 for n in parts}) == 1
            expected = []
            for n in parts:
                samples = round(np.linspace(0.2, 2.0, 16)[n] * RATE_HZ)
                expected += [np.zeros(1600), np.full(samples, (n + 1) / 40)]
            np.testing.assert_allclose(wave, np.concatenate(expected[1:]), atol=1e-6)
            assert len(wave) <= shape.samples
            learnt = arrays.targets[0, row][arrays.loss_mask[0, row]]
            text = tokenizer.ids_to_text(learnt.tolist())
            assert " ".join(f"t{n:02d}" for n in parts) in text


def test_joined_conversations_resume_and_change_last(make, manifest):
    keys = {"concatenate_samples": True, "perturb_volume": True, "volume_prob": 1.0}
    stream = make(**keys).train_batches()
    first, state = next(stream), json.loads(json.dumps(stream.get_state()))
    second = next(stream)
    assert_same(next(make(**keys, num_workers=2).train_batches(state)), second)
    for name, (wave, *_) in (examples(first) | examples(second)).items():
        parts = [int(n) for n in name.split("+")]
        starts = np.flatnonzero(np.diff(np.concatenate([[0], wave])) > 0)
        factors = {
            round(float(wave[s] / ((n + 1) / 40)), 4) for s, n in zip(starts, parts, strict=True)
        }
        assert len(factors) == 1 and factors != {1.0}  # one factor for all of it


def test_recordings_are_joined_at_one_loudness(make):
    for db in (-25.0, -30.0):
        module = make(concatenate_samples=True, db_norm=db)
        for name, (wave, *_) in examples(next(module.train_batches())).items():
            if "+" not in name:
                assert loudness_lufs(wave, RATE_HZ) == pytest.approx(db, abs=0.05)


def test_conversations_that_are_scored_stay_alone(make):
    with pytest.raises(SettingsError, match="validation_ds.concatenate_samples: each conversation"):
        make(which="validation_ds", concatenate_samples=True)
