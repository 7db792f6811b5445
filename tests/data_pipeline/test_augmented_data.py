"""Augmentation in a data module: lengths that are planned, exact resuming, training data alone."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data import DataModule
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.duplex_corpus import corpus as duplex_corpus
from tests.data_pipeline.duplex_corpus import module as duplex_module
from tests.data_pipeline.duplex_corpus import rows as duplex_rows
from tests.data_pipeline.duplex_corpus import write_cuts
from tests.data_pipeline.small_corpus import assert_same, frames, read_rows, write_manifest

RATE_HZ = 16000
ALL = {
    "perturb_speed": True,
    "perturb_volume": True,
    "noise_snr": [0, 15],
    "noise_mix_prob": 0.8,
    "lowpass_enabled": True,
    "clipping_enabled": True,
    "rir_enabled": True,
    "compression_enabled": True,
    "compression_codecs": ["vorbis", "gsm"],
    "truncate_duration": 1.2,
    "pad_min_duration": 0.4,
    "pad_direction": "random",
}


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Two recordings of noise, with their manifest."""
    folder = tmp_path_factory.mktemp("noise")
    rows = []
    for n, seconds in enumerate((0.5, 3.0)):
        wave = np.random.default_rng(n).normal(0, 0.05, round(seconds * RATE_HZ))
        soundfile.write(folder / f"n{n}.wav", wave, RATE_HZ)
        rows.append({"audio_filepath": f"n{n}.wav", "duration": seconds})
    return str(write_manifest(folder / "noise.jsonl", rows))


def audio_of(batch):
    """By the id of its conversation: the samples of a batch with one recording each."""
    arrays = batch.arrays
    waves = [
        wave[:length]
        for group, lengths in zip(arrays.audio, arrays.audio_lengths, strict=True)
        for wave, length in zip(group, lengths, strict=True)
        if length
    ]
    return dict(zip(batch.ids, waves, strict=True))


def epochs(module, count=1):
    """The audio of each epoch, by id."""
    found = []
    stream = module.train_batches()
    for batch in stream:
        epoch = stream.get_state()["epoch"]
        if epoch == count:
            return found
        if epoch == len(found):
            found.append({})
        found[-1] |= audio_of(batch)


@pytest.fixture(scope="module")
def plain(corpus, make_module):
    (audio,) = epochs(make_module(corpus / "manifest.jsonl"))
    return audio


@pytest.fixture
def few(corpus, tmp_path):
    """A manifest of 12 of the recordings."""
    rows = read_rows(corpus / "manifest.jsonl")[:12]
    found = [{**row, "audio_filepath": str(corpus / row["audio_filepath"])} for row in rows]
    return write_manifest(tmp_path / "few.jsonl", found)


def test_everything_at_once_resumes_exactly_and_differs_from_epoch_to_epoch(
    few, make_module, noise
):
    keys = {**ALL, "noise_path": noise, "batch_size": 6}
    stream = make_module(few, groups=2, **keys).train_batches()
    batches, states = [], [stream.get_state()]
    for batch in islice(stream, 5):  # 36 examples make 3 batches of an epoch
        batches.append(batch)
        states.append(json.loads(json.dumps(stream.get_state())))
    for at, threads in ((2, 2), (4, 1)):
        resumed = make_module(few, groups=2, num_workers=threads, **keys).train_batches(states[at])
        assert_same(next(resumed), batches[at])
        resumed.close()
    assert states[3]["epoch"] == 0 and states[4]["epoch"] == 1
    first = {k: v for b in batches[:3] for k, v in audio_of(b).items()}
    later = {k: v for b in batches[3:] for k, v in audio_of(b).items()}
    assert len(first) == 36 and set(later) < set(first)
    assert all(not np.array_equal(first[name], wave) for name, wave in later.items())


