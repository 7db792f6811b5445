"""Manifests whose recordings are in tars: which members belong to which rows, in which order."""

import gzip
import io
import logging
import tarfile

import numpy as np
import pytest

from speechlm2_jax.data.tars import TarRecordings, tar_members
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import (
    read_input_cfg,
    refusal,
    turns,
    wav_bytes,
    write_lines,
    write_tar,
)

RATE = 16000
SKIP = {"skip_missing_manifest_entries": True}


def row(name, seconds=0.5, **more):
    return {"audio_filepath": name, "duration": seconds, "text": f"text of {name}", **more}


def entry(folder, manifest="manifest_{0..1}.jsonl", tars="audio__OP_0..1_CL_.tar", **more):
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{folder}/{manifest}",
        "tarred_audio_filepaths": f"{folder}/{tars}",
        **more,
    }


@pytest.fixture
def shards(tmp_path):
    """Two shards of two recordings of 0.5 s, the value of each its number."""
    for shard in range(2):
        names = [f"{shard}{n}.wav" for n in range(2)]
        members = [(name, wav_bytes(0.5, 0.1 * (int(name[:2]) + 1))) for name in names]
        write_tar(tmp_path / f"audio_{shard}.tar", members)
        write_lines(tmp_path / f"manifest_{shard}.jsonl", *map(row, reversed(names)))
    return tmp_path


def ids(entries):
    return [[c.id for c in source.conversations] for source in entries]


def test_order_is_that_of_the_tars_and_each_row_gets_its_own_bytes(shards):
    (source,) = read_input_cfg(entry(shards))
    assert [c.id for c in source.conversations] == ["00.wav", "01.wav", "10.wav", "11.wav"]
    assert source.is_endless and source.conversations[1].response == "text of 01.wav"
    for number, one in zip((0, 1, 10, 11), source.conversations, strict=True):
        wave = one.clips[0].load(RATE)
        assert len(wave) == 8000
        np.testing.assert_allclose(wave, min(0.1 * (number + 1), 1.0), atol=1e-4)


def test_one_manifest_of_all_tars_names_the_shard_of_each_row(shards):
    rows = [row(f"{shard}{n}.wav", shard_id=shard) for n in range(2) for shard in (1, 0)]
    write_lines(shards / "all.jsonl", *rows)
    one = entry(shards, "all.jsonl")
    assert ids(read_input_cfg(one)) == [["00.wav", "01.wav", "10.wav", "11.wav"]]
    write_lines(shards / "all.jsonl", *rows[:-1], row("01.wav"))
    assert "line 4: one manifest of several tars needs shard_id" in refusal(one)
    write_lines(shards / "all.jsonl", *rows, row("x.wav", shard_id=7))
    assert "only in the others: [7]" in refusal(one)


def test_numbers_pair_shards_whatever_their_order(shards):
    tars = [f"{shards}/audio_{n}.tar" for n in (1, 0)]
    listed = {**entry(shards), "tarred_audio_filepaths": tars}
    assert ids(read_input_cfg(listed)) == [["00.wav", "01.wav", "10.wav", "11.wav"]]
    listed["tarred_audio_filepaths"] = [f"{shards}/audio_0.tar", f"{shards}/other.tar"]
    assert "other.tar: no number of a shard in the name, as audio_0.tar has it" in refusal(listed)


@pytest.mark.parametrize("weights", [(), (3, 1)])
def test_lists_of_lists_pair_manifests_with_tars(shards, weights):
    manifests = [[f"{shards}/manifest_{n}.jsonl", *weights[n : n + 1]] for n in range(2)]
    tars = [[f"{shards}/audio_{n}.tar"] for n in range(2)]
    one = {**entry(shards), "manifest_filepath": manifests, "tarred_audio_filepaths": tars}
    found = read_input_cfg(one)
    halves = [["00.wav", "01.wav"], ["10.wav", "11.wav"]]
    assert ids(found) == (halves if weights else [sum(halves, [])])
    assert [s.share for s in found] == ([0.75, 0.25] if weights else [None])
    one["tarred_audio_filepaths"] = tars[:1]
    assert "a list of as many as manifest_filepath has" in refusal(one)


