"""Every type whose examples are lines of files reads the same from an index as from memory."""

import json
import logging
import shutil
from itertools import islice

import numpy as np
import pyarrow
import pytest
import soundfile
from pyarrow import ipc, parquet

from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.index import build, row_count
from speechlm2_jax.data.index.contents import IndexedContents
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import TAG, frames, wav_bytes, write_lines, write_tar

COMMON = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 2, "seed": 3}
ASKED = {"from": "human", "value": "Take: <sound>\nwhat is it?"}
TOLD = {"from": "gpt", "value": "a tone"}


def _txt(folder):
    (folder / "a.txt").write_bytes("one\n\n two words\n\u00a0\nthrée\r\nfour".encode())
    (folder / "b.txt").write_text("five\n")
    return {"type": "txt", "paths": [str(folder / "a.txt"), str(folder / "b.txt")]}


def _txt_jsonl(folder):
    rows = [{"words": "one", "id": 7, "topic": "x"}, {"id": "none"}, {"words": "three words here"}]
    path = write_lines(folder / "a.jsonl", *rows)
    return {"type": "txt_jsonl", "paths": path, "text_field": "words"}


def _sft(folder):
    turns = [{"from": "User", "value": "hi"}, {"from": "Assistant", "value": "hello"}]
    rows = [
        {"conversations": turns, "mask": "User"},
        {"conversations": [*turns, *turns], "id": "two"},
    ]
    return {"type": "nemo_sft_jsonl", "paths": write_lines(folder / "sft.jsonl", *rows)}


def _share_gpt(folder):
    rows = [
        {"id": "one", "sound": "a.wav", "conversations": [ASKED, TOLD], "topic": "x"},
        {"conversations": [{"from": "human", "value": " a "}, TOLD]},
        {"sound": "b.wav", "conversations": [ASKED, TOLD, {**ASKED, "duration": 0.25}, TOLD]},
    ]
    (folder / "audio").mkdir()
    for name, seconds in (("a", 1.0), ("b", 0.5)):
        soundfile.write(folder / "audio" / f"{name}.wav", np.full(int(seconds * 16000), 0.1), 16000)
    path = write_lines(folder / "m.jsonl", *rows)
    return {
        "type": "share_gpt",
        "manifest_filepath": path,
        "audio_root": str(folder / "audio"),
        "audio_locator_tag": TAG,
    }


def _share_gpt_tarred(folder):
    rows = [
        {"id": "one", "sound": "a.wav", "conversations": [ASKED, TOLD]},
        {"id": "two", "sound": "b.wav", "conversations": [ASKED, TOLD, ASKED, TOLD]},
    ]
    members = [("a.wav", wav_bytes(1.0)), ("b.wav", wav_bytes(0.5, 0.2)), ("b.wav", wav_bytes(0.3))]
    return {
        "type": "share_gpt",
        "manifest_filepath": write_lines(folder / "m.jsonl", *rows),
        "tarred_audio_filepaths": write_tar(folder / "a.tar", members),
        "audio_locator_tag": TAG,
    }


def _dialog(name, *recordings, **more):
    spoken = [{"from": "User", "type": "audio", "value": value} for value in recordings]
    turns = [*spoken, {"from": "Assistant", "type": "text", "value": f"words of {name}"}]
    return {"id": name, "conversations": turns, **more}


def _dialogs_tarred(folder):
    rows = [
        [_dialog("one", "b.wav", "a.wav"), _dialog("skipped", "a.wav", custom={"_skipme": True})],
        [_dialog("three", "a.wav", "a.wav"), _dialog("four"), _dialog("five", "b.wav")],
    ]
    for shard, own in enumerate(rows):
        write_lines(folder / f"manifest_{shard}.jsonl", *own)
        members = [("a.wav", wav_bytes(0.3 + 0.1 * n + 0.05 * shard)) for n in range(3)]
        write_tar(folder / f"audio_{shard}.tar", [*members, ("b.wav", wav_bytes(0.5, 0.3))])
    return {
        "type": "multimodal_conversation",
        "manifest_filepath": f"{folder}/manifest_{{0..1}}.jsonl",
        "tarred_audio_filepaths": f"{folder}/audio_{{0..1}}.tar",
        "audio_locator_tag": TAG,
    }


