"""SHAR's fields of JSON lines belong to the cuts, as Lhotse's CutSet.from_shar gives them."""

import gzip
import json

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment

from speechlm2_jax.data.duplex.readers import read_duplex
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.shar import read_shar
from speechlm2_jax.settings import SettingsError

RATE = 16000


def cuts_of(folder, ids):
    for number, name in enumerate(ids):
        path = folder / f"{number}.wav"
        soundfile.write(path, np.full(1600 * (number + 1), 0.1), RATE)
        cut = Recording.from_file(path).to_cut()
        cut.id = cut.recording.id = name
        cut.supervisions = [SupervisionSegment(name, name, 0, 0.1, text=f"text {name}")]
        yield cut


def write_field(path, name, values):
    """One line per cut; a cut without a value has a line with its id alone."""
    lines = [{"cut_id": c} | ({} if v is None else {name: v}) for c, v in values]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


@pytest.fixture
def shar(tmp_path):
    """Five cuts in shards of two, with a text, numbers and objects beside them."""
    folder, ids = tmp_path / "shar", ["c0", "c1", "c2", "c3", "c4"]
    folder.mkdir()
    CutSet(list(cuts_of(tmp_path, ids))).to_shar(folder, {"recording": "wav"}, shard_size=2)
    for shard in range(3):
        own = ids[2 * shard : 2 * shard + 2]
        context = [(c, None if c == "c3" else f"context {c}") for c in own]
        write_field(folder / f"context.{shard:06d}.jsonl.gz", "context", context)
        write_field(folder / f"score.{shard:06d}.jsonl", "score", [(c, 0.5) for c in own])
        meta = [(c, {"speaker": c, "list": [1, None]}) for c in own]
        write_field(folder / f"meta.{shard:06d}.jsonl.gz", "meta", meta)
    return folder


def files(folder, *fields):
    return {
        field: tuple(sorted(str(p) for p in folder.glob(f"{field}.*")))
        for field in ("cuts", "recording", *fields)
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Lhotse's tars
@pytest.mark.parametrize("way", ["folder", "folders", "files"])
def test_fields_are_the_cuts_own_as_lhotse_gives_them(shar, way):
    named = {
        "folder": shar,
        "folders": (str(shar),),
        "files": files(shar, "context", "score", "meta"),
    }
    found = list(read_shar(named[way], ManifestOptions()))
    expected = list(CutSet.from_shar(in_dir=shar))
    assert [c.id for c in found] == [c.id for c in expected]
    for conversation, cut in zip(found, expected, strict=True):
        for key in ("context", "score", "meta"):
            assert conversation.fields.get(key) == (cut.custom or {}).get(key)
    opens = [c.messages()[0] for c in found]
    assert opens[0] == ("user", "context c0") and opens[4] == ("user", "context c4")
    assert len(found[3].turns) == 2  # no value, no turn
    assert [c.shard for c in found] == [0, 0, 1, 1, 2]


def test_a_listing_of_files_leaves_out_the_fields_that_it_does_not_name(shar):
    first = next(read_shar(files(shar), ManifestOptions()))
    assert first.messages()[0][1] != "context c0"


def test_a_number_as_context_is_its_text_and_an_object_is_none(shar):
    write_field(shar / "context.000000.jsonl.gz", "context", [("c0", 3), ("c1", {"a": 1})])
    found = read_shar(shar, ManifestOptions())
    assert next(found).messages()[0] == ("user", "3")
    with pytest.raises(SettingsError, match=r"line 2: context must be text, got \{"):
        next(found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([("c0", "x")], "has fewer lines than"),
        ([("c0", "x"), ("c1", "x"), ("c2", "x")], "has more lines than"),
        ([("c1", "x"), ("c0", "x")], "line 1: cut_id is 'c1', but the cut of this line is 'c0'"),
        (None, "no such file, and other shards have the field context"),
    ],
)
def test_a_field_that_does_not_go_with_its_cuts_is_named(shar, values, message):
    path = shar / "context.000000.jsonl.gz"
    path.unlink() if values is None else write_field(path, "context", values)
    with pytest.raises(SettingsError, match=message) as caught:
        list(read_shar(shar, ManifestOptions()))
    assert str(path) in str(caught.value)


def test_fields_of_two_voices_belong_to_their_cuts(tmp_path):
    folder = tmp_path / "shar"
    folder.mkdir()
    (cut,) = cuts_of(tmp_path, ["c0"])
    stereo = tmp_path / "agent.wav"
    soundfile.write(stereo, np.stack([np.full(1600, 0.1), np.full(1600, 0.2)], axis=1), RATE)
    cut.custom = {"target_audio": Recording.from_file(stereo)}
    CutSet([cut]).to_shar(folder, {"recording": "wav", "target_audio": "wav"})
    field = "target_audio_channel_selector"
    write_field(folder / f"{field}.000000.jsonl", field, [("c0", 1)])
    (one,) = read_duplex(folder)
    np.testing.assert_allclose(one.target.load(RATE), 0.2, atol=1e-4)


def test_recordings_of_one_id_are_told_apart_by_their_order(tmp_path):
    folder = tmp_path / "shar"
    folder.mkdir()
    CutSet(cuts_of(tmp_path, ["same", "same", "other"])).to_shar(folder, {"recording": "wav"})
    found = list(read_shar(folder, ManifestOptions()))
    assert [len(c.clips[0].load(RATE)) for c in found] == [1600, 3200, 4800]


def test_a_missing_shard_of_cuts_is_named(shar):
    gone = next(iter(sorted(shar.glob("cuts.000001.*"))))
    gone.unlink()
    with pytest.raises(SettingsError, match="cuts.000001.jsonl.gz: no such file beside"):
        list(read_shar(shar, ManifestOptions()))