def test_hosts_that_read_some_groups_get_the_same_samples(corpus, make_module, noise, tokenizer):
    from speechlm2_jax.data import SALMDataset

    def batch_of(own):
        entry = {"manifest_filepath": str(corpus / "manifest.jsonl")}
        cfg = {"input_cfg": [entry], "prompt_format": "qwen", "token_equivalent_duration": 0.08}
        keys = {"batch_size": 4, "noise_path": noise, "noise_mix_prob": 1.0, "rir_enabled": True}
        module = DataModule({"train_ds": cfg | keys}, tokenizer, SALMDataset(tokenizer))
        module.setup(frame_count=frames, groups=2, own_groups=own)
        return next(module.train_batches()).arrays

    whole, half = batch_of(None), batch_of([1])
    np.testing.assert_array_equal(whole.audio[1], half.audio[1])
    assert not half.audio_lengths[0].any() and whole.audio_lengths[0].all()


def test_noise_reaches_its_share_of_the_recordings_at_its_level(corpus, make_module, noise, plain):
    module = make_module(
        corpus / "manifest.jsonl", noise_path=noise, noise_snr=10, noise_mix_prob=0.6
    )
    (noisy,) = epochs(module)
    levels = []
    for name, wave in noisy.items():
        added = wave - plain[name]
        if np.abs(added).max() > 0:
            powers = [np.mean(np.square(x, dtype=np.float64)) for x in (plain[name], added)]
            levels.append(10 * np.log10(powers[0] / powers[1]))
    assert 10 <= len(levels) <= 26
    assert np.median(levels) == pytest.approx(10.0, abs=0.1)


def test_speed_adds_each_conversation_slower_and_faster(corpus, make_module):
    rows = read_rows(corpus / "manifest.jsonl")
    module = make_module(corpus / "manifest.jsonl", perturb_speed=True)
    (audio,) = epochs(module)
    assert len(audio) == 3 * len(rows)
    for number, row in enumerate(rows):
        samples = round(row["duration"] * RATE_HZ)
        for speed, suffix in ((1.0, ""), (0.9, "_sp0.9"), (1.1, "_sp1.1")):
            wave = audio[f"clip{number:02d}{suffix}"]
            assert abs(len(wave) - samples / speed) <= 0.5


def test_without_shuffling_neighbours_have_different_speeds(corpus, make_module):
    module = make_module(corpus / "manifest.jsonl", perturb_speed=True, shuffle=False)
    ids = [i for b in islice(module.train_batches(), 23) for i in b.ids][:90]
    assert [i.partition("_")[2] for i in ids[:4]] == ["", "sp0.9", "sp1.1", ""]
    assert [i[:6] for i in ids[:30]] == [i[:6] for i in ids[30:60]]
    assert len(set(ids)) == 90


def test_truncation_keeps_a_random_stretch_of_its_length(corpus, make_module, plain):
    keys = {"truncate_duration": 0.5}
    two = epochs(make_module(corpus / "manifest.jsonl", **keys), 2)
    starts = Counter()
    for name, whole in plain.items():
        if len(whole) <= 8000:
            np.testing.assert_array_equal(two[0][name], whole)
            continue
        found = [start_of(part[name], whole) for part in two]
        assert [len(part[name]) for part in two] == [8000, 8000]
        starts[found[0] == found[1]] += 1
    assert starts[False] > 10 and starts[True] <= 1
    for kind, place in (("start", 0), ("end", -1)):
        module = make_module(corpus / "manifest.jsonl", truncate_offset_type=kind, **keys)
        (audio,) = epochs(module)
        for name, whole in plain.items():
            expected = whole[:8000] if place == 0 else whole[-8000:]
            np.testing.assert_array_equal(audio[name], expected)


def start_of(part, whole):
    (found,) = [
        n
        for n in np.flatnonzero(whole == part[0])
        if np.array_equal(whole[n : n + len(part)], part)
    ]
    return found


def test_a_text_that_a_stretch_does_not_hold_can_leave_its_conversation_out(corpus, make_module):
    rows = read_rows(corpus / "manifest.jsonl")
    module = make_module(
        corpus / "manifest.jsonl", truncate_duration=0.5, keep_excessive_supervisions=False
    )
    assert module.dropped == {"no_response": sum(row["duration"] > 0.5 for row in rows)}


