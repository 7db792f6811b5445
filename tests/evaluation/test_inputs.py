"""Inputs: every form gives the same utterances, in its own order."""

import gzip
import json

import numpy as np
import pytest

from speechlm2_jax.evaluation.duplex.inputs import read_dialogues
from speechlm2_jax.evaluation.inputs import left_out, read_inputs
from speechlm2_jax.settings import SettingsError

RATE_HZ = 16_000


def _write(path, rows, opener=open):
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.mark.parametrize("name", ["test.json", "test.jsonl", "test.jsonl.gz"])
def test_a_nemo_manifest_gives_its_rows_in_order(tmp_path, wav, name):
    wav("audio/b.wav", 1.0)
    wav("audio/a.wav", 2.0)
    rows = [
        {"audio_filepath": "audio/b.wav", "duration": 1.0, "text": "one"},
        {"audio_filepath": "audio/a.wav", "duration": 1.0, "text": "x", "_skipme": True},
        {"audio_filepath": "audio/a.wav", "duration": 0.5, "offset": 1.25, "text": "two"},
        {"audio_filepath": "audio/a.wav", "duration": 2.0, "id": "mine"},
    ]
    path = _write(tmp_path / name, rows, gzip.open if name.endswith("gz") else open)
    found = read_inputs(path)
    assert [u.id for u in found] == ["b", "a-000125-000050", "mine"]
    assert [u.text for u in found] == ["one", "two", None]
    assert [u.duration_s for u in found] == [1.0, 0.5, 2.0]
    assert [len(u.read(RATE_HZ)) for u in found] == [16_000, 8_000, 32_000]
    whole = found[2].read(RATE_HZ)
    np.testing.assert_array_equal(found[1].read(RATE_HZ), whole[20_000:28_000])


def test_audio_files_are_read_at_the_models_rate(tmp_path, wav):
    path = wav("a.flac", 1.0, rate_hz=8_000)
    (utterance,) = read_inputs(str(path))
    assert (utterance.id, utterance.text, utterance.duration_s) == ("a.flac", None, 1.0)
    assert utterance.read(RATE_HZ).shape == (16_000,)


def test_a_folder_gives_its_audio_files_by_name(tmp_path, wav):
    wav("set/b/c.wav", 0.1)
    wav("set/a.wav", 0.1)
    (tmp_path / "set" / "notes.txt").write_text("not audio")
    assert [u.id for u in read_inputs(str(tmp_path / "set"))] == ["a.wav", "b/c.wav"]


def test_lhotse_cuts_and_shar_are_read(tmp_path, wav):
    import lhotse

    cuts = []
    for name, seconds in (("b", 1.0), ("a", 2.0)):
        cut = lhotse.Recording.from_file(wav(f"{name}.wav", seconds)).to_cut()
        cut.supervisions = [
            lhotse.SupervisionSegment(
                id=name, recording_id=name, start=0, duration=seconds, text=f"text {name}"
            )
        ]
        cuts.append(cut)
    cutset = lhotse.CutSet.from_cuts(cuts)
    cutset.to_file(tmp_path / "cuts.jsonl.gz")
    (tmp_path / "shar").mkdir()
    cutset.to_shar(tmp_path / "shar", fields={"recording": "wav"}, shard_size=2)
    for inputs in (tmp_path / "cuts.jsonl.gz", tmp_path / "shar"):
        found = read_inputs(str(inputs))
        assert [u.text for u in found] == ["text b", "text a"]
        assert [u.duration_s for u in found] == [1.0, 2.0]
        assert [len(u.read(RATE_HZ)) for u in found] == [16_000, 32_000]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "inputs: no such file or folder"),
        ("", "inputs: .*the manifest is empty"),
        ("hello", "inputs: .*is not JSON lines"),
        ("[1]", "inputs: .*is a JSON list, not JSON lines"),
        ('{"audio_filepath": "a.wav", "sampling_rate": 1}', "line 1: duration is missing"),
        ('{"audio_filepath": "a.wav", "duration": "long"}', "line 1: duration must be seconds"),
    ],
)
def test_inputs_that_cannot_be_used_say_why(tmp_path, content, expected):
    path = tmp_path / "test.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=expected):
        read_inputs(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("song.mid", b"MThd\0\0\0\x06 \xff\xfe", "ffmpeg -i IN OUT.wav"),
        (
            "list.txt",
            b"a.wav\nb.wav\n",
            "is neither audio nor a manifest: supported audio: .wav ",
        ),
        ("table.csv", b"path,text\n", 'a manifest has one object per line, {"audio_filepath": '),
        ("list.json", b'[\n{"audio_filepath": "a.wav"}]', "is a JSON list, .* one object per line"),
        ("rows.jsonl", b"a.wav\n", "is not JSON lines: a manifest has one object per line"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_supported_kinds(
    tmp_path, name, content, message
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=message) as raised:
        read_inputs(str(path))
    assert "codec" not in str(raised.value)


def test_a_manifest_may_have_any_name(tmp_path, wav):
    wav("a.wav", 1.0)
    path = _write(tmp_path / "list.txt", [{"audio_filepath": "a.wav", "duration": 1.0}])
    assert [u.id for u in read_inputs(path)] == ["a"]


def test_files_that_a_folder_leaves_out_are_counted(tmp_path, wav):
    wav("a.wav", 0.1)
    assert left_out(tmp_path) == ""
    for name in ("b.mid", "sub/c.MID", "notes.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert left_out(tmp_path).startswith(
        "files left out: 3 (2 .mid, 1 .txt); supported audio: .wav"
    )
    with pytest.raises(SettingsError, match="no recordings in .*: files left out: 1 .1 .mid"):
        read_inputs(str(tmp_path / "sub"))


def test_a_pattern_is_told_from_a_missing_file(tmp_path):
    with pytest.raises(SettingsError, match="patterns are not expanded: name the folder"):
        read_inputs(str(tmp_path / "*.wav"))


def test_a_duplex_models_inputs_say_so_too(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "b.mid").touch()
    for name, message in [
        ("set", "no recordings in .*: files left out: 1 .1 .mid"),
        ("set/b.mid", "neither audio nor Lhotse cuts: .*ffmpeg -i IN OUT.wav"),
        ("*.wav", "patterns are not expanded"),
    ]:
        with pytest.raises(SettingsError, match=message):
            read_dialogues([str(tmp_path / name)], None)


def test_a_folder_without_audio_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no recordings in"):
        read_inputs(str(tmp_path))


def test_the_recordings_of_a_conversation_follow_one_another(tmp_path, wav):
    wav("a.wav", 1.0)
    turn = {"type": "audio", "from": "User", "value": "a.wav", "duration": 1.0}
    response = {"type": "text", "from": "Assistant", "value": "yes"}
    rows = [{"id": "two", "conversations": [turn, turn, response]}]
    (found,) = read_inputs(_write(tmp_path / "dialog.jsonl", rows), {"context": "Transcribe:"})
    assert (found.id, found.text, found.duration_s) == ("two", "yes", 2.0)
    assert [t.role for t in found.dialog.turns] == ["user"] * 3  # the context is the first
    assert len(found.read(16_000)) == 32_000 and len(found.dialog.read(16_000)) == 2


def test_a_conversation_without_a_turn_of_the_user_is_refused(tmp_path):
    response = {"type": "text", "from": "Assistant", "value": "yes"}
    path = _write(tmp_path / "dialog.jsonl", [{"id": "none", "conversations": [response]}])
    with pytest.raises(SettingsError, match="no turn before the response"):
        read_inputs(path)
