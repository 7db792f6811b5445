"""An index of shards gives the rows, samples and order that reading all of them gives."""

import gzip
import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.index import build, row_count, texts
from speechlm2_jax.data.index.contents import IndexedContents
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import TAG, frames, wav_bytes, write_lines, write_tar

SHAR = Path(__file__).parents[1] / "data" / "manifests" / "shar"
COMMON = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 2, "seed": 3}


def row(name, seconds, **more):
    return {"audio_filepath": name, "duration": seconds, "text": f"text of {name}", **more}


@pytest.fixture
def tarred(tmp_path):
    """Three shards, whose tars have another order than their manifests, and an empty one."""
    for shard in range(3):
        names = [f"{shard}{n}.wav" for n in range(4)]
        members = [
            (name, wav_bytes(0.5 + 0.1 * n, 0.1 * (shard + 1))) for n, name in enumerate(names)
        ]
        write_tar(tmp_path / f"audio_{shard}.tar", [*members, ("long.wav", wav_bytes(2.0))])
        rows = [row(name, 0.5 + 0.1 * n) for n, name in enumerate(names)]
        rows[1]["_skipme"] = shard == 1
        rows += [
            row("long-sub2.wav", 0.5, offset=1.2, sampling_rate=16000),
            row("long-sub1.wav", 0.5, offset=0.25),
        ]
        write_lines(tmp_path / f"manifest_{shard}.jsonl", *reversed(rows))
    write_tar(tmp_path / "audio_3.tar", [])
    write_lines(tmp_path / "manifest_3.jsonl")
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{tmp_path}/manifest_{{0..3}}.jsonl",
        "tarred_audio_filepaths": f"{tmp_path}/audio__OP_0..3_CL_.tar",
    }


def _one_manifest(tarred, tmp_path, suffix):
    """Three of the same tars with one manifest, whose rows are mixed."""
    rows = [
        {**json.loads(line), "shard_id": shard}
        for shard in (2, 0, 1)
        for line in (tmp_path / f"manifest_{shard}.jsonl").read_text().splitlines()
    ]
    lines = [json.dumps(row) + "\n" for row in rows[::2] + rows[1::2]]
    text = "\n".join(lines).encode()
    path = tmp_path / f"all.jsonl{suffix}"
    path.write_bytes(gzip.compress(text) if suffix else text)
    tars = f"{tmp_path}/audio__OP_0..2_CL_.tar"
    return {**tarred, "manifest_filepath": str(path), "tarred_audio_filepaths": tars}


@pytest.fixture
def one_manifest(tarred, tmp_path):
    return _one_manifest(tarred, tmp_path, "")