def test_segments_of_a_member_are_sorted_by_name_and_cut(tmp_path):
    write_tar(tmp_path / "audio_0.tar", [("a.wav", wav_bytes(2.0)), ("b-sub1.wav", wav_bytes(1))])
    rows = [
        row("a-sub2.wav", 0.5, offset=1.75),
        row("a-sub1.wav", 0.5, offset=0.25, sampling_rate=16000),
        row("b-sub1.wav", 1.0),
        row("a.wav", 1.9),
        row("a-sub3.wav", 1.0, offset=0.0),
    ]
    write_lines(tmp_path / "manifest_0.jsonl", *rows)
    (source,) = read_input_cfg(entry(tmp_path, "manifest_0.jsonl", "audio_0.tar"))
    found = {c.id: c.clips[0] for c in source.conversations}
    assert list(found) == ["a-sub1.wav", "a-sub2.wav", "a-sub3.wav", "a.wav", "b-sub1.wav"]
    # within 0.2 s the whole member is meant, as in NeMo; a stretch ends with its file
    seconds = [clip.duration_s for clip in found.values()]
    np.testing.assert_allclose(seconds, [0.5, 0.25, 1.0, 2.0, 1.0])
    assert [len(clip.load(RATE)) for clip in found.values()] == [8000, 4000, 16000, 32000, 16000]


def test_what_has_no_partner_is_an_error_unless_it_is_to_be_left_out(shards, caplog):
    write_lines(shards / "manifest_1.jsonl", row("10.wav"), row("gone.wav"))
    assert "manifest_1.jsonl line 2: 'gone.wav' is not in" in refusal(entry(shards))
    write_lines(shards / "manifest_1.jsonl", row("10.wav"))
    message = refusal(entry(shards))
    assert "'11.wav' has no row in" in message
    assert message.endswith("set skip_missing_manifest_entries: true")
    write_lines(shards / "manifest_1.jsonl", row("10.wav"), row("gone.wav"))
    caplog.set_level(logging.WARNING)
    group = {"type": "group", "input_cfg": [entry(shards)], **SKIP}
    for one, more in ((entry(shards), SKIP), (group, {})):
        assert ids(read_input_cfg(one, **more)) == [["00.wav", "01.wav", "10.wav"]]
        rows, members = caplog.messages
        assert "1 rows whose recording is not in it are left out" in rows and "line 2" in rows
        assert "1 members without a row" in members and "11.wav" in members
        caplog.clear()


def test_skipped_rows_are_left_out_and_still_describe_their_member(shards):
    write_lines(shards / "manifest_0.jsonl", row("00.wav", _skipme=True), row("01.wav"))
    assert ids(read_input_cfg(entry(shards))) == [["01.wav", "10.wav", "11.wav"]]


@pytest.mark.parametrize("damage", ["gzip", "cut", "header", "text", "missing"])
def test_a_tar_that_cannot_be_read_at_random_is_named(shards, damage):
    path = shards / "audio_1.tar"
    data = path.read_bytes()
    second = tar_members(path)[1].start - 512
    changed = {
        "gzip": gzip.compress(data),
        "cut": data[: second + 1000],
        "header": data[:second] + b"x" * 512 + data[second + 512 :],
        "text": b"not a tar" * 100,
        "missing": None,
    }[damage]
    path.unlink() if changed is None else path.write_bytes(changed)
    message = refusal(entry(shards))
    assert str(path) in message
    expected = {"gzip": "compressed by gzip", "missing": "no such file"}
    assert expected.get(damage, "not a tar archive, or damaged") in message


def test_a_tar_without_an_end_mark_is_whole(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [("./a.wav", b"12"), ("b.wav", b"345")])
    path.write_bytes(path.read_bytes()[:2048])
    assert [(m.name, m.size) for m in tar_members(path)] == [("a.wav", 2), ("b.wav", 3)]
    recordings = TarRecordings(path)
    assert "./a.wav" in recordings and recordings("a.wav").byte_range == (512, 2)
    with pytest.raises(SettingsError, match="'c.wav' is not in"):
        recordings("c.wav")


def test_a_damaged_member_is_masked_when_its_turn_comes(tmp_path):
    from speechlm2_jax.data.audio import AudioError

    good = wav_bytes(0.5)
    members = [("a.wav", good), ("b.wav", b"no audio" * 50), ("c.wav", good[:9000])]
    write_tar(tmp_path / "audio_0.tar", members)
    rows = [row("a.wav"), row("b.wav"), row("c.wav", sampling_rate=RATE)]
    write_lines(tmp_path / "manifest_0.jsonl", *rows)
    (source,) = read_input_cfg(entry(tmp_path, "manifest_0.jsonl", "audio_0.tar"))
    causes = []
    for one in source.conversations:
        try:
            causes.append(len(one.clips[0].load(RATE)))
        except AudioError as error:
            assert "audio_0.tar" in str(error)
            causes.append(error.cause)
    assert causes == [8000, "unreadable", "truncated"]


