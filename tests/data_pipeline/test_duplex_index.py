"""An index of conversations of two voices gives what reading all of them gives."""

import json
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from speechlm2_jax.data.duplex.indexed import IndexedDuplexContents
from speechlm2_jax.data.duplex.speaker_counts import speakers_of
from speechlm2_jax.data.index import build, row_count
from speechlm2_jax.inspection.facts import padding, planned_batches
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline import duplex_corpus as corpus
from tests.data_pipeline.small_corpus import wav_bytes, write_lines, write_tar
from tests.data_pipeline.test_duplex_types import (
    CONTINUATION,
    OVERLAP,
    REVERSE,
    TO_DUPLEX,
    synthesis,
    with_segments,
)

SPEAKER = [("user", 0.0, 0.4, "hi"), ("other", 0.5, 0.6, "x"), ("agent", 0.6, 0.9, "")]


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """Conversations of 0.3 to 2.2 s, one of a silent agent and a speaker without a role."""
    folder = tmp_path_factory.mktemp("duplex")
    made = corpus.corpus(folder, 9)
    made.insert(3, corpus.cut(folder, "silent", 0.9, SPEAKER))
    return made


def _lines(folder, cuts):
    return corpus.write_cuts(folder / "cuts.jsonl", cuts)


def _compressed(folder, cuts):
    return corpus.write_cuts(folder / "cuts.jsonl.gz", cuts)


def _shar(folder, cuts):
    return corpus.write_shar(folder / "shar", cuts, shard_size=4)


def _reversed(folder, cuts):
    roles = {"agent_roles": ["agent", "other"]}
    return {"input_cfg": [{"type": REVERSE, **roles, **_shar(folder, cuts)}]}


def _overlapping(folder, cuts):
    made = [
        with_segments(folder, "a", [(0.4, 0.9, "A")], [(0.3, 0.6, "C")]),
        with_segments(folder, "left out", [(0.1, 0.6, "D")], [(0.2, 0.5, "E")]),
        with_segments(folder, "b", [(0.5, 0.6, "D")], [(0.2, 0.5, "E")]),
    ]
    keys = {"type": OVERLAP, "filter_samples_starting_with_agent": True}
    return {"input_cfg": [{**keys, **_lines(folder, made)}]}


def _continuation(folder, cuts):
    made = [synthesis(folder, "a"), synthesis(folder, "b", score={"cer": 1.0})]
    made += [synthesis(folder, "c"), synthesis(folder, "d")]
    keys = {"type": CONTINUATION, "add_extra_end_silence": True}
    keys["extra_end_silence_range"] = [0.1, 0.5]
    return {"input_cfg": [{**keys, **_shar(folder, made)}]}


def _to_duplex(folder, cuts):
    for shard in range(2):
        rows = [{"audio_filepath": f"{n}.wav", "duration": 0.5 + n, "text": "hi"} for n in range(2)]
        write_lines(folder / f"manifest_{shard}.jsonl", *rows)
        members = [(f"{n}.wav", wav_bytes(0.5 + n)) for n in (1, 0)]
        write_tar(folder / f"audio_{shard}.tar", members)
    entry = {
        "type": TO_DUPLEX,
        "agent_silence_duration": 0.5,
        "manifest_filepath": f"{folder}/manifest_{{0..1}}.jsonl",
        "tarred_audio_filepaths": f"{folder}/audio_{{0..1}}.tar",
    }
    return {"input_cfg": [entry]}


KINDS = {
    "lines": _lines,
    "compressed": _compressed,
    "shar": _shar,
    "reversed": _reversed,
    "overlapping": _overlapping,
    "continuation": _continuation,
    "to_duplex": _to_duplex,
}
LEFT_OUT = {"max_duration": 1.9, "min_duration": 0.4}