@pytest.fixture
def compressed(tarred, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SPACING_BYTES", 100)
    return _one_manifest(tarred, tmp_path, ".gz")


@pytest.fixture
def shar(tmp_path):
    """A copy of SHAR, beside which an index may lie."""
    folder = tmp_path / "shar"
    shutil.copytree(SHAR, folder)
    return {"type": "lhotse_shar", "shar_path": str(folder)}


def module_of(tokenizer, entry, **settings):
    train = {**COMMON, "input_cfg": [{**entry, "audio_locator_tag": TAG}], **settings}
    module = DataModule({"train_ds": train}, tokenizer, SALMDataset(tokenizer))
    module.setup(frame_count=frames)
    return module


def batches(module, count=40):
    return list(islice(module.train_batches(), count))


@pytest.fixture
def with_index(monkeypatch):
    monkeypatch.setattr("speechlm2_jax.data.prepare.IN_ORDER_ROWS", 5)
    return lambda: monkeypatch.setattr(row_count, "LARGE_ROWS", 1)


@pytest.mark.parametrize("kind", ["tarred", "shar", "one_manifest", "compressed"])
def test_rows_and_order_are_those_of_reading_all_shards(kind, request, tokenizer, with_index):
    entry = request.getfixturevalue(kind)
    whole = module_of(tokenizer, entry, shard_seed=5)
    with_index()
    module = module_of(tokenizer, entry, shard_seed=5)
    has, expected = (one._prepared["train_ds"].contents for one in (module, whole))
    assert isinstance(has, IndexedContents) and len(has) == len(expected.conversations) > 4
    for index, other in enumerate(expected.conversations):
        made = has[index]
        assert (made.id, made.turns, made.fields) == (other.id, other.turns, other.fields)
        np.testing.assert_array_equal(made.prompt.input_ids, other.prompt.input_ids)
    for one, other in zip(batches(module), batches(whole), strict=True):
        assert one.ids == other.ids and one.bucket == other.bucket
        np.testing.assert_array_equal(one.arrays.audio, other.arrays.audio)
    assert module.dropped == whole.dropped
    assert not {"several_s", "length"} & {n for n, c in has.parts[0].columns.items() if len(c)}


def test_what_is_left_out_leaves_shards_in_order(shar, tokenizer, with_index):
    settings = {"max_duration": 1.0, "shard_seed": 1}
    whole = module_of(tokenizer, shar, **settings)
    with_index()
    module = module_of(tokenizer, shar, **settings)
    assert module.dropped == whole.dropped and module.dropped["max_duration"]
    assert [b.ids for b in batches(module, 12)] == [b.ids for b in batches(whole, 12)]


def test_missing_members_are_named_or_left_out(tarred, tokenizer, with_index, tmp_path):
    with_index()
    with open(tmp_path / "manifest_0.jsonl", "a") as file:
        file.write('{"audio_filepath": "gone.wav", "duration": 1, "text": "x"}\n')
    with pytest.raises(SettingsError, match="manifest_0.jsonl line 7: 'gone.wav' is not in"):
        module_of(tokenizer, tarred)
    skipping = {**tarred, "skip_missing_manifest_entries": True}
    assert len(module_of(tokenizer, skipping)._prepared["train_ds"].conversations) == 17


def test_a_tar_that_changes_is_indexed_again_and_noticed(tarred, tokenizer, with_index, tmp_path):
    with_index()
    module = module_of(tokenizer, tarred)
    members = [(f"0{n}.wav", wav_bytes(0.5 + 0.1 * n, 0.9)) for n in (3, 2, 1, 0)]
    write_tar(tmp_path / "audio_0.tar", [("long.wav", wav_bytes(2.0)), *members])
    list(islice(module.train_batches(), 9))
    assert sum(module.dropped.values()) >= 1
    again = module_of(tokenizer, tarred)
    ids = [i for batch in batches(again, 9) for i in batch.ids]
    assert ids[:6] == ["long-sub1.wav", "long-sub2.wav", "03.wav", "02.wav", "01.wav", "00.wav"]
    assert not again.dropped


def test_shards_are_shared_out_to_chunks(tarred, tokenizer, with_index, monkeypatch):
    with_index()
    whole = module_of(tokenizer, tarred)._prepared["train_ds"].contents.parts[0]
    columns = {name: column.copy() for name, column in whole.columns.items()}
    monkeypatch.setattr(build, "CHUNK_BYTES", (150, 150))
    changed = {**tarred, "tags": {"task": "asr"}}
    shutil.rmtree(whole.folders[0])
    (part,) = module_of(tokenizer, changed)._prepared["train_ds"].contents.parts
    for name, column in part.columns.items():
        np.testing.assert_array_equal(column, columns[name], err_msg=name)
    assert part.shard_ends.tolist() == [6, 11, 17, 17]


def test_rows_of_one_manifest_need_a_shard_and_are_noticed_when_they_change(
    one_manifest, tokenizer, with_index, monkeypatch
):
    with_index()
    monkeypatch.setattr(build, "CHUNK_BYTES", (150, 150))
    path = Path(one_manifest["manifest_filepath"])
    assert len(module_of(tokenizer, one_manifest).prepared().contents) == 17
    text = path.read_text()
    path.write_text(text.replace('"shard_id": 2', '"shard_id": 7'))
    with pytest.raises(SettingsError, match="only in the tars: .2., only in the others: .7."):
        module_of(tokenizer, one_manifest)
    path.write_text(text.replace(', "shard_id": 0', "", 1))
    with pytest.raises(SettingsError, match=r"all.jsonl line \d+: one manifest of several tars"):
        module_of(tokenizer, one_manifest)
    path.write_text(text.replace("text of 00", "words of 00"))
    contents = module_of(tokenizer, one_manifest).prepared().contents
    assert contents[0].response in ("words of 00.wav", "text of long-sub1.wav")
    assert "words of 00.wav" in [contents[n].response for n in range(6)]


def test_newlines_in_tars_are_no_rows(tarred, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(row_count, "LARGE_ROWS", 40)
    noise = [(f"0{n}.wav", wav_bytes(0.5 + 0.1 * n, 0.1)) for n in range(4)]
    write_tar(tmp_path / "audio_0.tar", [*noise, ("long.wav", wav_bytes(2.0) + b"\n" * 99)])
    module_of(tokenizer, tarred)
    assert not list(tmp_path.glob("*.index"))


def test_a_window_of_a_sharded_order_is_that_of_the_whole_pass(shar, tokenizer, with_index):
    with_index()
    sampler = module_of(tokenizer, shar, shard_seed=2)._prepared["train_ds"].sampler
    order = sampler.order
    assert len(order.shards[0]) == 2
    whole = replace(order, window_rows=order.total).window(1, 0)
    parts = [order.window(1, number) for number in range(order.windows)]
    assert len(parts) > 1
    np.testing.assert_array_equal(np.concatenate(parts), whole)
