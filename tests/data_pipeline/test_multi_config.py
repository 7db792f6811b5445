"""Training sets of their own settings, fused: in turn, drawn, or side by side in one batch."""

import copy
import logging
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.fusion import FusionConfig, joined_shape, training_sets
from speechlm2_jax.settings import SettingsError, ignored_report
from tests.data_pipeline import duplex_corpus
from tests.data_pipeline.small_corpus import frames, read_rows, write_manifest

SHARED = {"prompt_format": "qwen", "token_equivalent_duration": 0.08}


@pytest.fixture
def make(corpus, tokenizer):
    """A data module of two sets: 12 conversations in batches of 3, 10 in batches of 2."""
    rows = read_rows(corpus / "manifest.jsonl")
    for name, own in (("a", rows[:12]), ("b", rows[12:22])):
        write_manifest(corpus / f"{name}.jsonl", own)

    def one(fusion="round_robin", groups=1, own_groups=None, b=(), **keys):
        blocks = {
            name: {**SHARED, "batch_size": size, "manifest_filepath": str(corpus / f"{name}.jsonl")}
            for name, size in (("a", 3), ("b", 2))
        }
        blocks["b"] |= dict(b)
        top = {"multi_config": True, "sampler_fusion": fusion, "seed": 5, "shuffle": False, **keys}
        module = DataModule({"train_ds": {**top, **blocks}}, tokenizer, SALMDataset(tokenizer))
        module.setup(frame_count=frames, groups=groups, own_groups=own_groups)
        return module

    return one


def ids(module, count):
    return [batch.ids for batch in islice(module.train_batches(), count)]


def numbers(batches):
    return [[int(name[4:]) for name in batch] for batch in batches]


def test_sets_take_turns_until_the_last_is_through(make):
    found = numbers(ids(make(), 11))
    ours = [[3 * n + i for i in range(3)] for n in range(4)]
    others = [[12 + 2 * n, 13 + 2 * n] for n in range(5)]
    first = [batch for pair in zip(ours, others[:4], strict=True) for batch in pair]
    assert found[:9] == [*first, others[4]]
    assert found[9:] == [ours[0], others[0]]  # the next pass of both
    assert make().batches_per_pass() == 9


def test_turns_are_drawn_by_weight_the_same_in_every_run(make):
    weights = {"a": 1.0, "b": 3.0}
    module = make("randomized_round_robin", sampler_weights=weights, shuffle=True)
    found = ids(module, 180)
    assert found == ids(make("randomized_round_robin", sampler_weights=weights, shuffle=True), 180)
    passes = [found[n : n + 9] for n in range(0, 180, 9)]
    for one in passes:
        assert len({name for batch in one for name in batch}) == 22
    second = Counter(int(one[1][0][4:]) >= 12 for one in passes)
    assert 0.5 < second[True] / len(passes) < 1.0


def test_a_stream_of_fused_sets_resumes_with_the_next_batch(make):
    for fusion in ("round_robin", "randomized_round_robin", "zip"):
        module = make(fusion, shuffle=True, num_workers=2)
        expected = ids(module, 21)
        stream = module.train_batches()
        for count in (1, 6, 4):
            for _ in range(count):
                next(stream)
            state = copy.deepcopy(stream.get_state())
            done = {1: 1, 6: 7, 4: 11}[count]
            resumed = make(fusion, shuffle=True).train_batches(state)
            assert [b.ids for b in islice(resumed, 10)] == expected[done : done + 10]


def test_joined_batches_hold_one_batch_of_each_set(make):
    module = make("zip", groups=2)
    assert module.batches_per_pass() == 2
    batches = list(islice(module.train_batches(), 3))
    assert numbers([batches[0].ids]) == [[0, 1, 2, 12, 13, 3, 4, 5, 14, 15]]
    assert batches[2].ids == batches[0].ids
    shapes = module.training_shapes()
    for batch in batches:
        assert batch.bucket in shapes
        empty = shapes[batch.bucket]()
        assert batch.arrays.tokens.shape == empty.arrays.tokens.shape
        assert batch.arrays.tokens.shape[:2] == (2, 5)
    alone = {
        i: one for batch in islice(make(groups=2).train_batches(), 4) for i, one in rows(batch)
    }
    for name, tokens in rows(batches[0]):
        np.testing.assert_array_equal(tokens, alone[name])


