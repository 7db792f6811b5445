"""Without `shuffle` training reads in the order in which NeMo 3.0.0's own data loader does."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment

from speechlm2_jax.data import DataModule, SALMDataset, Tokenizer
from tests.data_pipeline.small_corpus import TAG, write_manifest

DATA = Path(__file__).parents[1] / "data"
NEMO = {  # seven cuts in shards of two, batches of three, by shard_seed
    ("shar", 0): "450 123 660 145 232 345 601 601",
    ("shar", 5): "012 364 564 523 016 230 145 014",
    ("turns", 0): "012 345 601 234 560 123 456 012",
    ("manifest", 0): "012 345 6",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    (folder / "shar").mkdir()
    cuts, rows, turns = [], [], []
    for n in range(7):
        path = folder / f"{n}.wav"
        soundfile.write(path, np.full(1600 * (n + 1), 0.1), 16000)
        cut = Recording.from_file(path).to_cut()
        cut.supervisions = [SupervisionSegment(cut.id, cut.recording.id, 0, 0.1, text="yes")]
        cuts.append(cut)
        rows.append({"audio_filepath": str(path), "duration": cut.duration, "text": "yes"})
        audio = {"from": "User", "type": "audio", "value": str(path)}
        response = {"from": "Assistant", "value": "yes"}
        turns.append({"id": f"{n}", "conversations": [audio, response]})
    CutSet(cuts).to_shar(folder / "shar", {"recording": "wav"}, shard_size=2)
    write_manifest(folder / "manifest.jsonl", rows)
    write_manifest(folder / "turns.jsonl", turns)
    return folder


@pytest.fixture(scope="module")
def make(corpus):
    tokenizer = Tokenizer(DATA / "llm" / "qwen3")
    tokenizer.add_special_tokens([TAG])
    shar = {"type": "lhotse_as_conversation", "shar_path": str(corpus / "shar")}
    files = {"manifest": "lhotse_as_conversation", "turns": "multimodal_conversation"}
    entries = {
        name: {"type": kind, "manifest_filepath": str(corpus / f"{name}.jsonl")}
        for name, kind in files.items()
    } | {"shar": shar}

    def module(*names, **keys):
        common = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 3}
        train = {**common, "input_cfg": [entries[name] for name in names], "seed": 1, **keys}
        made = DataModule({"train_ds": train}, tokenizer, SALMDataset(tokenizer))
        made.setup(frame_count=lambda samples: samples // 1280)
        return made

    return module


def batches(stream, count):
    return ["".join(batch.ids) for batch in islice(stream, count)]


@pytest.mark.parametrize(("name", "seed"), NEMO)
def test_batches_are_nemos(make, name, seed):
    expected = NEMO[name, seed].split()
    assert batches(make(name, shard_seed=seed).train_batches(), len(expected)) == expected


@pytest.mark.parametrize("names", [("shar",), ("turns",), ("shar", "turns"), ("manifest",)])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_run_that_is_resumed_goes_on_with_the_same_batches(make, names, steps):
    module = make(*names, shard_seed=5)
    whole = batches(module.train_batches(), 12)
    stream = module.train_batches()
    first = batches(stream, steps)
    again = make(*names, shard_seed=5).train_batches(stream.get_state())
    assert first + batches(again, 12 - steps) == whole


def test_a_set_smaller_than_a_batch_fills_it_as_nemo_does(make):
    assert batches(make("turns", batch_size=10).train_batches(), 2) == ["0123456012", "3456012345"]


def test_with_shuffle_each_cut_comes_once_in_an_epoch(make):
    stream = make("shar", shuffle=True).train_batches()
    found = batches(stream, 3)
    assert sorted("".join(found)) == list("0123456") and found != ["012", "345", "6"]


def test_sources_without_weights_are_interleaved_each_in_its_order(make):
    found = "".join(batches(make("shar", "turns", shard_seed=0).train_batches(), 4))
    assert found[:7] != "4501236" and found[:7] != "0123456"