def _cuts(folder):
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    soundfile.write(folder / "a.wav", np.arange(32000) / 64000, 16000, subtype="FLOAT")
    recording = Recording.from_file(folder / "a.wav")
    cuts = []
    for n, who in enumerate([("User", "agent"), ("User", "Nobody"), ("user", "Agent", "user")]):
        segments = [
            SupervisionSegment(
                f"{n}-{k}", recording.id, 0.4 * k, 0.4, text=f"<|1|> say {k}", speaker=speaker
            )
            for k, speaker in enumerate([*who, "agent"])
        ]
        cuts.append(
            MonoCut(f"cut{n}", 0.25, 1.7, 0, recording=recording, supervisions=segments, custom={})
        )
    return CutSet.from_cuts(cuts)


def _s2s(folder):
    _cuts(folder).to_file(folder / "cuts.jsonl")
    return {
        "type": "s2s_as_conversation",
        "cuts_path": str(folder / "cuts.jsonl"),
        "audio_locator_tag": TAG,
    }


def _s2s_shar(folder):
    (folder / "shar").mkdir()
    _cuts(folder).to_shar(folder / "shar", {"recording": "wav"}, shard_size=2)
    return {
        "type": "s2s_as_conversation",
        "shar_path": str(folder / "shar"),
        "audio_locator_tag": TAG,
    }


def _sqa(folder):
    soundfile.write(folder / "a.wav", np.full(8000, 0.1), 16000)
    rows = [
        {"audio_filepath": "a.wav", "duration": 0.5, "question": f"how {n}?", "answer": f"so {n}"}
        for n in range(3)
    ]
    path = write_lines(folder / "m.jsonl", *rows)
    return {"type": "sqa_as_conversation", "manifest_filepath": path, "audio_locator_tag": TAG}


def _table(first):
    audio = [
        {"bytes": wav_bytes(0.25 + 0.1 * n, 0.1 * (first + n + 1)), "path": "x"} for n in range(3)
    ]
    texts = [f"text {first + n}" for n in range(3)]
    return pyarrow.table({"audio": audio, "text": texts, "topic": ["a", "b", None]})


def _parquet(folder):
    parquet.write_table(_table(0), folder / "a.parquet", row_group_size=2)
    seconds = _table(3).append_column("duration", [[0.25, 0.35, 0.45]])
    parquet.write_table(seconds, folder / "b.parquet", row_group_size=1)
    paths = [str(folder / "a.parquet"), str(folder / "b.parquet")]
    return {"type": "parquet", "manifest_filepath": paths, "audio_locator_tag": TAG}


def _arrow(folder):
    tables = _table(0), _table(3)
    (folder / "set").mkdir()
    for number, table in enumerate(tables):
        path = folder / "set" / f"data-0000{number}-of-00002.arrow"
        with ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    return {
        "type": "parquet",
        "manifest_filepath": str(folder / "set"),
        "audio_locator_tag": TAG,
    }


def _txt_pair(folder):
    """Two pairs of files with other line ends, and questions before each pair."""
    (folder / "ask.txt").write_text("What is it?\nAnd now?\nPlease.\n")
    texts = {
        "s0": "one\n\ntwo three\r\nf\u00fcnf\nsix\n" * 2,
        "t0": "eins\r\nzwei\rdrei vier\n\nsechs\n" * 2,
        "s1": "seven\neight",
        "t1": "sieben\nacht\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return {
        "type": "txt_pair",
        "source_paths": f"{folder}/s{{0..1}}.txt",
        "target_paths": f"{folder}/t{{0..1}}.txt",
        "questions_path": str(folder / "ask.txt"),
    }


def _webdataset(folder):
    (folder / "tars").mkdir()
    for shard in range(2):
        members = [("./text.json", json.dumps({"conversations": [TOLD]}).encode())]
        for n in range(3):
            row = {"conversations": [ASKED, TOLD, ASKED, TOLD][: 2 + 2 * (n == 1)], "topic": n}
            both = [(f"{n}.json", json.dumps(row).encode())]
            both.insert(n % 2, (f"{n}.wav", wav_bytes(0.3 + 0.1 * n + 0.05 * shard)))
            members += both
        long = "x" * 150  # whose name takes a header of its own
        members += [(f"{long}.json", json.dumps(row).encode()), (f"{long}.wav", wav_bytes(0.7))]
        write_tar(folder / "tars" / f"{shard}.tar", members)
    return {
        "type": "share_gpt_webdataset",
        "data_dir": str(folder / "tars"),
        "audio_locator_tag": TAG,
    }


