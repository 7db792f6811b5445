"""Batches of streams are full, also where the shuffle buffer is small and lengths are skewed."""

import numpy as np
import pytest

from speechlm2_jax.data import DataModule
from tests.data_pipeline.small_corpus import TAG, frames, wav_bytes, write_lines, write_tar


@pytest.mark.parametrize("seed", [1])
def test_batches_of_a_small_buffer_are_full(tokenizer, tmp_path, seed):
    random = np.random.default_rng(seed)
    for shard in range(4):
        seconds = random.lognormal(-1.6, 1.0, 50).clip(0.05, 2.0).round(2).tolist()
        names = [f"s{shard}m{n}.wav" for n in range(len(seconds))]
        pairs = list(zip(names, seconds, strict=True))
        write_tar(tmp_path / f"audio_{shard}.tar", [(name, wav_bytes(s)) for name, s in pairs])
        rows = [{"audio_filepath": name, "duration": s, "text": "yes"} for name, s in pairs]
        write_lines(tmp_path / f"manifest_{shard}.jsonl", *rows)
    entry = {
        "type": "nemo_tarred",
        "manifest_filepath": f"{tmp_path}/manifest_{{0..3}}.jsonl",
        "tarred_audio_filepaths": f"{tmp_path}/audio_{{0..3}}.tar",
        "audio_locator_tag": TAG,
    }
    budget = {"batch_tokens": 320, "max_tokens": 80, "use_multimodal_sampling": True}
    buckets = {"use_bucketing": True, "num_buckets": 5, "shuffle": True, "shuffle_buffer_size": 8}
    common = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "seed": seed}
    train = {**common, **budget, **buckets, "stream": True, "input_cfg": [entry]}
    module = DataModule({"train_ds": train}, tokenizer)
    module.setup(frame_count=frames)
    rows_of = {bucket.name: bucket.shape.sequences for bucket in module.plan().buckets}
    assert len(rows_of) > 2 and min(rows_of.values()) >= 4
    stream = module.train_batches()
    batches = [next(stream) for _ in range(60)]
    stream.close()
    assert [len(b.ids) for b in batches] == [rows_of[b.bucket] for b in batches]