@pytest.fixture
def make_large(monkeypatch, tmp_path):
    monkeypatch.setattr("speechlm2_jax.data.prepare.IN_ORDER_ROWS", 4)
    monkeypatch.setattr("speechlm2_jax.data.prepare.WINDOW_ROWS", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: monkeypatch.setattr(row_count, "LARGE_ROWS", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_lengths_and_batches_are_those_of_data_in_memory(kind, cuts, make_large, tmp_path):
    source = KINDS[kind](tmp_path, cuts)
    settings = {"shard_seed": 5, "batch_duration": 4.0, **LEFT_OUT}
    whole = corpus.module(source, **settings)
    assert not list(tmp_path.rglob("*.index"))
    make_large()
    module = corpus.module(source, **settings)
    has, expected = (one.prepared().contents for one in (module, whole))
    assert isinstance(has, IndexedDuplexContents) and len(has) == len(expected.conversations) >= 2
    for index, other in enumerate(expected.conversations):
        assert (has[index].id, has[index].turns) == (other.id, other.turns)
    measures = has.measured(range(len(has)))
    np.testing.assert_array_equal(measures.length, expected.measures.length)
    np.testing.assert_array_equal(measures.positions, expected.measures.positions)
    assert module.plan().buckets == whole.plan().buckets and module.dropped == whole.dropped
    for mine, theirs in zip(module.train_batches(), islice(whole.train_batches(), 5), strict=False):
        assert mine.ids == theirs.ids
        own, others = corpus.rows(mine), corpus.rows(theirs)
        for name, fields in others.items():
            for field, value in fields.items():
                np.testing.assert_array_equal(own[name][field], value, err_msg=f"{name} {field}")


def test_a_row_of_an_index_has_32_bytes_and_its_plan_is_shown(cuts, make_large, tmp_path):
    make_large()
    module = corpus.module(_shar(tmp_path, cuts))
    (part,) = module.prepared().contents.parts
    per_row = [column for column in part.columns.values() if len(column) == len(part)]
    assert sum(column.itemsize for column in per_row) <= 32
    found = padding(module.prepared(), planned_batches(module, "train_ds"))
    assert found.batches == 3 and 0 < found.positions < 0.7


def test_batches_hold_every_row_once_and_resume_anywhere(cuts, make_large, tmp_path):
    make_large()
    source = _shar(tmp_path, cuts)
    stream = corpus.module(source, shuffle=True).train_batches()
    batches, states = [], []
    for batch in islice(stream, 8):
        batches.append(batch)
        states.append(json.loads(json.dumps(stream.get_state())))
    first = [i for b, s in zip(batches, states, strict=True) if s["epoch"] == 0 for i in b.ids]
    assert Counter(first) == Counter(cut.id for cut in cuts)
    for place in (0, 2, 3):
        resumed = corpus.module(source, shuffle=True).train_batches(states[place])
        for expected, batch in zip(batches[place + 1 :], resumed, strict=False):
            assert batch.ids == expected.ids
            np.testing.assert_array_equal(batch.arrays.source_audio, expected.arrays.source_audio)


def test_a_list_in_memory_stands_beside_an_index(cuts, make_large, tmp_path):
    whole = corpus.write_cuts(tmp_path / "cuts.json", cuts[:4])
    lines = corpus.write_cuts(tmp_path / "cuts.jsonl", cuts[4:])
    source = {"input_cfg": [{"type": "lhotse", **whole}, {"type": "lhotse", **lines}]}
    expected = corpus.module(source)
    make_large()
    module = corpus.module(source)
    has = module.prepared().contents
    assert isinstance(has, IndexedDuplexContents)
    assert [has[n].id for n in range(len(has))] == [cut.id for cut in cuts]
    assert module.plan().buckets == expected.plan().buckets
    first = [i for batch in islice(module.train_batches(), 4) for i in batch.ids]
    assert {cut.id for cut in cuts[:4]} & set(first) and {c.id for c in cuts[4:]} & set(first)


def test_a_stale_index_is_built_again(cuts, make_large, tmp_path, monkeypatch):
    make_large()
    builds = []
    read_chunks = build.read_chunks

    def counted(folder, job, size):
        builds.append((job.with_rows, job.counts is not None))
        return read_chunks(folder, job, size)

    monkeypatch.setattr("speechlm2_jax.data.index.opening.read_chunks", counted)
    source = _lines(tmp_path, cuts)
    corpus.module(source)
    corpus.module(source)
    assert builds == [(True, True)]
    corpus.module(source, block={**corpus.BLOCK, "output_roles": ["agent", "other"]})
    assert builds[1:] == [(False, True)]
    padded = corpus.module(source, pad_min_duration=1.0)
    assert builds[2:] == [(True, True)]
    lengths = padded.prepared().contents.measured(range(len(cuts))).length
    assert lengths.min() == 1.0 < lengths.max()
    _lines(tmp_path, cuts[:5])
    assert len(corpus.module(source).prepared().contents) == 5 and len(builds) == 4


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("kind", ["reversed", "overlapping", "continuation", "to_duplex"])
def test_processes_of_their_own_build_the_same_index(kind, cuts, make_large, tmp_path, monkeypatch):
    make_large()
    source = KINDS[kind](tmp_path, cuts)
    (part,) = corpus.module(source).prepared().contents.parts
    alone = {name: column.copy() for name, column in part.columns.items()}
    monkeypatch.setattr(build, "CHUNK_BYTES", (200, 200))
    monkeypatch.setattr(build, "ALONE_BYTES", 0)
    for folder in tmp_path.rglob("*.index"):
        shutil.rmtree(folder)
    (part,) = corpus.module(source).prepared().contents.parts
    for name, column in part.columns.items():
        if name == "speakers":  # a line for each chunk
            assert speakers_of([{name: column}]) == speakers_of([alone])
        else:
            np.testing.assert_array_equal(column, alone[name], err_msg=name)


def test_changed_lengths_are_those_of_data_in_memory(cuts, make_large, tmp_path):
    source = _lines(tmp_path, cuts)
    settings = {"truncate_duration": 1.2, "pad_min_duration": 0.5, "pad_direction": "both"}
    whole = corpus.module(source, **settings)
    make_large()
    module = corpus.module(source, **settings)
    has, expected = (one.prepared().contents for one in (module, whole))
    assert [has[n].turns for n in range(len(has))] == [c.turns for c in expected.conversations]
    assert module.plan().buckets == whole.plan().buckets
    mine, theirs = (next(one.train_batches()) for one in (module, whole))
    assert mine.ids == theirs.ids
    np.testing.assert_array_equal(mine.arrays.source_audio, theirs.arrays.source_audio)


def test_speakers_without_a_role_and_silent_agents_are_told(cuts, make_large, tmp_path, caplog):
    make_large()
    source = _lines(tmp_path, cuts)
    corpus.module(source)
    told = "speakers of supervisions are 'user' (10 turns), 'agent' (10 turns), 'other' (1 turns)"
    assert told in caplog.text
    wrong = {**corpus.BLOCK, "output_roles": ["nobody"]}
    with pytest.raises(SettingsError, match="data.output_roles matches no speaker"):
        corpus.module(source, block=wrong)
    silent = [corpus.cut(tmp_path, f"s{n}", 0.5, [*SPEAKER[:1], *SPEAKER[2:]]) for n in range(9)]
    with pytest.raises(SettingsError, match="in 3 of 3 conversations .* the agent has no text"):
        corpus.module(_shar(tmp_path, silent))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "cuts.jsonl", other / "cuts.jsonl")
    with (other / "cuts.jsonl").open("a") as file:
        file.write('{"type": "MonoCut"}\n')
    with pytest.raises(SettingsError, match=r"cuts.jsonl line 11: not Lhotse cuts"):
        corpus.module({"cuts_path": str(other / "cuts.jsonl")})
