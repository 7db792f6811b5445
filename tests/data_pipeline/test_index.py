"""An index gives what reading the whole manifest gives, is built once, and is checked."""

import gzip
import json
import os
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.bucketing import Measures
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.index import build, row_count, texts, windows, worker
from speechlm2_jax.data.index.contents import IndexedContents
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import TAG, frames, read_rows, write_manifest

COMMON = {
    "prompt_format": "qwen",
    "token_equivalent_duration": 0.08,
    "batch_size": 3,
    "seed": 3,
    "shuffle": True,
}


@pytest.fixture
def indexed(monkeypatch, tmp_path):
    """Makes every data set a large one, with small windows."""
    monkeypatch.setattr(row_count, "LARGE_ROWS", 1)
    monkeypatch.setattr("speechlm2_jax.data.prepare.WINDOW_ROWS", 7)
    monkeypatch.setattr("speechlm2_jax.data.prepare.IN_ORDER_ROWS", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def module_of(tokenizer, entries, **settings):
    train = {**COMMON, "input_cfg": entries, **settings}
    module = DataModule({"train_ds": train}, tokenizer, SALMDataset(tokenizer))
    module.setup(frame_count=frames)
    return module


def entry(manifest, **keys):
    return {"type": "nemo", "manifest_filepath": str(manifest), "audio_locator_tag": TAG, **keys}


def contents_of(module):
    return module._prepared["train_ds"].contents


@pytest.fixture
def mixed(corpus, tmp_path):
    """A manifest with all that a line may be: blank, to be skipped, with other line ends."""
    rows = read_rows(corpus / "manifest.jsonl")
    for n, row in enumerate(rows):
        row["audio_filepath"] = str(corpus / row["audio_filepath"])
        row["id"] = f"row{n}"
        if n % 3 == 0:
            row |= {"offset": 0.01, "duration": 0.05, "sampling_rate": 16000}
        if n % 7 == 0:
            row["context"] = f"words of context {n}"
    rows[4]["_skipme"] = True
    lines = [json.dumps(row) for row in rows]
    lines[9] = "\ufeff" + lines[9]
    ends = ["\r\n" if n % 4 == 1 else "\n\n" if n % 4 == 2 else "\n" for n in range(len(lines))]
    ends[-1] = ""
    path = tmp_path / "mixed.jsonl"
    path.write_bytes("".join(a + b for a, b in zip(lines, ends, strict=True)).encode())
    return path


@pytest.fixture
def compressed(mixed, monkeypatch):
    """The same manifest, compressed in two parts, with many points to start from."""
    monkeypatch.setattr(texts, "SPACING_BYTES", 100)
    text = mixed.read_bytes()
    half = len(text) // 2
    path = mixed.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(text[:half]) + gzip.compress(text[half:], 1) + b"\0" * 3)
    return path


@pytest.fixture
def dialogs(corpus, tmp_path):
    """Conversations with no, one and several recordings, some of which end in audio."""
    turns = {
        "text": {"from": "User", "type": "text", "value": "Compare these, please:"},
        "one": {"from": "User", "type": "audio", "value": "clip00.wav", "duration": 0.1},
        "two": {"from": "User", "type": "audio", "value": "clip01.wav"},
        "response": {"from": "Assistant", "type": "text", "value": "the second is longer"},
        "spoken": {"from": "Assistant", "type": "audio", "value": "clip02.wav"},
    }
    for turn in turns.values():
        if turn["type"] == "audio":
            turn["value"] = str(corpus / turn["value"])
    forms = [
        ("text", "response"),
        ("text", "one", "two", "response"),
        ("two", "spoken"),
        ("one", "two"),
        ("one", "two", "spoken"),
        ("two", "response", "one", "response"),
    ]
    path = tmp_path / "dialogs.jsonl"
    write_manifest(path, [{"conversations": [turns[name] for name in form]} for form in forms * 3])
    return path


def assert_same_rows(module, whole, config):
    """The same conversations, lengths and what is left out as without an index."""
    has, expected = contents_of(module), contents_of(whole)
    assert isinstance(has, IndexedContents) and len(has) == len(expected.conversations)
    for index, other in enumerate(expected.conversations):
        made = has[index]
        assert (made.id, made.where, made.turns) == (other.id, other.where, other.turns)
        assert made.fields == other.fields
        np.testing.assert_array_equal(made.prompt.input_ids, other.prompt.input_ids)
        np.testing.assert_array_equal(made.prompt.mask, other.prompt.mask)
    assert module.dropped == whole.dropped
    rows = has.row if has.row is not None else np.arange(len(has))
    lengths = measured(has, config)
    for name in ("length", "positions", "clips", "samples"):
        own = getattr(lengths, name)[rows]
        np.testing.assert_array_equal(own, getattr(expected.measures, name), err_msg=name)
    of_rows = [one.lengths for one in expected.conversations]
    inputs, totals = has.token_lengths()
    assert inputs.tolist() == [one.input_tokens for one in of_rows]
    assert totals.tolist() == [one.total_tokens for one in of_rows]


