"""Manifests of folders of recordings: layouts, checks, splits."""

import json

import numpy as np
import pytest
import soundfile

from speechlm2_jax.commands.manifest import main
from speechlm2_jax.data.folders.layouts import read_folder
from speechlm2_jax.data.folders.splitting import parse_shares, split
from speechlm2_jax.settings import SettingsError

RATE_HZ = 16_000


def record(path, seed=0, *, seconds=0.5, scale=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = scale * np.random.default_rng(seed).standard_normal(int(seconds * RATE_HZ))
    soundfile.write(path, np.clip(wave, -1, 1), RATE_HZ)
    return path


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def text_files(root):
    put(root / "ann" / "a.txt", "one\ntwo\n")
    put(root / "bob" / "b.txt", "three")
    return "ann/a.wav", "bob/b.wav"


def json_files(root):
    put(root / "a.json", json.dumps({"transcription": "one two", "speaker": "ann"}))
    put(root / "b.json", json.dumps({"text": "three", "speaker_id": "bob"}))
    return "a.wav", "b.wav"


def csv_table(root):
    put(root / "list.csv", '\ufeffspeaker;file;Text\nann;a.wav;"one two"\nbob;b.wav;three\n')
    return "audio/a.wav", "audio/b.wav"


def tsv_table(root):
    put(root / "list.tsv", "speaker\taudio\ttext\nann\ta.wav\tone two\nbob\tb.wav\tthree\n")
    return "a.wav", "b.wav"


def common_voice(root):
    rows = "client_id\tpath\tsentence\tage\nann\ta.wav\tone two\t\nbob\tb\tthree\t\n"
    put(root / "validated.tsv", rows)
    put(root / "train.tsv", "client_id\tpath\tsentence\n")
    return "clips/a.wav", "clips/b.wav"


def librispeech(root):
    put(root / "dev" / "ann" / "7" / "ann-7.trans.txt", "ann-7-0 one two\n")
    put(root / "dev" / "bob" / "9" / "bob-9.trans.txt", "bob-9-0 three\n")
    return "dev/ann/7/ann-7-0.flac", "dev/bob/9/bob-9-0.flac"


def audiofolder(root):
    put(root / "train" / "metadata.csv", "file_name,transcription,speaker_id\na.wav,one two,ann\n")
    row = {"file_name": "data/b.wav", "text": "three", "speaker_id": "bob"}
    put(root / "test" / "metadata.jsonl", json.dumps(row))
    return "train/a.wav", "test/data/b.wav"


def ljspeech(root):
    put(root / "metadata.csv", "a|1 2|one two\nb|3|three\n")
    return "wavs/a.wav", "wavs/b.wav"


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (text_files, "a text file or JSON beside each recording"),
        (json_files, "a text file or JSON beside each recording"),
        (csv_table, "a table"),
        (tsv_table, "a table"),
        (common_voice, "Mozilla Common Voice"),
        (librispeech, "LibriSpeech"),
        (audiofolder, "Hugging Face audiofolder"),
        (ljspeech, "LJSpeech"),
    ],
)
def test_every_layout_gives_recordings_texts_and_speakers(layout, name, tmp_path):
    places = layout(tmp_path)
    for place in places:
        record(tmp_path / place)
    extra = record(tmp_path / "clips" / "extra.wav")
    found = read_folder(tmp_path)
    rows = {one.audio: (one.text, one.speaker) for one in found.recordings if one.text is not None}
    speakers = (None, None) if layout is ljspeech else ("ann", "bob")
    texts = dict(zip(places, zip(("one two", "three"), speakers, strict=True), strict=True))
    assert rows == {tmp_path / place: text for place, text in texts.items()}
    assert found.layout == name
    listed = "beside each" not in name
    assert found.unlisted == ((extra,) if listed else ())


