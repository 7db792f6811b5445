"""ShareGPT's dialogs: placeholders in texts, in files, in tars and in WebDataset's form."""

import json

import numpy as np
import pytest
import soundfile

from tests.data_pipeline.small_corpus import (
    read_input_cfg,
    refusal,
    turns,
    wav_bytes,
    write_lines,
    write_tar,
)

RATE = 16000
ASKED = {"from": "human", "value": "Take: <sound>\nwhat is it?"}
TOLD = {"from": "gpt", "value": "a tone"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", np.full(16000, 0.1), RATE)
    return tmp_path


def entry(path, **more):
    return {"type": "share_gpt", "manifest_filepath": str(path), **more}


def read(*entries):
    (source,) = read_input_cfg(*entries)
    assert source.is_endless
    return source.conversations


def test_a_placeholder_becomes_the_recording_between_its_texts(folder):
    rows = [
        {"id": "one", "sound": "audio/a.wav", "conversations": [ASKED, TOLD], "topic": "x"},
        {
            "ori_sound": "audio/a.wav",
            "conversations": [
                {"from": "system", "value": " be short "},
                {"from": "User", "value": "<speech>", "duration": 0.5, "offset": 0.25},
                {"from": "gpt", "value": "no <sound> here? yes"},
            ],
        },
        {"id": 7, "conversations": [{"from": "human", "value": " a "}, TOLD]},
    ]
    one, two, three = read(entry(write_lines(folder / "m.jsonl", *rows)))
    assert one.id == "one" and one.fields == {"topic": "x"}
    expected = [("user", "Take:"), ("user", "a"), ("user", "what is it?")]
    assert turns(one) == [*expected, ("assistant", "a tone")]
    assert one.clips[0].duration_s == 1.0
    assert turns(two)[:2] == [("system", " be short "), ("user", "a_0.250_0.500")]
    assert turns(two)[2:] == [("assistant", "no"), ("assistant", "a"), ("assistant", "here? yes")]
    assert two.id.endswith("m.jsonl line 2") and len(two.clips[0].load(RATE)) == 8000
    assert three.id == "7" and turns(three) == [("user", " a "), ("assistant", "a tone")]


def test_placeholders_and_the_folder_of_audio_can_be_named(folder):
    rows = [{"sound": "a.wav", "conversations": [{"from": "human", "value": "<a> <sound>"}, TOLD]}]
    path = write_lines(folder / "m.jsonl", *rows)
    for named in ("<a>", ["<b>", "<a>"]):
        one = entry(path, audio_placeholders=named, audio_root=str(folder / "audio"))
        (conversation,) = read(one)
        assert turns(conversation)[:2] == [("user", "a"), ("user", "<sound>")]
        assert len(conversation.clips[0].load(RATE)) == RATE
    assert "nowhere: no such folder" in refusal(entry(path, audio_root=str(folder / "nowhere")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [ASKED, TOLD]}, "none is named: give `sound`"),
        ({"sound": 3, "conversations": [ASKED]}, "sound must be a path"),
        ({"sound": "a.wav"}, "conversations is missing"),
        ({"conversations": []}, "conversations must be a list of turns"),
        ({"conversations": ["x"]}, "turn 1: expected an object with from and value"),
        ({"conversations": [{"from": "human"}]}, "turn 1: value must be text"),
        (
            {"sound": "a.wav", "conversations": [{"from": "human", "value": "<sound><speech>"}]},
            "turn 1: 2 placeholders, but a turn has one recording",
        ),
        ({"sound": "s3://x/a.wav", "conversations": [ASKED]}, "needs the package s3fs"),
    ],
)
def test_a_wrong_row_is_one_line_with_its_place(folder, row, message):
    path = write_lines(folder / "m.jsonl", {"conversations": [TOLD]}, row)
    found = refusal(entry(path))
    assert f"{path} line 2: " in found and message in found


def test_recordings_in_tars_are_taken_one_for_each_placeholder(folder):
    members = [("a.wav", wav_bytes(0.5, 0.1 * n)) for n in (1, 2, 3)]
    tar = write_tar(folder / "x.tar", members)
    twice = {"sound": "a.wav", "conversations": [ASKED, TOLD, ASKED, TOLD]}
    path = write_lines(folder / "m.jsonl", twice, {**twice, "conversations": [ASKED, TOLD]})
    first, second = read(entry(path, tarred_audio_filepaths=tar))
    loudness = [clip.load(RATE)[0] for clip in (*first.clips, *second.clips)]
    np.testing.assert_allclose(loudness, [0.1, 0.2, 0.3], atol=1e-4)
    write_lines(folder / "m.jsonl", {**twice, "sound": "b.wav"})
    found = refusal(entry(path, tarred_audio_filepaths=tar))
    assert "line 1: 'b.wav' is not in" in found and str(tar) in found


def webdataset(folder, **more):
    return {"type": "share_gpt_webdataset", "data_dir": str(folder), **more}


def packed(**row):
    return json.dumps({"conversations": [ASKED, TOLD], **row}).encode()


def test_examples_of_a_webdataset_are_a_json_and_its_recording(tmp_path):
    (tmp_path / "1").mkdir()
    members = [
        ("x/0.json", packed(id="w0", sound="else/where.wav")),
        ("x/0.wav", wav_bytes(0.5, 0.1)),
        ("1.wav", wav_bytes(0.25, 0.2)),
        ("1.json", packed()),
        ("2.json", json.dumps({"conversations": [TOLD]}).encode()),
    ]
    write_tar(tmp_path / "1" / "b.tar", members)
    write_tar(tmp_path / "a.tar", [("9.json", packed()), ("9.wav", wav_bytes(0.5))])
    found = read(webdataset(tmp_path))
    assert [c.id for c in found] == ["w0", "1", "2", "9"]  # sorted by path
    assert [len(c.clips) for c in found] == [1, 1, 0, 1]
    assert [len(c.clips[0].load(RATE)) for c in (found[0], found[1])] == [8000, 4000]
    assert turns(found[0])[1] == ("user", "where") and turns(found[1])[1] == ("user", "1")
    (tmp_path / "wids-meta.json").write_text(json.dumps({"shardlist": [{"url": "a.tar"}]}))
    assert [c.id for c in read(webdataset(tmp_path))] == ["9"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.wav", b"x")], "0: has 0.wav; an example is a .json and"),
        ([("0.json", b"{}"), ("0.wav", b""), ("0.flac", b"")], "has 0.json, 0.wav, 0.flac"),
        ([("0.json", b"{")], "0.json: not JSON"),
        ([("0.json", b"[1]")], "0.json: must hold a JSON object"),
        ([("0.json", packed(sound="a.wav"))], "'a.wav' is not beside its .json"),
        (None, "neither wids-meta.json nor a .tar in it"),
    ],
)
def test_a_wrong_example_of_a_webdataset_is_named(tmp_path, members, message):
    if members is not None:
        write_tar(tmp_path / "a.tar", members)
    assert message in refusal(webdataset(tmp_path))


def test_a_folder_that_is_not_there_and_a_wrong_index_are_named(tmp_path):
    assert "no such folder" in refusal(webdataset(tmp_path / "x"))
    (tmp_path / "wids-meta.json").write_text("{}")
    assert "wids-meta.json: shardlist must be a list" in refusal(webdataset(tmp_path))
