"""The recipe ljspeech: how its data are divided and spelt, and that its keys count."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax import experiment
from speechlm2_jax.data.datamodule import DataModule
from speechlm2_jax.models.ctc import CTCModel
from tests.tools.recipe_case import check_salm_recipe, recipe_settings
from tools import prepare_ljspeech
from tools.corpus.plain_text import plain_text

RATE_HZ = 22_050
RECORDINGS = 40
SETS = ("train", "validation", "test")


def name_of(number: int) -> str:
    return f"LJ001-{number:04d}"


def write_archive(folder: Path) -> None:
    """The unpacked archive, in small; one row has no recording, one a sign that is not read."""
    (folder / "wavs").mkdir(parents=True)
    wave = 0.1 * np.random.default_rng(0).standard_normal(RATE_HZ)
    lines = ["LJ001-0098|no file|no file", "LJ001-0099|£5|£5"]
    soundfile.write(folder / "wavs/LJ001-0099.wav", wave, RATE_HZ)
    for i in range(RECORDINGS):
        soundfile.write(folder / f"wavs/{name_of(i)}.wav", wave, RATE_HZ)
        lines.append(f'{name_of(i)}|"Some {i}, Mr. X|"Some twenty-five, Mr. X')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def write_flat(folder: Path, archive: Path) -> None:
    """The same as a manifest beside its audio."""
    lines = (archive / "metadata.csv").read_text().splitlines()
    texts = {line.split("|")[0]: line.split("|")[2] for line in lines}
    rows = [
        {"audio_filepath": f"../{archive.name}/wavs/{name}.wav", "text": text}
        for name, text in texts.items()
    ]
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the program writes of both forms: `ljspeech` and `flat`."""
    folder = tmp_path_factory.mktemp("prepared")
    write_archive(folder / "archive")
    write_flat(folder / "copy", folder / "archive")
    prepare_ljspeech.main(folder / "ljspeech", folder / "archive")
    prepare_ljspeech.main(folder / "flat", folder / "copy")
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_forms_of_the_data_are_divided_alike_and_each_recording_is_in_one_set(prepared):
    stems = {}
    for form in ("ljspeech", "flat"):
        sets = {name: rows_of(prepared / form / f"{name}.jsonl") for name in SETS}
        stems[form] = {
            n: [Path(r["audio_filepath"]).stem for r in rows] for n, rows in sets.items()
        }
        assert {row["text"] for rows in sets.values() for row in rows} == {
            "some twenty five mister x"
        }
        assert all(row["duration"] == pytest.approx(1.0) for rows in sets.values() for row in rows)
    assert stems["ljspeech"] == stems["flat"]
    each = [stem for names in stems["flat"].values() for stem in names]
    assert sorted(each) == [name_of(i) for i in range(RECORDINGS)]
    assert min(map(len, stems["flat"].values())) > 0


def test_rows_that_are_left_out_are_told_with_their_cause(prepared, capsys):
    prepare_ljspeech.main(prepared / "again", prepared / "archive")
    out = capsys.readouterr().out
    assert "left out: 2" in out
    assert "LJ001-0099.wav: signs that are not read: £" in out and "LJ001-0098.wav: " in out


def test_a_folder_of_another_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither metadata.csv nor train.jsonl"):
        prepare_ljspeech.main(tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In 1865, 1,250 men", "in eighteen sixty five one thousand two hundred fifty men"),
        ("1805; 1900. 2000", "eighteen oh five nineteen hundred two thousand"),
        ("the 21st and 40th", "the twenty first and fortieth"),
        ("3.5% of it", "three point five percent of it"),
        ("Café \u201cd\u2019Or\u201d \u2014 'quiet'", "cafe d'or quiet"),
        ("Mr. A & Dr. B, etc.", "mister a and doctor b et cetera"),
        ("10,000,012", "ten million twelve"),
        ("...", ""),
    ],
)
def test_texts_are_words_of_letters(text, expected):
    assert plain_text(text) == expected


@pytest.mark.parametrize("text", ["$5", "a1b", "3x"])
def test_a_text_that_nobody_knows_how_to_read_is_refused(text):
    with pytest.raises(ValueError, match="signs that are not read"):
        plain_text(text)


def test_every_key_of_the_recipe_is_known(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    check_salm_recipe("ljspeech")


def test_every_key_of_the_encoder_s_recipe_is_known(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    values = recipe_settings("ljspeech_ctc", base="parts/tiny_encoder")
    experiment.check_blocks(values)
    model = CTCModel(values["model"])
    datamodule = DataModule(values["data"], model.tokenizer)
    datamodule.setup(frame_count=model.frame_count, groups=1)
    assert not datamodule.dropped