def rows(batch):
    """Each conversation's tokens without padding, by its id."""
    tokens, segments = batch.arrays.tokens, batch.arrays.segments
    used = [tuple(p) for p in np.argwhere((segments > 0).any(axis=-1)).tolist()]
    return [(name, tokens[p][segments[p] > 0]) for name, p in zip(batch.ids, used, strict=True)]


def test_a_host_reads_its_own_groups_of_each_set(make):
    batch = next(make("zip", groups=2, own_groups=[1]).train_batches())
    assert numbers([batch.ids]) == [[3, 4, 5, 14, 15]] and batch.share == 0.5


def test_duplex_sets_are_joined_too(tmp_path):
    sources = []
    for name, count in (("a", 4), ("b", 3)):
        (tmp_path / name).mkdir()
        cuts = duplex_corpus.corpus(tmp_path / name, count)
        sources.append(duplex_corpus.write_cuts(tmp_path / f"{name}.jsonl.gz", cuts))
    blocks = {
        name: {**source, "batch_size": 2, "sample_rate": 22050}
        for name, source in zip("ab", sources, strict=True)
    }
    cfg = {**duplex_corpus.BLOCK, "train_ds": {"multi_config": True, "sampler_fusion": "zip"}}
    cfg["train_ds"] |= blocks
    from speechlm2_jax.data import DuplexS2SDataset

    dataset = DuplexS2SDataset.from_config(cfg, duplex_corpus.TOKENIZER)
    module = DataModule(cfg, duplex_corpus.TOKENIZER, dataset)
    module.setup(frame_count=duplex_corpus.frames)
    batch = next(module.train_batches())
    assert batch.arrays.source_audio.shape[:2] == (1, 4) and len(batch.ids) == 4
    assert batch.bucket in module.training_shapes()


def test_faults_of_all_sets_are_counted_together(make, corpus, caplog):
    caplog.set_level(logging.WARNING)
    row = {"audio_filepath": "gone.wav", "duration": 0.5, "text": "x", "sampling_rate": 16000}
    write_manifest(corpus / "b.jsonl", [*read_rows(corpus / "b.jsonl"), row])
    module = make(b={"manifest_filepath": str(corpus / "b.jsonl")})
    ids(module, 10)
    assert module.dropped == {"missing": 1}


def test_keys_of_all_sets_come_before_their_own():
    values = {"multi_config": True, "seed": 7, "shuffle": True, "a": {"seed": 1, "batch_size": 3}}
    blocks = training_sets({**values, "b": {"num_workers": 9}}, "data.train_ds")
    assert {name: where for name, (_, where) in blocks.sets.items()} == {
        "a": "data.train_ds.a",
        "b": "data.train_ds.b",
    }
    own = blocks.sets["a"][0]
    assert (own["seed"], own["shuffle"], own["batch_size"], own["num_workers"]) == (7, True, 3, 1)
    one = training_sets({"multi_config": False, "batch_size": 2}, "data.train_ds")
    assert one.fusion is None and list(one.sets) == ["train_ds"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "multi_config: give a block of settings for each set"),
        ({"a": {}, "batch_size": 4}, "data.train_ds.batch_size: with multi_config: true each set"),
        ({"a": {}, "sampler_fusion": "mix"}, "data.train_ds.sampler_fusion: expected one of"),
        (
            {"a": {}, "sampler_fusion": "randomized_round_robin", "sampler_weights": {"b": 1}},
            "data.train_ds.sampler_weights: give a positive weight to each of a, got {'b': 1.0}",
        ),
    ],
)
def test_wrong_keys_are_one_line(keys, message):
    with pytest.raises(SettingsError) as caught:
        training_sets({"multi_config": True, **keys}, "data.train_ds")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_without_draws_are_reported():
    with ignored_report() as report:
        training_sets({"multi_config": True, "a": {}, "sampler_weights": {"a": 1}}, "t")
    assert list(report) == ["t.sampler_weights"]


def test_a_state_of_other_sets_is_refused(make):
    state = make().train_batches().get_state()
    state["parts"]["c"] = state["parts"].pop("b")
    with pytest.raises(SettingsError, match="the data state has the sets"):
        make().train_batches(state)


def test_shapes_of_a_joined_batch_add_up():
    from speechlm2_jax.batches import BatchShape

    one = BatchShape(sequences=2, tokens=8, clips=3, samples=100)
    other = BatchShape(sequences=1, tokens=16, clips=1, samples=50)
    joined = joined_shape([one, other])
    assert joined == BatchShape(sequences=3, tokens=16, clips=4, samples=100)
    assert FusionConfig().sampler_fusion == "round_robin"
