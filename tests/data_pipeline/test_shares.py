"""Weights are shares of the examples that are trained on, whatever else is left out."""

from collections import Counter

import pytest

from speechlm2_jax.data import DataModule
from tests.data_pipeline.small_corpus import TAG, frames, wav_bytes, write_lines, write_tar

COMMON = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "seed": 3, "shuffle": True}
BINS = {
    "use_multimodal_sampling": True,
    "use_bucketing": True,
    "bucket_duration_bins": [60],
    "bucket_batch_size": [5],
}


def texts(path, short, long):
    """Texts of a few words, and others that fit no bin."""
    rows = ["yes"] * short + ["yes and no " * 60] * long
    write_lines(path, *({"text": text} for text in rows))
    return {"type": "txt_jsonl", "paths": str(path), "weight": 1}


@pytest.mark.parametrize(("kind", "fitting"), [("bins", {**BINS}), ("packed", None)])
def test_shares_of_a_list_are_those_of_the_rows_that_fit(tokenizer, tmp_path, kind, fitting):
    batch = fitting or {"packed": True, "packed_tokens": 60, "batch_size": 5}
    half = [texts(tmp_path / "a.jsonl", 60, 240), texts(tmp_path / "b.jsonl", 60, 0)]
    module = DataModule({"train_ds": {**COMMON, **batch, "input_cfg": half}}, tokenizer)
    module.setup(frame_count=frames)
    assert module.dropped == {"longer_than_buckets": 240}
    drawn = Counter()
    for epoch in range(3):
        for planned in module.prepared().sampler.epoch(epoch):
            drawn.update(index < 60 for group in planned.groups for index in group)
    assert sum(drawn.values()) == 360 and drawn[True] == drawn[False], kind


def test_shares_of_a_stream_are_those_of_the_rows_that_are_kept(tokenizer, tmp_path):
    entries = []
    for name, seconds in (("a", [0.1, 0.5, 0.5, 0.5] * 4), ("b", [0.1] * 8)):
        members = [(f"{name}{n}.wav", wav_bytes(s)) for n, s in enumerate(seconds)]
        write_tar(tmp_path / f"{name}.tar", members)
        rows = [
            {"audio_filepath": member, "duration": s, "text": "yes"}
            for (member, _), s in zip(members, seconds, strict=True)
        ]
        write_lines(tmp_path / f"{name}.jsonl", *rows)
        entries.append(
            {
                "type": "nemo_tarred",
                "manifest_filepath": str(tmp_path / f"{name}.jsonl"),
                "tarred_audio_filepaths": str(tmp_path / f"{name}.tar"),
                "audio_locator_tag": TAG,
                "weight": 1,
            }
        )
    settings = {**COMMON, "batch_size": 8, "max_duration": 0.3, "stream": True}
    more = {"shuffle_buffer_size": 16, "input_cfg": entries}
    module = DataModule({"train_ds": {**settings, **more}}, tokenizer)
    module.setup(frame_count=frames)
    stream, drawn = module.train_batches(), Counter()
    for step in range(30):
        drawn.update(one[0] for one in next(stream).ids)
        if step == 11:
            state = stream.get_state()
        if step == 12:
            following = next(stream).ids, next(stream).ids
    stream.close()
    assert abs(drawn["a"] / drawn.total() - 0.5) < 0.1
    again = module.train_batches(state)
    next(again)
    assert (next(again).ids, next(again).ids) == following
    again.close()