def measured(contents, config):
    from speechlm2_jax.data.index.frame_table import FrameTable
    from speechlm2_jax.data.index.salm_columns import SalmColumns

    columns = SalmColumns(config=config, frames=FrameTable(frames, 50_000), has_audio=True)
    found = [columns.measure(part, 0, len(part)).measures for part in contents.parts]
    names = ("length", "positions", "clips", "samples")
    return Measures(**{n: np.concatenate([getattr(m, n) for m in found]) for n in names})


@pytest.mark.parametrize("whole_length", [True, False])
@pytest.mark.parametrize("kind", ["mixed", "compressed", "dialogs"])
def test_rows_are_what_reading_the_whole_manifest_gives(
    kind, whole_length, request, tokenizer, monkeypatch, tmp_path
):
    path = request.getfixturevalue(kind)
    settings = {"measure_total_length": whole_length, "max_duration": 1.4, "max_tokens": 70}
    whole = module_of(tokenizer, [entry(path)], **settings)
    assert not list(path.parent.glob("*.index"))  # small data leaves no file behind
    request.getfixturevalue("indexed")
    module = module_of(tokenizer, [entry(path)], **settings)
    assert whole.dropped
    config = DataLoaderConfig(
        batch_size=1, token_equivalent_duration=0.08, measure_total_length=whole_length
    )
    assert_same_rows(module, whole, config)
    shapes = {b.shape for b in whole.plan().buckets}
    assert {b.shape for b in module.plan().buckets} == shapes


def test_cuts_and_group_tags_are_read_from_their_lines(corpus, tokenizer, indexed, monkeypatch):
    from lhotse import MonoCut, Recording, SupervisionSegment

    lines = []
    for n in range(6):
        recording = Recording.from_file(corpus / f"clip{n:02d}.wav")
        text = SupervisionSegment(f"s{n}", recording.id, 0, recording.duration, text=f"word {n}")
        cut = MonoCut(f"cut{n}", 0, recording.duration, 0, recording=recording, supervisions=[text])
        lines.append(cut.to_dict())
    path = corpus / "cuts.jsonl"
    write_manifest(path, lines)
    group = {"type": "group", "input_cfg": [entry(path)], "tags": {"task": "asr"}}
    group["input_cfg"][0]["type"] = "lhotse_as_conversation"
    module = module_of(tokenizer, [group])
    has = contents_of(module)
    assert [has[n].id for n in range(6)] == [f"cut{n}" for n in range(6)]
    assert {has[n].fields["task"] for n in range(6)} == {"asr"}
    assert [has[n].turns[-1].text for n in range(6)] == [f"word {n}" for n in range(6)]