def dialog(name, *recordings, **more):
    asked = [{"from": "User", "type": "audio", "value": r, "duration": 0.5} for r in recordings]
    last = {"from": "Assistant", "type": "text", "value": name}
    return {"id": name, "conversations": [*asked, last], **more}


def test_dialogs_take_members_of_one_name_one_after_another(tmp_path):
    members = [("a.wav", wav_bytes(0.5, 0.1 * n)) for n in (1, 2, 3)]
    members += [("b.wav", wav_bytes(0.5, 0.4))]
    write_tar(tmp_path / "audio_0.tar", members)
    rows = [
        dialog("one", "b.wav", "a.wav"),
        dialog("two", "a.wav", custom={"_skipme": True}),
        dialog("three", "a.wav", "a.wav"),
        dialog("four"),
    ]
    write_lines(tmp_path / "manifest_0.jsonl", *rows)
    one = entry(tmp_path, "manifest_0.jsonl", "audio_0.tar", type="multimodal_conversation")
    (source,) = read_input_cfg(one)
    found = {c.id: [clip.load(RATE)[0] for clip in c.clips] for c in source.conversations}
    assert list(found) == ["one", "three", "four"]
    np.testing.assert_allclose(found["one"], [0.4, 0.1], atol=1e-4)
    np.testing.assert_allclose(found["three"], [0.3, 0.3], atol=1e-4)  # the last stays
    assert turns(source.conversations[0])[0] == ("user", "b")


def test_dialogs_without_their_recordings_are_named_or_left_out(tmp_path, caplog):
    write_tar(tmp_path / "audio_0.tar", [("a.wav", wav_bytes(0.5))])
    write_lines(tmp_path / "manifest_0.jsonl", dialog("one", "a.wav"), dialog("two", "gone.wav"))
    one = entry(tmp_path, "manifest_0.jsonl", "audio_0.tar", type="multimodal_conversation")
    assert "line 2: 'gone.wav' is not in" in refusal(one)
    assert ids(read_input_cfg(one, **SKIP)) == [["one"]]
    assert "1 dialogs with a recording that is not in it are left out" in caplog.text
    one["tarred_audio_filepaths"] = f"{tmp_path}/audio_{{0..1}}.tar"
    assert "2 tars, but manifest_filepath has 1 manifests" in refusal(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tarred_audio_filepaths": None}, "give tarred_audio_filepaths, or type: nemo"),
        ({"manifest_filepath": None, "cuts_path": "x"}, "give manifest_filepath, not cuts_path"),
        ({"manifest_filepath": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
def test_a_wrong_entry_is_one_line(shards, change, message):
    assert message in refusal({**entry(shards), **change})


def test_keys_beside_train_ds_read_tars_too(shards):
    keys = {key: value for key, value in entry(shards).items() if key != "type"}
    from speechlm2_jax.data.config import DataLoaderConfig
    from speechlm2_jax.data.salm_dataset import SALMDataset
    from speechlm2_jax.data.sources import read_sources
    from speechlm2_jax.settings import build

    config = build(DataLoaderConfig, {**keys, "batch_size": 1, "tarred_random_access": False})
    (source,) = read_sources(config, "data", SALMDataset.read)
    assert len(source.conversations) == 4


FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@pytest.mark.parametrize("form", FORMATS)
def test_headers_are_read_as_tarfile_reads_them(tmp_path, form):
    names = ["a.wav", "x/" * 40 + "long.wav", "b" * 90 + ".wav", "é" * 20, "empty"]
    names += [] if form == "ustar" else ["c" * 300, "d/" * 200 + "ü.wav"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[form], pax_headers={"comment": "x"}) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty" else 500 + 13 * number
            info.mtime = 1.5  # a pax header of its own
            tar.addfile(info, io.BytesIO(bytes(info.size)))
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "z" * 150 if form != "ustar" else "z"
        tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [tuple(member) for member in tar_members(path)] == expected
    assert [name for name, _, _ in expected] == names


def test_a_member_of_more_than_8_gib_has_a_binary_size(tmp_path):
    info = tarfile.TarInfo("large.wav")
    info.size = 9 << 30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "large.tar"
        header = info.tobuf(form)
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + info.size)  # a hole
        assert [tuple(m) for m in tar_members(path)] == [("large.wav", len(header), 9 << 30)]
