"""Augmentation that changes lengths, of an index: as of a list, and nothing held in memory."""

import json
from itertools import islice

import numpy as np
import pytest

from speechlm2_jax.data.augmentation.effects import changed_length, changed_lengths
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.index.contents import IndexedContents
from tests.data_pipeline.small_corpus import assert_same
from tests.data_pipeline.test_index import (
    assert_same_rows,
    contents_of,
    dialogs,
    entry,
    indexed,
    module_of,
)

__all__ = ["dialogs", "indexed"]  # fixtures
LENGTHS = [
    {"perturb_speed": True},
    {"truncate_duration": 0.7, "truncate_offset_type": "end"},
    {"pad_min_duration": 0.9, "pad_direction": "left"},
    {"perturb_speed": True, "truncate_duration": 0.7, "pad_min_duration": 0.5},
]


@pytest.mark.parametrize("keys", LENGTHS, ids=lambda keys: "+".join(keys))
@pytest.mark.parametrize("kind", ["manifest", "dialogs"])
def test_changed_rows_of_an_index_are_those_of_a_list(
    keys, kind, corpus, dialogs, tokenizer, request
):
    manifest = corpus / "manifest.jsonl" if kind == "manifest" else dialogs
    config = DataLoaderConfig(batch_size=3, token_equivalent_duration=0.08, **keys)
    whole = module_of(tokenizer, [entry(manifest)], **keys)
    request.getfixturevalue("indexed")
    module = module_of(tokenizer, [entry(manifest)], **keys)
    assert_same_rows(module, whole, config)


def test_an_augmented_index_gives_each_example_once_and_resumes(corpus, tokenizer, indexed):
    keys = {"perturb_speed": True, "perturb_volume": True, "batch_size": 4}
    module = module_of(tokenizer, [entry(corpus / "manifest.jsonl")], **keys)
    assert isinstance(contents_of(module), IndexedContents)
    stream = module.train_batches()
    batches, states = [], []
    for batch in islice(stream, 23):
        batches.append(batch)
        states.append(json.loads(json.dumps(stream.get_state())))
    names = [i for batch in batches for i in batch.ids][:90]
    expected = {f"clip{n:02d}{s}" for n in range(30) for s in ("", "_sp0.9", "_sp1.1")}
    assert len(names) == len(set(names)) == 90 and set(names) == expected
    again = module_of(tokenizer, [entry(corpus / "manifest.jsonl")], **keys)
    assert_same(next(again.train_batches(states[10])), batches[11])


def test_windows_of_a_large_data_set_are_read_into_memory(corpus, tokenizer, indexed, caplog):
    keys = {"cut_into_windows_duration": 0.5}
    module = module_of(tokenizer, [entry(corpus / "manifest.jsonl")], **keys)
    assert not isinstance(contents_of(module), IndexedContents)
    assert "because cut_into_windows_duration changes how many examples" in caplog.text


def test_many_lengths_are_those_of_one():
    for factor in (0.9, 1.0, 1.1):
        samples = np.arange(1, 50_000, 71)
        many = changed_lengths(samples, np.full(len(samples), factor))
        assert many.tolist() == [changed_length(n, factor) for n in samples.tolist()]
