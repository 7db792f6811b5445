"""Manifests of folders of recordings: layouts, checks, splits."""

import json
from pathlib import Path

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
    assert told.startswith(f"manifests: written to {tmp_path}, the folder of the recordings")
    assert "; 9 recordings, 4.5 s\n" in told and "1 the same samples as another" in told
    assert "1 clipped" in told and "16000 Hz (9)" in told
    is_shared = {row["text"] for row in parts[0]} & {row["text"] for row in parts[1]}
    assert ("1 text in more than one set" in told) == bool(is_shared)


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
        (["--by", "speaker"], "without a speaker"),
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
        ("a.csv", "file,text,, Text,\na.wav,one,,two,\n", "names the column 'text' 2 times"),
        ("a.tsv", "file\ttext\ttext\na.wav\tone\ttwo\n", "names the column 'text' 2 times"),
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


def test_paths_of_what_is_left_out_are_as_in_the_manifests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    for n in range(2):
        record(root / f"{n}.wav", n)
    put(root / "a.csv", "file,text\n0.wav,one\n1.wav,\n")
    for output, folder in (("root", "."), ("other", root)):
        main(["root", "--output", output, "--split", "all=1"])
        paths = [rows_of(tmp_path / output / f"{name}.jsonl") for name in ("all", "left_out")]
        kept, left_out = ([row["audio_filepath"] for row in rows] for rows in paths)
        assert (kept, left_out) == ([str(folder / Path("0.wav"))], [str(folder / Path("1.wav"))])


def test_a_manifest_of_an_earlier_split_is_named(tmp_path, capsys):
    for name in "abc":
        record(tmp_path / f"{name}.wav", ord(name))
        put(tmp_path / f"{name}.txt", name)
    main([str(tmp_path)])
    assert "of before" not in capsys.readouterr().out
    main([str(tmp_path), "--split", "train=1", "--overwrite"])
    assert "test.jsonl, validation.jsonl of before is there too" in capsys.readouterr().out


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("places", "speakers"),
    [
        (["spk1/s1/a.wav", "spk1/s2/b.wav", "spk2/c.wav"], ["spk1", "spk1", "spk2"]),
        (["clips/a.wav", "wav48/b.wav", "Data/c.wav"], [None] * 3),
        (["wavs/ann/a.wav", "wavs/bob/b.wav"], ["ann", "bob"]),
        (["monday/a.wav", "monday/b.wav", "c.wav"], [None] * 3),
        (["train/ann/a.wav", "test/bob/b.wav"], ["ann", "bob"]),
        (["Dev Patel/a.wav", "bob/b.wav"], ["Dev Patel", "bob"]),
    ],
)
def test_the_first_folder_that_may_name_a_speaker_does(places, speakers, tmp_path):
    for place in places:
        record(tmp_path / place)
        put((tmp_path / place).with_suffix(".txt"), "one")
    found = {one.audio: one.speaker for one in read_folder(tmp_path).recordings}
    assert [found[tmp_path / place] for place in places] == speakers


def test_rows_without_a_speaker_are_not_of_one_speaker(tmp_path, capsys):
    put(tmp_path / "a.csv", "file,text,speaker\n" + "".join(f"{n}.wav,t{n}, \n" for n in range(4)))
    for n in range(4):
        record(tmp_path / f"{n}.wav", n)
    assert {one.speaker for one in read_folder(tmp_path).recordings} == {None}
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--by", "speaker"])
    assert "without a speaker: 4 recordings" in capsys.readouterr().err


def lists_of_sets(root):
    for n, name in enumerate(("train", "train", "dev", "test")):
        with (root / f"{name}.csv").open("a") as file:
            file.write(("" if file.tell() else "file,text\n") + f"{n}.wav,t{n}\n")
    put(root / "all.csv", "file,text\n" + "".join(f"{n}.wav,t{n}\n" for n in range(4)))
    return [f"{n}.wav" for n in range(4)], {"train": [0, 1], "validation": [2], "test": [3]}


def column_of_sets(root):
    rows = "".join(f"{n}.wav,t{n},{name}\n" for n, name in enumerate(("train", "train", "Eval")))
    put(root / "all.csv", f"file,text,split\n{rows}")
    return [f"{n}.wav" for n in range(3)], {"train": [0, 1], "eval": [2]}


def folders_of_sets(root):
    places = ["train/a/0.wav", "train/b/1.wav", "valid/a/2.wav"]
    for n, place in enumerate(places):
        put((root / place).with_suffix(".txt"), f"t{n}")
    return places, {"train": [0, 1], "validation": [2]}


def subsets(root):
    places = [f"{s}/{n}/7/{n}-7-0.flac" for n, s in enumerate(("train-clean-100", "test-other"))]
    for n, place in enumerate(places):
        put((root / place).with_name(f"{n}-7.trans.txt"), f"{n}-7-0 t{n}\n")
    return places, {"train": [0], "test": [1]}


def held_out_folder(root):
    places = ["a/0.wav", "b/1.wav", "test/2.wav"]
    for n, place in enumerate(places):
        put((root / place).with_suffix(".txt"), f"t{n}")
    return places, {"train": [0, 1], "test": [2]}