KINDS = {
    "txt_pair": _txt_pair,
    "webdataset": _webdataset,
    "parquet": _parquet,
    "arrow": _arrow,
    "txt": _txt,
    "txt_jsonl": _txt_jsonl,
    "sft": _sft,
    "share_gpt": _share_gpt,
    "share_gpt_tarred": _share_gpt_tarred,
    "dialogs_tarred": _dialogs_tarred,
    "s2s": _s2s,
    "s2s_shar": _s2s_shar,
    "sqa": _sqa,
}


def module_of(tokenizer, entry, **settings):
    train = {**COMMON, "input_cfg": [entry], **settings}
    module = DataModule({"train_ds": train}, tokenizer, SALMDataset(tokenizer))
    module.setup(frame_count=frames)
    return module


@pytest.fixture
def make_large(monkeypatch, tmp_path):
    monkeypatch.setattr("speechlm2_jax.data.prepare.IN_ORDER_ROWS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: monkeypatch.setattr(row_count, "LARGE_ROWS", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_lengths_and_batches_are_those_of_data_in_memory(
    kind, tokenizer, make_large, tmp_path
):
    entry = KINDS[kind](tmp_path)
    whole = module_of(tokenizer, entry, shard_seed=1)
    make_large()
    module = module_of(tokenizer, entry, shard_seed=1)
    has, expected = (one.prepared().contents for one in (module, whole))
    assert isinstance(has, IndexedContents) and len(has) == len(expected.conversations) >= 2
    for index, other in enumerate(expected.conversations):
        made = has[index]
        own_id = made.id if " at byte " not in made.id else other.id
        assert (own_id, made.turns, made.fields) == (other.id, other.turns, other.fields)
        np.testing.assert_array_equal(made.prompt.input_ids, other.prompt.input_ids)
    assert module.plan().buckets == whole.plan().buckets and module.dropped == whole.dropped
    pairs = zip(module.train_batches(), islice(whole.train_batches(), 7), strict=False)
    for mine, theirs in pairs:
        assert mine.ids == theirs.ids
        np.testing.assert_array_equal(mine.arrays.tokens, theirs.arrays.tokens)
        np.testing.assert_array_equal(mine.arrays.audio, theirs.arrays.audio)


def test_lines_that_lack_something_are_told_and_other_settings_index_again(
    tokenizer, make_large, tmp_path, caplog
):
    make_large()
    entry = _txt_jsonl(tmp_path)
    module_of(tokenizer, entry)
    assert "a.jsonl: 1 lines, blank or without a text, are left out" in caplog.text
    with pytest.raises(SettingsError, match="no line has a text under 'gone'; set text_field"):
        module_of(tokenizer, {**entry, "text_field": "gone"})
    (tmp_path / "s2s").mkdir()
    entry = _s2s(tmp_path / "s2s")
    assert len(module_of(tokenizer, entry).prepared().contents) == 2
    assert "cuts.jsonl: 1 lines, blank or without known speakers, are left out" in caplog.text
    others = {**entry, "output_roles": ["agent", "Agent", "Nobody"]}
    assert len(module_of(tokenizer, others).prepared().contents) == 3


def test_a_table_that_changes_is_indexed_again(tokenizer, make_large, tmp_path):
    make_large()
    entry = _parquet(tmp_path)
    contents = module_of(tokenizer, entry).prepared().contents
    assert [contents[n].id for n in (0, 2, 5)] == ["a_0", "a_2", "b_2"]
    assert list(tmp_path.glob("a.parquet.index/rows")) and not list(tmp_path.glob("b*.index"))
    parquet.write_table(_table(7), tmp_path / "b.parquet")
    again = module_of(tokenizer, entry).prepared().contents
    assert again.identity != contents.identity and again[5].response == "text 9"
    np.testing.assert_allclose(again[3].clips[0].load(16000), 0.8, atol=1e-4)
    with pytest.raises(AudioError, match="changed since it was indexed"):
        contents[4]


