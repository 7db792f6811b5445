"""Streams of two voices: what SALM's streams promise, for cuts and SHAR measured in seconds."""

import itertools
import json
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.duplex.readers import duplex_conversation
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline import duplex_corpus as corpus


def assert_same(one, other):
    assert one.ids == other.ids and one.bucket == other.bucket
    for field in fields(one.arrays):
        left, right = getattr(one.arrays, field.name), getattr(other.arrays, field.name)
        np.testing.assert_array_equal(left, right, err_msg=field.name)


def assert_same_rows(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        for field, values in ours[name].items():
            np.testing.assert_array_equal(values, theirs[name][field], err_msg=f"{name} {field}")


def pass_of(module, batches=None):
    """The rows of one pass over the training data."""
    found = {}
    for batch in islice(module.train_batches(), batches or module.batches_per_pass()):
        found |= corpus.rows(batch)
    return found


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    return corpus.corpus(tmp_path_factory.mktemp("duplex"))


@pytest.fixture(scope="module")
def manifest(cuts, tmp_path_factory):
    return corpus.write_cuts(tmp_path_factory.mktemp("manifest") / "cuts.jsonl.gz", cuts)


@pytest.fixture(scope="module")
def shar(cuts, tmp_path_factory):
    return corpus.write_shar(tmp_path_factory.mktemp("packed") / "shar", cuts, shard_size=5)


@pytest.fixture(scope="module")
def uninterrupted(shar):
    stream = corpus.module(shar, groups=2).train_batches()
    batches, states = [], [stream.get_state()]
    for batch in islice(stream, 8):  # two epochs and a bit
        batches.append(batch)
        states.append(json.loads(json.dumps(stream.get_state())))
    return batches, states


def test_an_example_is_the_same_whatever_lies_beside_it(cuts, manifest):
    """Neighbours, buckets and groups change nothing of a row."""
    dataset, alone = corpus.module(manifest).dataset, {}
    for cut in cuts:
        made = dataset.example(duplex_conversation(cut), 22050)
        alone[cut.id] = {field: getattr(made, field) for field in corpus.PER_ROW}
    for settings in (
        {"batch_size": 13},
        {"batch_duration": 5, "use_bucketing": True, "num_buckets": 3, "groups": 2},
        {"batch_size": 2, "shuffle": True},
    ):
        assert_same_rows(pass_of(corpus.module(manifest, **settings)), alone)


def test_shar_gives_what_the_files_gave_that_it_was_made_from(manifest, shar):
    files, packed = pass_of(corpus.module(manifest)), pass_of(corpus.module(shar))
    assert len(packed) == 13
    for name, row in packed.items():
        for field, values in row.items():
            np.testing.assert_array_equal(values, files[name][field])


def test_a_shar_of_one_shard_without_a_number_is_read(cuts, tmp_path):
    one = corpus.write_shar(tmp_path / "one", cuts[:4], shard_size=None)
    assert sorted(pass_of(corpus.module(one))) == ["c00", "c01", "c02", "c03"]


def test_shapes_are_few_and_hold_whole_frames(manifest):
    module = corpus.module(
        manifest, batch_duration=6, use_bucketing=True, bucket_duration_bins=[0.9, 1.5], groups=2
    )
    buckets = module.plan().buckets
    assert [bucket.shape.sequences for bucket in buckets] == [int(6 // b.longest) for b in buckets]
    for bucket in buckets:
        shape = bucket.shape
        assert shape.tokens % 8 == 0
        assert shape.source_samples == 1280 * shape.tokens
        assert shape.target_samples == 1764 * shape.tokens
    planned = {bucket.name: bucket.shape for bucket in buckets}
    for batch in islice(module.train_batches(), 2 * module.batches_per_pass()):
        shape, arrays = planned[batch.bucket], batch.arrays
        assert arrays.target_tokens.shape == (2, shape.sequences, shape.tokens)
        assert arrays.source_audio.shape == (2, shape.sequences, shape.source_samples)
        assert arrays.target_audio.shape == (2, shape.sequences, shape.target_samples)
        assert (arrays.token_extent == arrays.token_lengths.max(axis=1)).all()
    shapes = module.training_shapes()
    assert list(shapes) == [bucket.name for bucket in buckets]
    assert not shapes[buckets[0].name]().arrays.source_lengths.any()


def test_training_fills_buckets_side_by_side_even_in_the_order_of_the_manifest(manifest):
    """NeMo's duplex configurations bucket without `shuffle`."""
    module = corpus.module(manifest, batch_size=2, use_bucketing=True, num_buckets=3)
    plan = module.plan()
    names = {bucket.name: i for i, bucket in enumerate(plan.buckets)}
    met = [names[b.bucket] for b in islice(module.train_batches(), module.batches_per_pass())]
    assert len(plan.buckets) == 3 and {0, 2} <= set(met)
    assert met != sorted(met)


def test_cuts_keep_their_order_without_shuffle_and_shards_do_not(manifest, shar):
    ordered = [i for b in islice(corpus.module(manifest).train_batches(), 5) for i in b.ids]
    assert ordered == sorted(ordered)
    packed = [i for b in islice(corpus.module(shar).train_batches(), 5) for i in b.ids]
    packed = packed[: len(ordered)]  # the last batch is filled by the next pass
    assert sorted(packed) == ordered != packed
    breaks = [i for i, j in itertools.pairwise(packed) if ordered.index(j) != ordered.index(i) + 1]
    assert len(breaks) < len(set(Path(shar["shar_path"]).glob("cuts.*")))
    batches = corpus.module(shar, validation=("one",)).validation_batches()["one"]
    assert [i for b in batches for i in b.ids] == ordered


def test_resuming_anywhere_gives_the_rest_of_the_run(shar, uninterrupted):
    batches, states = uninterrupted
    module = corpus.module(shar, groups=2, num_workers=3)
    for k in range(len(batches)):
        stream = module.train_batches(states[k])
        assert stream.get_state() == states[k]
        assert_same(next(stream), batches[k])
        stream.close()


def test_each_process_reads_its_own_groups(shar, uninterrupted):
    whole = uninterrupted[0][0]
    for own in ([0], [1]):
        part = next(corpus.module(shar, groups=2, own_groups=own).train_batches())
        assert part.share == 0.5 and part.bucket == whole.bucket and set(part.ids) < set(whole.ids)
        for field in fields(part.arrays):
            mine = getattr(part.arrays, field.name)
            np.testing.assert_array_equal(mine[own], getattr(whole.arrays, field.name)[own])
        assert not part.arrays.source_lengths[[1 - own[0]]].any()


def test_validation_goes_once_through_each_set_with_its_references(manifest):
    module = corpus.module(manifest, groups=2, validation=("one", "two"))
    sets = module.validation_batches()
    assert list(sets) == ["one", "two"]
    batches = list(sets["two"])
    references = [reference for batch in batches for reference in batch.references]
    assert [r.id for r in references] == [f"c{n:02d}" for n in range(13)]
    assert references[4].target_text == "ok c04" and references[4].source_text == "hi"
    held = corpus.rows(batches[0])[references[0].id]
    np.testing.assert_array_equal(references[0].source_audio, held["source_audio"])


@pytest.fixture
def damaged(tmp_path):
    """Six conversations, of which four cannot be used."""
    cuts = [corpus.cut(tmp_path, f"d{n}") for n in range(6)]
    (tmp_path / "d1_user.wav").unlink()
    (tmp_path / "d2_agent.wav").write_bytes(b"noise" * 99)
    wave, rate_hz = soundfile.read(tmp_path / "d3_agent.wav", dtype="float32")
    soundfile.write(tmp_path / "d3_agent.wav", wave[: rate_hz // 2], rate_hz)
    wave[9] = np.nan
    soundfile.write(tmp_path / "d4_agent.wav", wave, rate_hz, "FLOAT")
    return corpus.write_cuts(tmp_path / "cuts.jsonl", cuts)


def test_bad_audio_of_either_voice_leaves_masked_rows_and_is_counted(damaged, tmp_path):
    module = corpus.module(damaged, batch_size=6)
    batch = next(module.train_batches())
    assert batch.ids == ("d0", "d5")
    causes = {"missing": 1, "unreadable": 1, "truncated": 1, "not_finite": 1}
    assert module.dropped == causes
    lengths = batch.arrays.source_lengths[0]
    assert lengths.tolist() == [16000, 0, 0, 0, 0, 16000]
    assert not batch.arrays.target_audio[0, 1:5].any()
    good = [corpus.cut(tmp_path, name) for name in ("d0", "d5")]
    alone = pass_of(corpus.module(corpus.write_cuts(tmp_path / "good.jsonl", good)))
    assert_same_rows(corpus.rows(batch), alone)


def test_a_conversation_shorter_than_a_frame_is_left_out_and_counted(tmp_path):
    turns = [("agent", 0.0, 0.05, "a")]
    lengths = {"whole": 0.08, "short": 0.0799}
    cuts = [corpus.cut(tmp_path, name, seconds, turns) for name, seconds in lengths.items()]
    module = corpus.module(corpus.write_cuts(tmp_path / "cuts.jsonl", cuts))
    assert module.dropped == {"shorter_than_frame": 1}
    assert next(module.train_batches()).arrays.token_lengths.tolist() == [[1, 0, 0]]
    only = corpus.write_cuts(tmp_path / "only.jsonl", cuts[1:])
    with pytest.raises(SettingsError, match=r"is left; left out: \{'shorter_than_frame'"):
        corpus.module(only)


def test_durations_leave_out_by_cause(manifest):
    lengths = [c.duration_s for c in corpus.module(manifest)._prepared["train_ds"].conversations]
    module = corpus.module(manifest, min_duration=0.6, max_duration=2)
    assert module.dropped == {
        "min_duration": sum(s < 0.6 for s in lengths),
        "max_duration": sum(s > 2 for s in lengths),
    }


def test_the_agents_audio_may_be_of_another_rate_and_longer(tmp_path):
    one = corpus.cut(tmp_path, "one", 1.0, agent_hz=24000, agent_s=1.5)
    row = pass_of(corpus.module(corpus.write_cuts(tmp_path / "cuts.jsonl", [one])))["one"]
    expected = one.target_audio.resample(22050).load_audio(duration=1.0)[0]
    assert row["target_audio"].shape == (22050,)
    np.testing.assert_array_equal(row["target_audio"][:22000], expected[:22000])


def test_a_stretch_of_a_recording_takes_the_same_stretch_of_the_agent(tmp_path):
    one = corpus.cut(tmp_path, "one", 2.0, [("agent", 0.0, 0.5, "hi")])
    part = replace(one, start=0.5, duration=1.0)
    row = pass_of(corpus.module(corpus.write_cuts(tmp_path / "cuts.jsonl", [part])))["one"]
    np.testing.assert_array_equal(row["target_audio"], part.load_target_audio()[0])
    whole = replace(part, custom={**one.custom, "target_audio_unaligned": True})
    row = pass_of(corpus.module(corpus.write_cuts(tmp_path / "whole.jsonl", [whole])))["one"]
    np.testing.assert_array_equal(row["target_audio"], one.load_target_audio()[0, :22050])


@pytest.mark.parametrize("packed", [False, True])
def test_one_stereo_recording_can_hold_both_voices(packed, tmp_path):
    both = corpus.recording(tmp_path, "both", 1.0, 16000, channels=2)
    one = corpus.cut(tmp_path, "one")
    custom = {"target_audio": both, "target_audio_channel_selector": 1}
    one = replace(one, recording=both, custom=custom)
    write = corpus.write_shar if packed else corpus.write_cuts
    source = write(tmp_path / ("shar" if packed else "cuts.jsonl"), [one])
    module = corpus.module(
        source, block={**corpus.BLOCK, "target_sample_rate": 16000}, sample_rate=16000
    )
    row, wave = pass_of(module)["one"], both.load_audio()
    np.testing.assert_array_equal(row["source_audio"], wave[0])
    np.testing.assert_array_equal(row["target_audio"], wave[1])


def test_cuts_that_only_lhotse_can_load_are_left_to_it(tmp_path):
    one = corpus.cut(tmp_path, "one")
    faster = replace(one, recording=one.recording.resample(8000))
    row = pass_of(corpus.module(corpus.write_cuts(tmp_path / "c.jsonl", [faster])))["one"]
    expected = faster.resample(22050).resample(16000).load_audio()[0]
    assert np.abs(row["source_audio"] - expected).max() < 1e-5


def test_what_is_longer_than_the_model_input_is_left_out_and_counted(cuts, manifest):
    lasts = {
        name: len(row["target_tokens"]) for name, row in pass_of(corpus.module(manifest)).items()
    }
    most = sorted(lasts.values())[len(lasts) // 2]
    module = corpus.module(manifest, max_frames=most)
    assert set(pass_of(module)) == {name for name, frames in lasts.items() if frames <= most}
    assert module.dropped["longer_than_model"] == sum(n > most for n in lasts.values())
    longest = next(cut for cut in cuts if lasts[cut.id] == max(lasts.values()))
    with pytest.raises(AudioError, match=f"{longest.id}: .* has {most} learnt positions") as raised:
        module.dataset.example(duplex_conversation(longest), 22050)
    assert raised.value.cause == "longer_than_model"
