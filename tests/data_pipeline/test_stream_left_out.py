"""What settings leave out of a stream is counted and told, and nothing waits for it for ever."""

import logging
import time

import pytest

from speechlm2_jax.data import DataModule
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import TAG, frames, wav_bytes, write_lines, write_tar

BINS = {
    "use_bucketing": True,
    "use_multimodal_sampling": True,
    "bucket_duration_bins": [30],
    "bucket_batch_size": [2],
}


def write_source(folder, name, seconds):
    """Two tars with recordings of these lengths."""
    (folder / name).mkdir()
    for shard in range(2):
        names = [f"{name}{shard}-{n}.wav" for n in range(len(seconds))]
        data = [(n, wav_bytes(s, 0.1)) for n, s in zip(names, seconds, strict=True)]
        write_tar(folder / name / f"audio_{shard}.tar", data)
        rows = [
            {"audio_filepath": n, "duration": s, "text": "x"}
            for n, s in zip(names, seconds, strict=True)
        ]
        write_lines(folder / name / f"manifest_{shard}.jsonl", *rows)
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{folder / name}/manifest_{{0..1}}.jsonl",
        "tarred_audio_filepaths": f"{folder / name}/audio_{{0..1}}.tar",
        "audio_locator_tag": TAG,
    }


@pytest.fixture
def module_of(tokenizer):
    def make(*entries, **settings):
        train = {
            **{"prompt_format": "qwen", "token_equivalent_duration": 0.08, "seed": 3},
            **{"shuffle": True, "shuffle_buffer_size": 4, "stream": True, "input_cfg": entries},
            **BINS,
            **settings,
        }
        module = DataModule({"train_ds": train}, tokenizer)
        module.setup(frame_count=frames, groups=1)
        return module

    return make


@pytest.mark.parametrize("settings", [{}, {"max_duration": 1.0}])
def test_a_weighted_source_that_fits_no_bucket_ends_the_run(module_of, tmp_path, settings):
    """It would read the shards again and again for an example that never comes."""
    short = write_source(tmp_path, "short", [0.2] * 6)
    long = write_source(tmp_path, "long", [5.0] * 3)
    module = module_of({**short, "weight": 0.5}, {**long, "weight": 0.5}, **settings)
    stream, begin = module.train_batches(), time.monotonic()
    cause = "max_duration" if settings else "longer_than_buckets"
    with pytest.raises(SettingsError, match=rf"long/.*no row can be used of 1\d that.*{cause}"):
        for _ in range(20):
            next(stream)
    assert time.monotonic() - begin < 30
    stream.close()


def test_rows_longer_than_all_buckets_are_counted_once_and_told(module_of, tmp_path, caplog):
    mixed = write_source(tmp_path, "mixed", [0.2, 5.0, 0.2, 0.2, 5.0])
    with caplog.at_level(logging.WARNING):
        stream = module_of(mixed).train_batches()
        for _ in range(12):  # 24 examples: four passes
            next(stream)
        state = stream.get_state()
        stream.close()
    assert state["dropped"] == {"longer_than_buckets": 4}
    told = [r.getMessage() for r in caplog.records if "left out by longer" in r.getMessage()]
    assert len(told) == 1 and "a row is left out by longer_than_buckets, as mixed" in told[0]


def test_a_weighted_list_without_a_row_that_fits_is_warned_of(module_of, tmp_path, caplog):
    short = write_source(tmp_path, "short", [0.2] * 6)
    long = write_source(tmp_path, "long", [5.0] * 3)
    with caplog.at_level(logging.WARNING):
        module_of({**short, "weight": 1}, {**long, "weight": 3}, stream=False)
    assert "no conversation of" in caplog.text and "share of 75.0 %" in caplog.text