def test_a_table_without_rows_stands_beside_an_index(tokenizer, make_large, tmp_path):
    make_large()
    table = _table(0)
    parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    empty = {"type": "parquet", "manifest_filepath": str(tmp_path / "empty.parquet")}
    group = {"type": "group", "input_cfg": [{**empty, "audio_locator_tag": TAG}, _txt(tmp_path)]}
    contents = module_of(tokenizer, group).prepared().contents
    assert isinstance(contents, IndexedContents) and len(contents) == 5


def test_pairs_are_read_in_chunks_and_faults_are_told(tokenizer, make_large, tmp_path, monkeypatch):
    entry = _txt_pair(tmp_path)
    whole = module_of(tokenizer, entry, shard_seed=4).prepared().contents
    make_large()
    monkeypatch.setattr(build, "CHUNK_BYTES", (9, 9))
    has = module_of(tokenizer, entry, shard_seed=4).prepared().contents
    assert [has[n].turns for n in range(len(has))] == [c.turns for c in whole.conversations]
    per_row = [c for c in has.parts[0].columns.values() if len(c) == 10 and any(c.strides)]
    assert sum(column.itemsize for column in per_row) <= 32
    (tmp_path / "t1.txt").write_text("sieben\nacht\nneun")
    with pytest.raises(SettingsError, match="s1.txt: has fewer lines than .*t1.txt; each line"):
        module_of(tokenizer, entry, shard_seed=4)
    (tmp_path / "t1.txt").write_text("sieben")
    with pytest.raises(SettingsError, match="t1.txt: has fewer lines than .*s1.txt; each line"):
        module_of(tokenizer, entry, shard_seed=4)
    (tmp_path / "t1.txt").write_bytes(b"sieben\n\xff")
    with pytest.raises(SettingsError, match="s1.txt line 2: "):
        module_of(tokenizer, entry, shard_seed=4)
    (tmp_path / "t1.txt").write_text("sieben\nneun")
    again = module_of(tokenizer, entry, shard_seed=4).prepared().contents
    assert again[11].response == "neun"
    (tmp_path / "ask.txt").write_text("Other?\n")
    again = module_of(tokenizer, entry, shard_seed=4).prepared().contents
    assert again[11].turns[0].text == "Other?"


def test_an_example_of_a_tar_that_changes_is_noticed(tokenizer, make_large, tmp_path):
    make_large()
    entry = _webdataset(tmp_path)
    contents = module_of(tokenizer, entry).prepared().contents
    assert [contents[n].id for n in (0, 1, 4)] == ["text", "0", "x" * 150]
    first = [("./text.json", json.dumps({"conversations": [TOLD, ASKED]}).encode())]
    write_tar(tmp_path / "tars" / "1.tar", [*first, ("text.wav", wav_bytes(0.9))])
    with pytest.raises(AudioError, match="changed since it was indexed"):
        contents[7]
    again = module_of(tokenizer, entry).prepared().contents
    assert len(again) == 5 and again.identity != contents.identity


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("kind", ["parquet", "txt_pair", "webdataset"])
def test_processes_of_their_own_build_the_same_index(
    kind, tokenizer, make_large, tmp_path, monkeypatch
):
    make_large()
    entry = KINDS[kind](tmp_path)
    (part, *_) = module_of(tokenizer, entry, shard_seed=1).prepared().contents.parts
    alone = {name: column.copy() for name, column in part.columns.items()}
    monkeypatch.setattr(build, "CHUNK_BYTES", (20, 20))
    monkeypatch.setattr(build, "ALONE_BYTES", 0)
    for folder in tmp_path.rglob("*.index"):
        shutil.rmtree(folder)
    (part, *_) = module_of(tokenizer, entry, shard_seed=1).prepared().contents.parts
    for name, column in part.columns.items():
        np.testing.assert_array_equal(column, alone[name], err_msg=name)


def test_a_text_in_windows_is_read_into_memory(tokenizer, make_large, tmp_path):
    make_large()
    keys = {"cut_text_into_windows_tokens": 3, "use_multimodal_sampling": True}
    contents = module_of(tokenizer, _txt(tmp_path), **keys).prepared().contents
    assert not isinstance(contents, IndexedContents) and len(contents.conversations) > 5


def test_many_rows_in_memory_are_told(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(row_count, "TOLD_ROWS", 3)
    with caplog.at_level(logging.WARNING):
        module_of(tokenizer, _txt(tmp_path))
    assert "a.txt has no index: each process holds its 5 rows in memory, about 0.0 GB" in (
        caplog.text
    )