def test_what_cannot_be_trained_on_is_left_out_and_counted(tmp_path, capsys):
    for n in range(8):
        record(tmp_path / f"good{n}.wav", n)
        put(tmp_path / f"good{n}.txt", f"text {n % 7}")
    for name, text, changed in [
        ("no_text", None, {}),
        ("empty_text", " \n", {}),
        ("silent", "a", {"scale": 0}),
        ("too_short", "a", {"seconds": 0.05}),
        ("too_long", "a", {"seconds": 3}),
    ]:
        record(tmp_path / f"{name}.wav", 99, **changed)
        if text is not None:
            put(tmp_path / f"{name}.txt", text)
    record(tmp_path / "good_copy.wav", 3)
    put(tmp_path / "good_copy.txt", "another text")
    record(tmp_path / "loud.wav", 50, scale=5)
    put(tmp_path / "loud.txt", "loud")
    put(tmp_path / "unreadable.wav", "no audio")
    put(tmp_path / "unreadable.txt", "a")
    main([str(tmp_path), "--split", "train=0.5,test=0.5", "--max-duration", "2"])
    left_out = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    causes = {row["audio_filepath"].split("/")[-1][:-4]: row["cause"] for row in left_out}
    assert causes == {
        **{name: name for name in ("no_text", "empty_text", "silent", "too_short", "too_long")},
        "good_copy": "copy",
        "unreadable": "unreadable",
    }
    parts = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    ]
    names = [row["audio_filepath"] for part in parts for row in part]
    assert sorted(names) == sorted([*(f"good{n}.wav" for n in range(8)), "loud.wav"])
    assert all(parts) and parts[0][0]["duration"] == 0.5
    told = capsys.readouterr().out
    assert "9 recordings" in told and "1 the same samples as another" in told
    assert "1 clipped" in told and "16000 Hz (9)" in told
    is_shared = {row["text"] for row in parts[0]} & {row["text"] for row in parts[1]}
    assert ("1 texts are in more than one set" in told) == bool(is_shared)


def test_no_speaker_is_in_two_sets_and_the_split_is_always_the_same():
    groups = {f"speaker {n}": [f"{n}.{m}" for m in range(n % 3 + 1)] for n in range(40)}
    seconds = {name: float(len(group)) for name, group in groups.items()}
    shares = parse_shares("train=0.8,validation=0.1,test=0.1")
    parts = split(groups, seconds, shares, seed=1)
    assert parts == split(dict(reversed(groups.items())), seconds, shares, seed=1)
    assert parts != split(groups, seconds, shares, seed=2)
    assert sorted(sum(parts.values(), [])) == sorted(sum(groups.values(), []))
    speakers = [{item.split(".")[0] for item in part} for part in parts.values()]
    assert sum(map(len, speakers)) == len(set.union(*speakers))
    total = sum(seconds.values())
    assert all(abs(len(parts[name]) / total - share) < 0.05 for name, share in shares.items())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--split", "train=0.9"], "add up to 0.9, not 1"),
        (["--split", "train"], "write NAME=SHARE"),
        (["--by", "speaker"], "have no speaker"),
        ([], "1 groups (speakers or files) cannot fill 3 sets"),
        (["--split", "all=1", "--min-duration", "9"], "1 shorter than --min-duration"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, told, tmp_path, capsys):
    record(tmp_path / "a.wav")
    put(tmp_path / "a.txt", "one")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.jsonl"))


def test_manifests_that_are_there_are_not_replaced(tmp_path, capsys):
    record(tmp_path / "a.wav")
    put(tmp_path / "a.txt", "one")
    arguments = [str(tmp_path), "--split", "all=1"]
    main(arguments)
    put(tmp_path / "a.txt", "two")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--overwrite" in capsys.readouterr().err
    main([*arguments, "--overwrite"])
    assert json.loads((tmp_path / "all.jsonl").read_text())["text"] == "two"


def test_a_table_without_texts_is_refused_with_the_names_that_fit(tmp_path):
    put(tmp_path / "list.csv", "file,notes\na.wav,x\n")
    record(tmp_path / "a.wav")
    with pytest.raises(SettingsError, match="no column of texts among file, notes; name it one of"):
        read_folder(tmp_path)
    with pytest.raises(SettingsError, match="no such folder"):
        read_folder(tmp_path / "b")


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ('\n\nfile,text\n\na.wav,"one\ntwo, three"\n', ["one two, three"]),
        ('file,text\r\na.wav,one,,\r\n.\\b.wav,say "two"\r\n', ["one", 'say "two"']),
        ("file|text\na.wav|\nb|two\n", ["", "two"]),
    ],
)
def test_a_csv_table_is_read_as_it_is_written(table, rows, tmp_path):
    put(tmp_path / "list.csv", table)
    for name in ("a.wav", "b.wav"):
        record(tmp_path / name)
    found = read_folder(tmp_path)
    assert [one.text for one in found.recordings] == rows
    assert all(one.audio.is_file() for one in found.recordings)


