"""An invalid manifest row is one line that names its place; every valid form is read."""

import gzip
import json
import zlib

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.cuts import read_cuts
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.paths import expand_shards, local_file
from speechlm2_jax.data.readers import read_manifest
from speechlm2_jax.data.shar import read_shar
from speechlm2_jax.settings import SettingsError

RATE = 16000
ROW = {"audio_filepath": "a.wav", "duration": 0.5, "text": "yes"}
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(RATE // 2, 0.1), RATE)
    return tmp_path


def write(path, *rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def read(path):
    return list(read_manifest(path, ManifestOptions()))


def refusal(call, *args):
    with pytest.raises(SettingsError) as caught:
        list(call(*args))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def dialog(*turns):
    return {"id": "c", "conversations": [*turns, {"from": "Assistant", "value": "yes"}]}


NESTED = "[" * 200_000 + "]" * 200_000
WRONG_ROWS = {
    "surrogate": (r'{"audio_filepath":"a.wav","duration":1,"text":"ok \ud83d"}', "surrogate"),
    "surrogate in a key": (r'{"audio_filepath":"a.wav","duration":1,"x\udc00":1}', "surrogate"),
    "1e300": (json.dumps({**ROW, "duration": 1e300}), "duration must be seconds"),
    "400 digits": (f'{{"audio_filepath":"a.wav","duration":{"1" * 400}}}', "duration must be"),
    "5000 digits": (f'{{"audio_filepath":"a.wav","duration":{"1" * 5000}}}', "not JSON"),
    "negative": (json.dumps({**ROW, "duration": -0.5}), "duration must be seconds"),
    "NaN": (json.dumps({**ROW, "duration": float("nan")}), "duration must be seconds"),
    "infinite": (json.dumps({**ROW, "offset": float("inf")}), "offset must be seconds"),
    "text for seconds": (json.dumps({**ROW, "duration": "0.5"}), "duration must be seconds"),
    "bool for seconds": (json.dumps({**ROW, "offset": True}), "offset must be seconds"),
    "list for text": (json.dumps({**ROW, "text": ["yes"]}), "text must be text"),
    "bool for text": (json.dumps({**ROW, "context": True}), "context must be text"),
    "number for a path": (json.dumps({**ROW, "audio_filepath": 5}), "audio_filepath must be"),
    "no path": (json.dumps({**ROW, "audio_filepath": ""}), "audio_filepath must name a file"),
    "null byte": (json.dumps({**ROW, "audio_filepath": "a\0b"}), "must name a file, got 'a\\x00b'"),
    "channel": (json.dumps({**ROW, "channel": 10**9}), "channel must be a number from 0"),
    "channel 1e9": (json.dumps({**ROW, "channel": 1e9}), "channel must be a number from 0"),
    "channel -1": (json.dumps({**ROW, "channel": -1}), "channel must be a number from 0"),
    "nested": (f'{{"audio_filepath":"a.wav","duration":1,"x":{NESTED}}}', "nested too deeply"),
    "cut off": ('{"audio_filepath":"a.wav","dur', "not JSON"),
    "a list": ("[1]", "not a JSON object"),
    "a null": ("null", "not a JSON object"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_of_nemos_is_named_by_its_line(folder, name):
    line, message = WRONG_ROWS[name]
    # blank lines count, as an editor counts them
    path = write(folder / "m.jsonl", ROW, "\n", ROW, " \n", line + "\n", ROW)
    error = refusal(read, path)
    assert f"{path} line 5: " in error and message in error


WRONG_TURNS = {
    "null": (dialog({"from": "User", "value": None}), "turn 1: value must be text, got null"),
    "no speaker": (dialog({"from": None, "value": "x"}), "turn 1: from must be a role"),
    "no turn": (dialog(None), "turn 1: expected an object"),
    "a list": (dialog({"from": "User", "value": ["x"]}), "turn 1: value must be text"),
    "kind": (dialog({"from": "User", "value": "x", "type": "video"}), "type must be text or audio"),
    "no path": (dialog({"from": "User", "value": "", "type": "audio"}), "value must name a file"),
    "custom": ({**dialog(), "custom": [1]}, "custom must be an object"),
    "turns": ({"conversations": "x"}, "conversations must be a list"),
    "seconds": (
        dialog({"from": "User", "type": "audio", "value": "a.wav", "duration": -1}),
        "turn 1: duration must be seconds",
    ),
}


@pytest.mark.parametrize("name", WRONG_TURNS)
def test_a_wrong_turn_is_named_by_line_and_number(folder, name):
    row, message = WRONG_TURNS[name]
    path = write(folder / "c.jsonl", dialog({"from": "User", "value": 5}), row)
    error = refusal(read, path)
    assert f"{path} line 2: " in error and message in error


def test_a_number_is_the_text_it_is_written_as(folder):
    row = {**ROW, "text": 7, "context": 1.5}
    (one,) = read(write(folder / "m.jsonl", row))
    assert one.messages()[0] == ("user", "1.5") and one.response == "7"
    (one,) = read(write(folder / "c.jsonl", dialog({"from": "User", "value": 5})))
    assert one.messages()[0] == ("user", "5")


def cut_row(folder, **changes):
    cut = Recording.from_file(folder / "a.wav").to_cut()
    cut.supervisions = [SupervisionSegment("s", cut.recording.id, 0, 0.5, text="yes")]
    return {**cut.to_dict(), **changes}


@pytest.mark.parametrize(
    "changes",
    [{"duration": 1e300}, {"duration": "x"}, {"duration": None}, {"start": -1}, {"custom": [1]}],
)
def test_a_wrong_cut_is_named_by_its_line(folder, changes):
    path = write(folder / "cuts.jsonl", cut_row(folder), "\n", cut_row(folder, **changes))
    assert f"{path} line 3: " in refusal(read, path)


def rotten(data, error):
    """Bytes of a gzip file, changed so that reading it raises just this."""
    for at in range(40, len(data) - 9):
        changed = bytearray(data)
        changed[at] ^= 255
        try:
            gzip.decompress(bytes(changed))
        except Exception as found:
            if type(found) is error:
                return bytes(changed)
    raise AssertionError(error)


@pytest.mark.parametrize("damage", ["zlib", "crc", "cut", "not gzip"])
@pytest.mark.parametrize("kind", ["nemo", "cuts", "shar"])
def test_a_damaged_compressed_file_is_named(folder, damage, kind):
    rows = [{**ROW, "id": f"{n * 7919}"} for n in range(300)]
    if kind != "nemo":
        rows = [cut_row(folder, id=f"{n * 7919}") for n in range(300)]
    good = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    bad = {
        "zlib": lambda: rotten(good, zlib.error),
        "crc": lambda: good[:-8] + bytes(8),
        "cut": lambda: good[: len(good) // 2],
        "not gzip": lambda: good[:2] + b"\x00" + good[3:],
    }[damage]()
    path = folder / "cuts.000000.jsonl.gz"
    path.write_bytes(bad)
    error = refusal(read_shar, folder, ManifestOptions()) if kind == "shar" else refusal(read, path)
    assert f"{path}: damaged after line" in error


def test_compression_is_told_by_content(folder):
    lines = (json.dumps(ROW) + "\n").encode()
    (folder / "plain.jsonl.gz").write_bytes(lines)
    (folder / "packed.jsonl").write_bytes(gzip.compress(lines))
    assert [c.response for c in read(folder / "plain.jsonl.gz")] == ["yes"]
    assert [c.response for c in read(folder / "packed.jsonl")] == ["yes"]


def test_a_byte_order_mark_is_read_over_and_another_encoding_is_named(folder):
    path = write(folder / "m.jsonl", ROW, ROW)
    path.write_bytes(BOM + path.read_bytes())
    assert len(read(path)) == 2
    cuts = write(folder / "cuts.jsonl", cut_row(folder))
    cuts.write_bytes(BOM + cuts.read_bytes())
    assert len(list(read_cuts(cuts))) == 1
    for name in ("utf-16", "utf-32"):
        path.write_bytes(json.dumps(ROW).encode(name))
        assert f"{path} line 1: {name.upper()} text" in refusal(read, path)
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"text": "caf\xe9"}\n')
    assert f"{path} line 2: not UTF-8 text" in refusal(read, path)


@pytest.mark.parametrize("is_packed", [False, True])
def test_files_with_byte_order_marks_may_be_joined(folder, is_packed):
    lines = BOM + (json.dumps(ROW) + "\n").encode() * 2
    joined = lines + BOM + lines + BOM + b"\n" + json.dumps({**ROW, "duration": -1}).encode()
    path = folder / "m.jsonl"
    pack = gzip.compress if is_packed else bytes
    path.write_bytes(pack(lines) + pack(lines))
    assert len(read(path)) == 4
    path.write_bytes(pack(joined.replace(BOM + BOM, BOM)))
    assert f"{path} line 6: duration" in refusal(read, path)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_lines_may_end_as_any_system_ends_them(folder, end):
    path = folder / "m.jsonl"
    lines = [json.dumps(ROW), "", json.dumps(ROW)]
    path.write_bytes(BOM + end.join([*lines, ""]).encode())
    assert len(read(path)) == 2
    path.write_bytes(end.join([*lines, json.dumps({**ROW, "duration": -1})]).encode())
    assert f"{path} line 4: duration" in refusal(read, path)
    path.write_bytes((json.dumps(ROW) + "\r" + json.dumps(ROW) + end + json.dumps(ROW)).encode())
    assert len(read(path)) == 3
    cuts = folder / "cuts.jsonl"
    cuts.write_bytes(end.join([json.dumps(cut_row(folder, id=str(n))) for n in range(3)]).encode())
    assert len(list(read_cuts(cuts))) == 3


NEAR_MISSES = [
    ({"audio_filename": "a.wav", "duration": 1, "text": "x"}, "'audio_filename' to"),
    ({"audio_path": "a.wav", "duration": 1, "text": "x"}, "'audio_path' to 'audio_filepath'"),
    ({"Audio-FilePath": "a.wav", "duration": 1}, "'Audio-FilePath' to 'audio_filepath'"),
    ({"path": "a.wav", "sentence": "x"}, "'path' to 'audio_filepath'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "'messages' to 'conversations'"),
    ({"x": 1}, "audio_filepath is missing; the keys are 'x'"),
    ({"audio_filepath": "a.wav", "dur": 1, "sampling_rate": 8000}, "rename 'dur' to 'duration'"),
]


TEXT_KEYS = ["transcript", "transcription", "Transcript", "sentence", "txt", "Text", "text "]


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_a_transcript_under_another_name_is_told_the_right_one(folder, key):
    """Such a row counted as one without a response."""
    row = {"audio_filepath": "a.wav", "duration": 0.5, key: "yes"}
    error = refusal(read, write(folder / "m.jsonl", ROW, row))
    assert f"line 2: text is missing; rename {key!r} to 'text', or set text_field: {key}" in error
    options = ManifestOptions(text_field=key)
    (one,) = read_manifest(write(folder / "m.jsonl", row), options)
    assert one.response == "yes"


@pytest.mark.parametrize(
    ("extra", "text_field"),
    [
        ({}, "text"),
        ({"text": None, "transcript": "yes"}, "text"),
        ({"label": "noise"}, "text"),
        ({"context": "x", "pred_text": "x", "text_de": "x", "test": "x"}, "text"),
        ({"text_de": "ja", "transcript": "ja"}, "text_en"),
    ],
)
def test_a_row_without_text_may_be_meant_so(folder, extra, text_field):
    row = {"audio_filepath": "a.wav", "duration": 0.5, **extra}
    options = ManifestOptions(text_field=text_field)
    (one,) = read_manifest(write(folder / "m.jsonl", row), options)
    assert one.response is None


@pytest.mark.parametrize(("row", "message"), NEAR_MISSES)
def test_a_key_that_is_nearly_right_is_told_the_right_one(folder, row, message):
    error = refusal(read, write(folder / "m.jsonl", row))
    assert "line 1: " in error and message in error


def test_a_recordings_own_length_counts_unless_the_manifest_vouches_for_one(folder):
    """NeMo's LazyNeMoIterator: the header is read where there is no sampling_rate."""
    rated = {"sampling_rate": RATE}
    rows = [
        ({**ROW, "duration": 0.35}, 8000),
        ({**ROW, "duration": 9.0}, 8000),
        ({**ROW, "duration": None}, 8000),
        ({**ROW, "duration": 0.45, **rated}, 7200),
        ({**ROW, "duration": 0.25, "offset": 0.1}, 4000),
        ({**ROW, "duration": 9.0, "offset": 0.1}, 6400),
        ({**ROW, "duration": 0.25, "offset": 0.1, **rated}, 4000),
    ]
    found = read(write(folder / "m.jsonl", *(row for row, _ in rows)))
    assert [len(c.clips[0].load(RATE)) for c in found] == [samples for _, samples in rows]
    lost = [
        ({**ROW, "duration": 0.2, **rated}, "longer_than_declared"),
        ({**ROW, "duration": 0.2, "sample_rate": RATE}, "longer_than_declared"),
        ({**ROW, "duration": 9.0, "offset": 0.1, **rated}, "truncated"),
        ({**ROW, "duration": 0.2, "offset": 0.6}, "empty"),
        ({**ROW, "audio_filepath": "none.wav"}, "missing"),
    ]
    for one, (_, cause) in zip(
        read(write(folder / "m.jsonl", *(row for row, _ in lost))), lost, strict=True
    ):
        with pytest.raises(AudioError) as caught:
            one.clips[0].load(RATE)
        assert caught.value.cause == cause


def test_a_stretch_of_a_conversation_ends_with_its_file(folder):
    turn = {"from": "User", "type": "audio", "value": "a.wav", "duration": 3.0, "offset": 0.125}
    (one,) = read(write(folder / "c.jsonl", dialog(turn)))
    assert len(one.clips[0].load(RATE)) == 6000


@pytest.mark.parametrize("name", ["a" * 300 + ".wav", "é" * 200 + ".wav"])
def test_a_name_that_no_file_can_have_is_a_missing_file(folder, name):
    (one,) = read(write(folder / "m.jsonl", {**ROW, "audio_filepath": name}))
    with pytest.raises(AudioError) as caught:
        one.clips[0].load(RATE)
    assert caught.value.cause == "missing"
    assert "no such file" in refusal(read, name)


def test_a_file_address_is_a_path_of_this_machine(folder):
    other = folder / "ä b%20.wav"
    soundfile.write(other, np.full(RATE // 2, 0.1), RATE)
    spelt = [
        other.as_uri(),
        f"file://localhost{other.as_uri().removeprefix('file://')}",
        f"file:{other}",
        f"FILE://{other}",
    ]
    path = write(folder / "m.jsonl", *({**ROW, "audio_filepath": one} for one in spelt))
    found = list(read_manifest(path.as_uri(), ManifestOptions()))
    assert {c.clips[0].path for c in found} == {str(other)}
    cut = cut_row(folder)
    cut["recording"]["sources"][0] |= {"type": "url", "source": other.as_uri()}
    (one,) = read(write(folder / "cuts.jsonl", cut))
    assert one.clips[0].path == str(other)
    wrong = {
        "file://server/a.wav": " is not on this machine",
        "s3://bucket/a.wav": ": needs the package s3fs",
    }
    for name, reason in wrong.items():
        error = refusal(read, write(folder / "m.jsonl", {**ROW, "audio_filepath": name}))
        assert f"line 1: {name}{reason}" in error


def test_a_folder_is_not_a_missing_file(folder):
    write(folder / "m.jsonl", ROW)
    assert f"is a folder; name a manifest, for instance {folder}/m.jsonl" in refusal(read, folder)
    CutSet([]).to_file(folder / "cuts.000000.jsonl.gz")
    assert "set shar_path" in refusal(read, folder)
    assert "is a file" in refusal(read_shar, folder / "m.jsonl", ManifestOptions())
    with pytest.raises(SettingsError, match="no such file"):
        local_file(folder / "none")


@pytest.mark.parametrize("path", ["p_{0..100000000}.json", "p_{0..2000}_{0..2000}", "p_{5..2}"])
def test_a_pattern_of_too_many_shards_is_refused(path):
    assert path[:3] in refusal(expand_shards, path)