def test_windows_are_lhotses(corpus, make_module, plain):
    from lhotse import Recording

    module = make_module(
        corpus / "manifest.jsonl", cut_into_windows_duration=0.6, cut_into_windows_hop=0.25
    )
    (audio,) = epochs(module)
    names = []
    for name in plain:
        cut = Recording.from_file(corpus / f"{name}.wav").to_cut()
        for number, window in enumerate(cut.cut_into_windows(0.6, 0.25)):
            names.append(f"{name}-{number}")
            ours, theirs = audio[names[-1]], window.load_audio()[0]
            assert abs(len(ours) - len(theirs)) <= 1
            n = min(len(ours), len(theirs))
            np.testing.assert_array_equal(ours[:n], theirs[:n])
    assert sorted(names) == sorted(audio)


@pytest.mark.parametrize("direction", ["right", "left", "both", "random"])
def test_short_recordings_are_padded_with_silence(corpus, make_module, plain, direction):
    keys = {"pad_min_duration": 1.0, "pad_direction": direction}
    first, second = epochs(make_module(corpus / "manifest.jsonl", **keys), 2)
    moved = 0
    for name, whole in plain.items():
        missing = 16000 - len(whole)
        if missing <= 0:
            np.testing.assert_array_equal(first[name], whole)
            continue
        start = int(np.argmax(first[name] != 0))
        expected = {"right": 0, "left": missing, "both": round(missing / 2)}.get(direction, start)
        assert start == expected and len(first[name]) == 16000
        np.testing.assert_array_equal(first[name][start : start + len(whole)], whole)
        assert not first[name][start + len(whole) :].any()
        moved += start != int(np.argmax(second[name] != 0))
    assert (moved > 3) == (direction == "random")


def test_planned_lengths_hold_all_that_is_made(corpus, make_module, noise):
    keys = {**ALL, "compression_enabled": False}
    module = make_module(corpus / "manifest.jsonl", noise_path=noise, **keys)
    planned = {bucket.name: bucket.shape for bucket in module.plan().buckets}
    for batch in islice(module.train_batches(), 8):
        assert 0 < batch.arrays.audio_lengths.max() <= planned[batch.bucket].samples


def test_validation_is_augmented_by_its_own_keys_alone(
    corpus, make_module, noise, plain, tokenizer
):
    module = make_module(corpus / "manifest.jsonl", noise_path=noise, validation=("v",), **ALL)
    for batch in module.validation_batches()["v"]:
        for name, wave in audio_of(batch).items():
            np.testing.assert_array_equal(wave, plain[name])
    entry = {"manifest_filepath": str(corpus / "manifest.jsonl")}
    common = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 4}
    keys = {"noise_path": noise, "noise_mix_prob": 1.0, "input_cfg": [entry]}
    own = DataModule({"validation_ds": {**common, **keys}}, tokenizer)
    own.setup(frame_count=frames)
    passes = [list(own.validation_batches()["default"]) for _ in range(2)]
    for one, other in zip(*passes, strict=True):
        assert_same(one, other)
        for name, wave in audio_of(one).items():
            assert not np.array_equal(wave, plain[name])