def common_voice_sets(root):
    head = "client_id\tpath\tsentence\n"
    rows = [f"{n}\t{n}.wav\tt{n}\n" for n in range(4)]
    for name, own in (("train", rows[:1]), ("dev", rows[1:2]), ("test", rows[2:3])):
        put(root / f"{name}.tsv", head + "".join(own))
    put(root / "validated.tsv", head + "".join(rows))
    return [f"clips/{n}.wav" for n in range(4)], {"train": [0], "validation": [1], "test": [2]}


@pytest.mark.parametrize(
    "layout",
    [
        *(lists_of_sets, column_of_sets, folders_of_sets, subsets, held_out_folder),
        common_voice_sets,
    ],
)
def test_sets_of_the_folder_are_kept_unless_it_is_to_be_split_anew(layout, tmp_path, capsys):
    root = tmp_path / "folder"
    root.mkdir()
    places, expected = layout(root)
    for n, place in enumerate(places):
        record(root / place, n)
    main([str(root), "--output", str(tmp_path / "kept")])
    found = {path.stem: rows_of(path) for path in (tmp_path / "kept").glob("*.jsonl")}
    left_out = found.pop("left_out")
    assert {k: sorted(int(r["text"][1:]) for r in v) for k, v in found.items()} == expected
    assert [row["cause"] for row in left_out] == ["no_set"] * (layout is common_voice_sets)
    told = capsys.readouterr().out
    assert f"kept the folder's own sets: {', '.join(expected)}" in told
    assert ("(no validation)" in told) == (layout in (subsets, held_out_folder))
    assert ("in more than one of them: 1 speaker\n" in told) == (layout is folders_of_sets)
    main([str(root), "--output", str(tmp_path / "anew"), "--resplit", "--split", "all=1"])
    assert len(rows_of(tmp_path / "anew" / "all.jsonl")) == len(places)
    told = capsys.readouterr().out
    assert "split by" in told and "the folder's own sets" in told and "are not kept" in told


def test_a_folder_of_one_set_is_split(tmp_path, capsys):
    put(tmp_path / "train.csv", "file,text\n" + "".join(f"{n}.wav,t{n}\n" for n in range(4)))
    for n in range(4):
        record(tmp_path / f"{n}.wav", n)
    main([str(tmp_path), "--split", "train=0.75,test=0.25"])
    assert [len(rows_of(tmp_path / f"{name}.jsonl")) for name in ("train", "test")] == [3, 1]
    assert "split by files: train=0.75,test=0.25; the folder's own" in capsys.readouterr().out


def test_small_sets_get_small_groups(tmp_path):
    seconds = {"a": 50.0, "b": 30.0, "c": 12.0, "d": 5.0, "e": 3.0}
    groups = {key: [key] for key in seconds}
    shares = parse_shares("train=0.9,validation=0.05,test=0.05")
    for seed in range(20):
        parts = split(groups, seconds, shares, seed=seed)
        assert sorted(parts["train"]) == ["a", "b", "c"]
    # but long files are in every set where files are many
    many = {f"{n}": float(1 + n % 10) for n in range(400)}
    parts = split({key: [key] for key in many}, many, shares, seed=0)
    means = [np.mean([many[key] for key in part]) for part in parts.values()]
    assert means == pytest.approx([5.5] * 3, abs=1.5)


def test_shares_that_groups_do_not_give_are_told(tmp_path, capsys):
    for n in range(9):
        record(tmp_path / f"{n % 3}" / f"{n}.wav", n)
        put(tmp_path / f"{n % 3}" / f"{n}.txt", f"t{n}")
    main([str(tmp_path), "--output", str(tmp_path / "a")])
    told = capsys.readouterr().out
    assert "warning: 3 speakers cannot be divided so: train 33% (not 90%), validation 33%" in told
    assert "--by file" in told
    main([str(tmp_path), "--output", str(tmp_path / "b"), "--split", "train=0.6,test=0.4"])
    assert "warning" not in capsys.readouterr().out


def test_names_are_found_however_their_accents_are_composed(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    record(tmp_path / "one" / f"{apart}.wav")
    put(tmp_path / "one" / "list.csv", f"file,text\n{composed}.wav,one\n{apart},two\n")
    found = read_folder(tmp_path / "one")
    assert [one.audio for one in found.recordings] == [tmp_path / "one" / f"{apart}.wav"] * 2
    assert found.unlisted == ()
    record(tmp_path / apart / f"{apart}.wav")
    put(tmp_path / apart / f"{composed}.txt", "three")
    assert [one.text for one in read_folder(tmp_path / apart).recordings] == ["three"]


def test_a_folder_that_cannot_be_written_is_told_before_recordings_are_read(tmp_path, capsys):
    record(tmp_path / "a.wav").with_suffix(".txt").write_text("one")
    (tmp_path / "b.wav").write_bytes(b"no audio")
    for output in (tmp_path / "a.wav", tmp_path / "a.txt" / "new", "/proc/new"):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path), "--output", str(output)])
        err = capsys.readouterr().err
        assert f"{output}: cannot be written (" in err and err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"a.wav", "a.txt", "b.wav"}
