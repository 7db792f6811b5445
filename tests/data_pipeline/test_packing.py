"""`packed: true`: several conversations in a row, with nothing lost, changed or out of bounds."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlm2_jax.data.bucketing import Measures
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.packing import LOOKAHEAD, PackedSampler, plan_packed
from speechlm2_jax.layers.block_attention import saves
from speechlm2_jax.networks.flops import segment_lengths
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import assert_same, read_rows, write_manifest

settings.register_profile("packing", deadline=None, max_examples=40)


def measures_of(rows) -> Measures:
    """Conversations of (text tokens, clips, frames per clip)."""
    text, clips, frames = (np.asarray(column, np.int64) for column in zip(*rows, strict=True))
    frames = np.where(clips > 0, frames, 0)
    length = text + clips * frames
    return Measures(length=length, positions=length - 1, clips=clips, samples=frames * 1280)


def sampler_of(measures, config, **more) -> PackedSampler:
    return PackedSampler(
        plan=plan_packed(measures, config, 8),
        measures=measures,
        sizes=(len(measures),),
        by_bucket=more.get("shuffle", False),
        **more,
    )


corpora = st.lists(
    st.tuples(st.integers(2, 60), st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=120
)
configs = st.fixed_dictionaries(
    {
        "packed": st.just(True),
        "batch_size": st.integers(1, 4),
        "use_bucketing": st.booleans(),
        "num_buckets": st.integers(1, 4),
        "max_tokens": st.one_of(st.none(), st.integers(180, 400)),
    }
)


@settings(settings.get_profile("packing"))
@given(corpora, configs, st.integers(1, 3), st.booleans(), st.integers(0, 2))
def test_every_conversation_comes_once_and_rows_and_clips_hold_all(
    rows, values, groups, shuffle, epoch
):
    measures = measures_of(rows)
    sampler = sampler_of(measures, DataLoaderConfig(**values), groups=groups, shuffle=shuffle)
    batches = sampler.epoch(epoch)
    seen = Counter(i for batch in batches for group in batch.groups for i in group)
    assert seen == Counter(range(len(measures)))
    for batch in batches:
        shape = sampler.plan.buckets[batch.bucket].shape
        assert len(batch.groups) == len(batch.rows) == groups
        for group, own in zip(batch.groups, batch.rows, strict=True):
            taken = np.zeros(shape.sequences, np.int64)
            np.add.at(taken, list(own), measures.positions[list(group)])
            assert len(group) == len(own) and taken.max() <= shape.tokens
            assert measures.clips[list(group)].sum() <= shape.clips
            assert measures.samples[list(group)].max(initial=0) <= shape.samples
    assert batches == sampler.epoch(epoch)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("clips", [0, 1])
def test_padding_of_packed_rows_is_at_most_two_percent(shuffle, clips):
    length = np.random.default_rng(0).integers(40, 201, 12_000)
    frames = length - 20 if clips else length * 0
    measures = measures_of(
        list(zip(length - clips * frames, length * 0 + clips, frames, strict=True))
    )
    config = DataLoaderConfig(
        packed=True, packed_tokens=2048, batch_tokens=8192, use_multimodal_sampling=True
    )
    sampler = sampler_of(measures, config, groups=2, shuffle=shuffle)
    (bucket,) = sampler.plan.buckets
    assert (bucket.shape.sequences, bucket.shape.tokens) == (4, 2048)
    batches = sampler.epoch(0)[:-1]  # the last is what is left
    real = [sum(measures.positions[i] for g in b.groups for i in g) for b in batches]
    assert 1 - np.mean(real) / (2 * 4 * 2048) <= 0.02
    assert sampler.with_fill().plan.filled[0] >= 0.97
    if not shuffle:
        places = [i for b in batches for g in b.groups for i in g]
        per_batch = max(sum(map(len, b.groups)) for b in batches)
        assert max(abs(i - n) for n, i in enumerate(places)) <= per_batch + LOOKAHEAD


def test_what_is_longer_than_a_row_is_left_out_and_max_tokens_is_the_row():
    measures = measures_of([(n, 0, 0) for n in (10, 50, 100, 130)])
    config = DataLoaderConfig(packed=True, packed_tokens=104, batch_size=1)
    plan = plan_packed(measures, config, 8)
    assert plan.bucket_of.tolist() == [0, 0, 0, -1]
    (bucket,) = plan_packed(measures, DataLoaderConfig(packed=True, batch_size=3), 8).buckets
    assert (bucket.shape.sequences, bucket.shape.tokens) == (3, 136)
    config = DataLoaderConfig(packed=True, max_tokens=500, batch_size=1)
    (bucket,) = plan_packed(measures, config, 8).buckets
    assert bucket.shape.tokens == 504


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"packed_tokens": 100}, "goes with packed: true"),
        ({"packed": True, "packed_tokens": 0}, "must be positive"),
        ({"packed": True, "concatenate_samples": True}, "packed: concatenate_samples"),
        (
            {"packed": True, "bucket_duration_bins": (5,), "bucket_batch_size": (2,)},
            "packed: bucket_batch_size",
        ),
        ({"packed": True, "packed_tokens": 100, "batch_tokens": 50}, "more than batch_tokens"),
    ],
)
def test_keys_that_do_not_fit_together_are_one_line(values, message):
    with pytest.raises(ValueError, match=message):
        DataLoaderConfig(batch_size=2, use_multimodal_sampling=True, **values)


def test_lengths_of_segments_are_those_of_conversations():
    segments = np.asarray([[[1, 1, 2, 2, 2, 0], [0] * 6], [[1] * 6, [1, 2, 3, 0, 0, 0]]])
    assert segment_lengths(segments).tolist() == [2, 3, 6, 1, 1, 1]


KEYS = {"packed": True, "packed_tokens": 160, "batch_size": 2}


def test_a_packed_stream_resumes_exactly(corpus, make_module):
    def make():
        keys = {**KEYS, "use_bucketing": True, "num_buckets": 2}
        return make_module(corpus / "manifest.jsonl", groups=2, **keys)

    stream = make().train_batches()
    batches, states = [], []
    for batch in islice(stream, 9):
        batches.append(batch)
        states.append(json.loads(json.dumps(stream.get_state())))
    assert states[-1]["epoch"] >= 1
    assert max(batch.arrays.segments.max() for batch in batches) >= 2
    for at in (0, 4):
        resumed = make().train_batches(states[at])
        for batch in batches[at + 1 : at + 3]:
            assert_same(next(resumed), batch)


def test_a_broken_recording_leaves_its_row_within_bounds(corpus, make_module, tmp_path):
    rows = read_rows(corpus / "manifest.jsonl")
    rows = [{**row, "audio_filepath": str(corpus / row["audio_filepath"])} for row in rows]
    for number in (3, 11, 20):
        rows[number]["audio_filepath"] = str(tmp_path / "missing.wav")
        rows[number]["sampling_rate"] = 16000
    module = make_module(write_manifest(tmp_path / "broken.jsonl", rows), **KEYS)
    count = module.batches_per_pass()
    batches = list(islice(module.train_batches(), count))
    assert module.dropped == {"missing": 3}
    assert 27 <= sum(len(batch.ids) for batch in batches) <= 30


def test_validation_is_not_packed(corpus, make_module, tokenizer):
    from speechlm2_jax.data import DataModule

    entry = {"manifest_filepath": str(corpus / "manifest.jsonl")}
    common = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "input_cfg": [entry]}
    with pytest.raises(SettingsError, match="data.validation_ds.packed: each conversation"):
        DataModule({"validation_ds": {**common, **KEYS}}, tokenizer)


def test_a_shape_knows_the_longest_conversation_that_its_rows_may_hold():
    measures = measures_of([(30, 0, 1), (50, 1, 80), (100, 1, 200), (20, 0, 1)])
    config = DataLoaderConfig(
        packed=True, packed_tokens=1024, batch_size=2, use_bucketing=True, num_buckets=2
    )
    plan = plan_packed(measures, config, 8)
    assert [bucket.shape.longest for bucket in plan.buckets] == [64, 320]
    assert plan.buckets[1].shape.name.endswith("_longest320")
    whole = plan_packed(measures, replace(config, packed_tokens=304), 8)
    assert whole.buckets[1].shape.longest is None, "a row is no longer than a conversation"


@pytest.mark.slow  # compiles a model twice
def test_a_packed_batch_has_the_loss_and_gradients_of_the_unpacked_one(corpus, tmp_path):
    from speechlm2_jax.data import DataModule, SALMDataset
    from speechlm2_jax.models import SALM
    from tests.parity.salm_golden import DATA

    model = SALM.from_pretrained(DATA / "qwen3_lora_hf")
    rows = read_rows(corpus / "manifest.jsonl")[:7]
    rows = [{**row, "audio_filepath": str(corpus / row["audio_filepath"])} for row in rows]
    entry = {"manifest_filepath": str(write_manifest(tmp_path / "m.jsonl", rows))}
    entry["audio_locator_tag"] = model.audio_locator_tag

    def batch_of(**keys):
        cfg = {"input_cfg": [entry], "prompt_format": "qwen", "token_equivalent_duration": 0.08}
        module = DataModule({"train_ds": cfg | keys}, model.tokenizer, SALMDataset(model.tokenizer))
        module.setup(frame_count=model.frame_count)
        return next(module.train_batches())

    names = [path for path, is_on in model.trainable.items() if np.any(is_on)]

    @jax.jit
    def step(trained, variables, batch):
        def objective(trained):
            return model.losses(variables | trained, batch, key=None, train=True).loss.total

        return jax.value_and_grad(objective)(trained)

    found = []
    for keys in ({"batch_size": 7}, {"packed": True, "packed_tokens": 1024, "batch_size": 1}):
        batch = batch_of(**keys)
        assert len(batch.ids) == 7
        trained = {path: model.variables[path] for path in names}
        found.append(
            (batch, step(trained, model.variables, jax.tree.map(jnp.asarray, batch.arrays)))
        )
    (apart, one), (packed, other) = found
    assert packed.arrays.segments.max() >= 3 and apart.arrays.segments.max() == 1
    assert saves(1024, packed.arrays.longest) and apart.arrays.longest is None
    assert model.count_tokens(packed)[0] == model.count_tokens(apart)[0]
    assert model.flops(packed) == model.flops(apart)
    np.testing.assert_allclose(other[0], one[0], rtol=1e-5)
    for path in names:
        scale = max(1.0, float(np.abs(one[1][path]).max()))
        np.testing.assert_allclose(
            other[1][path] / scale, one[1][path] / scale, atol=1e-5, err_msg=path
        )


def test_a_model_that_scores_whole_rows_refuses_packing(corpus, tokenizer):
    from speechlm2_jax.data import DataModule, SALMDataset

    entry = {"manifest_filepath": str(corpus / "manifest.jsonl")}
    with pytest.raises(SettingsError, match="data.train_ds.packed: this model scores whole rows"):
        DataModule(
            {"train_ds": {"input_cfg": [entry], **KEYS}},
            tokenizer,
            SALMDataset(tokenizer, packs=False),
        )


def test_zip_joins_packed_rows_with_rows_of_one_conversation(corpus, tokenizer):
    from speechlm2_jax.data import DataModule
    from tests.data_pipeline.small_corpus import frames

    entry = {"manifest_filepath": str(corpus / "manifest.jsonl")}
    common = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "input_cfg": [entry]}
    sets = {"one": {**common, **KEYS}, "two": {**common, "batch_size": 3}}
    cfg = {"train_ds": {"multi_config": True, "sampler_fusion": "zip", **sets}}
    module = DataModule(cfg, tokenizer)
    module.setup(frame_count=frames, groups=2)
    batch = next(module.train_batches())
    segments = batch.arrays.segments
    assert segments.shape[:2] == (2, 5)
    assert segments[:, :2].max() >= 2 and segments[:, 2:].max() == 1
    assert len(batch.ids) == len(segment_lengths(segments))