def test_quotes_that_spreadsheets_put_around_a_field_of_a_tsv_are_no_text(tmp_path):
    texts = ['"say ""one"""', '"two"', '"three" and "four"', 'five "six"', '"']
    rows = "".join(f"{n}.wav\t{text}\n" for n, text in enumerate(texts))
    put(tmp_path / "list.tsv", f"file\ttext\n{rows}")
    expected = ['say "one"', "two", '"three" and "four"', 'five "six"', '"']
    assert [one.text for one in read_folder(tmp_path).recordings] == expected


@pytest.mark.parametrize(
    ("name", "table", "told"),
    [
        ("a.csv", "file,text,by\na.wav,one, two,ann\n", "line 2: 4 fields, but the head has 3"),
        ("a.tsv", 'file\ttext\na.wav\t"one\ttwo"\n', "take the tabs out"),
        ("a.csv", 'file,text\na.wav,"one\nb.wav,two "three"\n', "line 3: ',' expected after '\"'"),
        ("a.csv", 'file,text\na.wav,"one\nb.wav,two\n', "unexpected end of data"),
        ("a.csv", "file,start,end,text\na.wav,0,1,one\na.wav,1,2,two\n", "column 'start'"),
        ("a.csv", "a.wav,one\nb.wav,two\n", "no column of recordings among a.wav, one"),
        ("metadata.jsonl", '{"file_name": "a.wav", "text": ["one"]}\n', "'text' is a list"),
        ("a.json", '{"text": {"words": "one"}}', "'text' is an object"),
    ],
)
def test_a_list_that_would_give_wrong_texts_is_refused(name, table, told, tmp_path):
    put(tmp_path / name, table)
    record(tmp_path / "a.wav")
    with pytest.raises(SettingsError) as refused:
        read_folder(tmp_path)
    assert told in str(refused.value) and name in str(refused.value)


def test_ljspeech_without_a_normalised_text_has_its_raw_text(tmp_path):
    put(tmp_path / "metadata.csv", "a|one|\nb|2|two\n")
    places = [record(tmp_path / "wavs" / name) for name in ("a.flac", "b.wav")]
    found = [(one.audio, one.text) for one in read_folder(tmp_path).recordings]
    assert found == list(zip(places, ("one", "two"), strict=True))


def test_folders_behind_links_are_read_once(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    record(other / "a.wav")
    put(other / "a.txt", "one")
    record(root / "b.wav")
    (root / "linked").symlink_to(other)
    (other / "back").symlink_to(root)
    (root / "lost.wav").symlink_to("nowhere.wav")
    (root / "folder.wav").mkdir()
    found = [one.audio.relative_to(root).as_posix() for one in read_folder(root).recordings]
    assert found == ["b.wav", "linked/a.wav", "lost.wav"]


def test_every_row_that_is_left_out_is_listed_with_its_line(tmp_path, capsys):
    for n in range(2):
        record(tmp_path / f"{n}.wav", n)
    put(tmp_path / "a.csv", "file,text\n0.wav,one\n0.wav,two\nx.wav,a\nx.wav,b\n1.wav," + "z" * 90)
    main([str(tmp_path), "--split", "all=1"])
    rows = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    told = [(row["cause"], row["where"].rpartition(" ")[2]) for row in rows]
    assert told == [("twice", "3"), ("missing", "4"), ("missing", "5")]
    assert "1 with over 40 letters a second" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--split", "left_out=1", "--overwrite"])
    assert "choose another" in capsys.readouterr().err


def test_a_manifest_of_an_earlier_split_is_named(tmp_path, capsys):
    for name in "abc":
        record(tmp_path / f"{name}.wav", ord(name))
        put(tmp_path / f"{name}.txt", name)
    main([str(tmp_path)])
    assert "of before" not in capsys.readouterr().out
    main([str(tmp_path), "--split", "train=1", "--overwrite"])
    assert "test.jsonl, validation.jsonl of before is there too" in capsys.readouterr().out