def test_batches_hold_every_row_once_and_resume_on_any_number_of_hosts(mixed, tokenizer, indexed):
    def stream_of(groups, own=None, state=None):
        module = DataModule(
            {"train_ds": {**COMMON, "input_cfg": [entry(mixed)]}}, tokenizer, SALMDataset(tokenizer)
        )
        module.setup(frame_count=frames, groups=groups, own_groups=own)
        return module.train_batches(state)

    whole = stream_of(4)
    batches, states = [], []
    for batch in islice(whole, 12):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.get_state())))
    first = [i for b, s in zip(batches, states, strict=True) if s["epoch"] == 0 for i in b.ids]
    assert Counter(first) == {f"row{n}": 1 for n in range(30) if n != 4}
    assert len({s["window"] for s in states}) > 2
    for hosts in (1, 2, 4):
        own = [range(h * 4 // hosts, (h + 1) * 4 // hosts) for h in range(hosts)]
        streams = [stream_of(hosts, tuple(groups), states[2]) for groups in own]
        for expected in batches[3:6]:
            parts = [next(stream) for stream in streams]
            assert [i for part in parts for i in part.ids] == list(expected.ids)
            for groups, part in zip(own, parts, strict=True):
                np.testing.assert_array_equal(
                    part.arrays.audio[list(groups)], expected.arrays.audio[list(groups)]
                )


def test_an_index_is_built_once_and_again_when_its_manifest_or_its_tokens_change(
    mixed, tokenizer, indexed, monkeypatch
):
    builds = []
    read_chunks = build.read_chunks

    def counted(folder, job, size):
        builds.append((job.with_rows, job.counts is not None))
        return read_chunks(folder, job, size)

    monkeypatch.setattr("speechlm2_jax.data.index.opening.read_chunks", counted)
    module_of(tokenizer, [entry(mixed)])
    folder = mixed.with_name("mixed.jsonl.index")
    assert builds == [(True, True)] and {p.name for p in folder.iterdir()} >= {"rows", "lock"}
    module_of(tokenizer, [entry(mixed)])
    assert len(builds) == 1
    module_of(tokenizer, [entry(mixed, tags={"context": "other words"})])
    module_of(tokenizer, [entry(mixed)], prompt_format="plain")
    assert builds[1:] == [(False, True)] * 2
    rows = rows_of(mixed)
    rows[0]["text"] = "another text, and a longer one"
    write_manifest(mixed, rows)
    module = module_of(tokenizer, [entry(mixed)])
    assert builds[3:] == [(True, True)]
    assert contents_of(module)[0].response == "another text, and a longer one"


def rows_of(path):
    text = path.read_bytes().decode().replace("\ufeff", "")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("how", ["bytes", "length", "empty", "missing", "meta"])
def test_a_damaged_index_is_built_again(how, mixed, tokenizer, indexed, caplog):
    expected = contents_of(module_of(tokenizer, [entry(mixed)]))
    (column,) = mixed.with_name("mixed.jsonl.index").glob("prompts-*/tokens.npy")
    data = bytearray(column.read_bytes())
    if how == "bytes":
        data[-3] ^= 1
        column.write_bytes(data)
    elif how == "length":
        column.write_bytes(data[:-4])
    elif how == "empty":  # as a machine that loses its power leaves a file
        column.unlink()  # what is mapped stays
        column.write_bytes(b"")
    elif how == "missing":
        column.unlink()
    else:
        column.with_name("meta.json").write_text("{")
    again = contents_of(module_of(tokenizer, [entry(mixed)]))
    assert again.identity == expected.identity
    tokens = again.parts[0].columns["tokens"]
    np.testing.assert_array_equal(tokens, np.load(column))
    assert again[3].prompt.input_ids.tolist() == expected[3].prompt.input_ids.tolist()


@pytest.mark.parametrize("damage", [lambda data: data, lambda data: data[:90], lambda _: b""])
def test_a_build_that_is_stopped_goes_on_where_it_was(
    damage, mixed, tokenizer, indexed, monkeypatch
):
    monkeypatch.setattr(build, "CHUNK_BYTES", (600, 600))
    read, stops = worker.ChunkReader.read, [3]
    starts = []

    def stopping(self, start, end):
        starts.append(start)
        if len(starts) == stops[0]:
            raise KeyboardInterrupt
        return read(self, start, end)

    monkeypatch.setattr(worker.ChunkReader, "read", stopping)
    with pytest.raises(KeyboardInterrupt):
        module_of(tokenizer, [entry(mixed)])
    (kept, *_) = sorted(mixed.with_name("mixed.jsonl.index").glob("building*/*.npz"))
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    stops[0] = -1
    module = module_of(tokenizer, [entry(mixed)])
    again = [starts[2]] if damage(whole) == whole else [starts[0], starts[2]]
    assert starts[3 : 3 + len(again)] == again
    assert len(set(starts)) == len(starts) - len(again) > 5
    assert len(contents_of(module)) == 29
    assert not list(mixed.with_name("mixed.jsonl.index").glob("building*"))


@pytest.mark.slow  # starts processes
def test_processes_of_their_own_build_the_same_index(mixed, tokenizer, indexed, monkeypatch):
    alone = contents_of(module_of(tokenizer, [entry(mixed)])).parts[0].columns
    alone = {name: column.copy() for name, column in alone.items()}
    monkeypatch.setattr(build, "CHUNK_BYTES", (2000, 2000))
    monkeypatch.setattr(build, "ALONE_BYTES", 0)
    os.utime(mixed, ns=(1, 1))
    columns = contents_of(module_of(tokenizer, [entry(mixed)])).parts[0].columns
    for name, column in columns.items():
        np.testing.assert_array_equal(column, alone[name], err_msg=name)
    lines = mixed.read_bytes().split(b"\n")
    mixed.write_bytes(b"\n".join([*lines[:-2], b"{]", lines[-1]]))
    with pytest.raises(SettingsError, match=f"mixed.jsonl line {len(lines) - 1}: not JSON"):
        module_of(tokenizer, [entry(mixed)])


def test_a_wrong_line_is_named_and_leaves_no_index(mixed, tokenizer, indexed, monkeypatch):
    monkeypatch.setattr(build, "CHUNK_BYTES", (500, 500))
    rows = rows_of(mixed)
    rows[20]["duration"] = "long"
    write_manifest(mixed, rows)
    with pytest.raises(
        SettingsError, match=r"input_cfg.0: .*mixed.jsonl line 21: duration must be"
    ):
        module_of(tokenizer, [entry(mixed)])
    assert not (mixed.with_name("mixed.jsonl.index") / "rows").exists()


def test_a_folder_that_cannot_be_written_to_has_its_index_in_the_cache(
    mixed, tokenizer, indexed, tmp_path, monkeypatch
):
    monkeypatch.setattr("speechlm2_jax.data.index.folders.os.access", lambda *_: False)
    module = module_of(tokenizer, [entry(mixed)])
    (folder,) = (tmp_path / "cache" / "speechlm2_jax" / "index").iterdir()
    assert (folder / "rows" / "meta.json").is_file() and len(contents_of(module)) == 29


def test_a_row_that_changes_under_a_run_is_dropped_and_counted(mixed, tokenizer, indexed):
    module = module_of(tokenizer, [entry(mixed)])
    contents_of(module).parts[0].conversation(0)  # the file is open
    data = bytearray(mixed.read_bytes())
    place = data.find(b"word ", len(data) // 2)
    data[place : place + 5] = b'"x":['
    mixed.write_bytes(data)
    list(islice(module.train_batches(), 12))
    assert module.dropped["changed"] >= 1


def test_any_part_of_a_compressed_text_is_read_from_the_point_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SPACING_BYTES", 1 << 14)
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 107, n, np.uint8)) for n in random.integers(1, 9, 400)]
    lines = b"\n".join(b" ".join(words[i] for i in random.integers(0, 400, 20)) for _ in range(900))
    stored = random.integers(0, 256, 40_000, np.uint8).tobytes()
    path, folder = tmp_path / "text.gz", tmp_path / "points"
    for members in ([lines * 3], [lines + stored + lines], [lines, b"", lines[:9], lines]):
        for level in (1, 9):
            path.write_bytes(b"".join(gzip.compress(m, level) for m in members) + bytes(5))
            texts.write_points(path, folder, {}, lambda _: None)
            text, whole = texts.open_text(path, folder), b"".join(members)
            assert text.size == len(whole)
            bits = np.load(folder / "bits.npy")
            assert len(members) > 1 or len(bits) >= 3
            for start in random.integers(0, len(whole), 20).tolist():
                for length in (1, 100, 50_000):
                    assert text.read(start, length) == whole[start : start + length]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(SettingsError, match="text.gz: damaged"):
        texts.write_points(path, folder, {}, lambda _: None)