def test_a_conversation_of_several_recordings_is_changed_in_each(tmp_path, make_module):
    for n in range(2):
        soundfile.write(tmp_path / f"{n}.wav", np.full(8000, 0.1 * (n + 1)), RATE_HZ)
    turns = [
        {"from": "User", "type": "audio", "value": f"{n}.wav", "duration": 0.5} for n in range(2)
    ]
    turns.append({"from": "Assistant", "type": "text", "value": "yes"})
    manifest = write_manifest(tmp_path / "m.jsonl", [{"id": "c", "conversations": turns}])
    module = make_module(
        manifest, perturb_volume=True, volume_prob=1.0, perturb_speed=True, batch_size=1
    )
    arrays = [b.arrays for b in islice(module.train_batches(), 3)]
    factors = {
        round(float(wave[: length // 2].mean() / (0.1 * (n + 1))), 4)
        for a in arrays
        for n, (wave, length) in enumerate(zip(a.audio[0], a.audio_lengths[0], strict=True))
    }
    assert len(factors) == 6
    lengths = sorted(length for a in arrays for length in a.audio_lengths[0].tolist())
    assert lengths == [7273, 7273, 8000, 8000, 8889, 8889]


def test_keys_without_their_switch_are_told(corpus, make_module, caplog):
    make_module(corpus / "manifest.jsonl", noise_snr=[0, 5])
    assert "data.train_ds.noise_snr has no effect without noise_path" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"noise_path": "/nowhere.jsonl"}, "data.train_ds.noise_path.*no such file"),
        ({"noise_path": {"manifest_file": "x"}}, "data.train_ds.noise_path.manifest_file: unknown"),
        ({"rir_enabled": True, "rir_path": "/nowhere.jsonl"}, "rir_path: /nowhere.*no such file"),
        ({"lowpass_enabled": True, "sample_rate": 8000}, "above half of sample_rate"),
        ({"concatenate_gap_seconds": -1}, "concatenate_gap_seconds must not be negative"),
    ],
)
def test_what_cannot_be_augmented_is_one_line_with_its_place(corpus, make_module, keys, message):
    with pytest.raises(SettingsError, match=message):
        make_module(corpus / "manifest.jsonl", **keys)


def test_noise_may_be_cuts_shar_or_a_yaml(corpus, make_module, tmp_path, plain):
    from lhotse import CutSet, Recording

    wave = np.random.default_rng(5).normal(0, 0.1, 4 * RATE_HZ)
    soundfile.write(tmp_path / "n.wav", wave, RATE_HZ)
    cuts = CutSet.from_cuts([Recording.from_file(tmp_path / "n.wav").to_cut()])
    cuts.to_file(tmp_path / "cuts.jsonl")
    (tmp_path / "shar").mkdir()
    cuts.to_shar(tmp_path / "shar", {"recording": "wav"})
    (tmp_path / "noise.yaml").write_text(f"- cuts_path: {tmp_path / 'cuts.jsonl'}\n")
    results = []
    for path in ("cuts.jsonl", "shar", "noise.yaml"):
        module = make_module(
            corpus / "manifest.jsonl", noise_path=str(tmp_path / path), noise_mix_prob=1.0
        )
        results.append(audio_of(next(module.train_batches())))
    for name, wave in results[0].items():
        assert not np.array_equal(wave, plain[name])
        for other in results[1:]:
            np.testing.assert_allclose(other[name], wave, atol=1e-4)


@pytest.fixture(scope="module")
def dialogs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogs")
    return write_cuts(folder / "cuts.jsonl", duplex_corpus(folder, 6))


def duplex_audio(source, **keys):
    stream = duplex_module(source, batch_size=2, **keys).train_batches()
    found = {}
    for batch in stream:
        if stream.get_state()["epoch"]:
            return found
        found |= duplex_rows(batch)


def test_of_two_voices_the_users_alone_is_damaged(dialogs, noise):
    clean = duplex_audio(dialogs)
    keys = {"noise_path": noise, "noise_mix_prob": 1.0, "compression_enabled": True}
    keys["compression_codecs"] = ["vorbis"]
    noisy = duplex_audio(dialogs, compression_prob=1.0, **keys)
    both = duplex_audio(
        dialogs, compression_prob=1.0, compression_enable_for_custom_fields=True, **keys
    )
    for name, row in clean.items():
        assert not np.allclose(noisy[name]["source_audio"], row["source_audio"], atol=1e-2)
        for field in ("target_audio", "target_tokens", "source_tokens"):
            np.testing.assert_array_equal(noisy[name][field], row[field])
        assert not np.array_equal(both[name]["target_audio"], row["target_audio"])
        np.testing.assert_array_equal(both[name]["source_audio"], noisy[name]["source_audio"])


def test_speed_of_two_voices_is_refused_with_the_reason(dialogs):
    with pytest.raises(SettingsError, match="perturb_speed: the agent's voice"):
        duplex_module(dialogs, perturb_speed=True)