def test_lists_in_memory_stand_beside_indexes(
    mixed, corpus, tokenizer, indexed, tmp_path, monkeypatch
):
    monkeypatch.setattr("speechlm2_jax.data.index.rows.can_index", lambda p: p.suffix != ".gz")
    rows = read_rows(corpus / "manifest.jsonl")[:5]
    for n, row in enumerate(rows):
        row |= {"audio_filepath": str(corpus / row["audio_filepath"]), "id": f"packed{n}"}
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    module = module_of(tokenizer, [entry(mixed, weight=1), entry(packed, weight=3)])
    drawn = Counter(
        name.startswith("packed")
        for batch in islice(module.train_batches(), module.batches_per_pass())
        for name in batch.ids
    )
    assert 2 < drawn[True] / drawn[False] < 4
    assert windows.WINDOW_ROWS > 1


def test_what_is_left_out_is_named_and_nothing_left_is_an_error(mixed, tokenizer, indexed, caplog):
    with caplog.at_level("WARNING"):
        module_of(tokenizer, [entry(mixed)], max_duration=0.5)
    assert "left out by max_duration: row" in caplog.text
    with pytest.raises(SettingsError, match="no conversation is left; left out: .*min_tokens"):
        module_of(tokenizer, [entry(mixed)], min_tokens=10_000)


def test_a_damaged_manifest_is_told_where_it_is_read_and_not_where_rows_are_counted(tmp_path):
    path = tmp_path / "m.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"row": %d}\n' % (n * 7919 % 1000) for n in range(500)))
    path.write_bytes(whole[: len(whole) // 2])
    config = DataLoaderConfig(manifest_filepath=str(path), batch_size=1)
    assert not row_count.is_large(config, "train_ds")
