"""SHAR is read in every way that NeMo lets it be named, packed whole or in part."""

import gzip
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.duplex.readers import read_duplex
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.readers import read_manifest
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.shar import read_shar
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.settings import SettingsError, build
from tests.data_pipeline import duplex_corpus as corpus

RATE = 16000
SHAR = Path(__file__).parents[1] / "data" / "manifests" / "shar"
FIELDS = {
    "cuts": f"{SHAR}/cuts.{{000000..000001}}.jsonl.gz",
    "recording": [f"{SHAR}/recording.00000{n}.tar" for n in range(2)],
}


def sources(shar_path, **more):
    values = {"shar_path": shar_path, "batch_size": 1, **more}
    config = build(DataLoaderConfig, values, "data.train_ds")
    return read_sources(config, "data.train_ds", SALMDataset.read)


def audio_of(conversations):
    return {c.id: np.concatenate([clip.load(RATE) for clip in c.clips]) for c in conversations}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, wave in expected.items():
        np.testing.assert_array_equal(found[name], wave)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The two shards, each a folder of its own."""
    folders = [tmp_path_factory.mktemp("half") for _ in range(2)]
    for number, folder in enumerate(folders):
        for file in SHAR.glob(f"*.00000{number}.*"):
            shutil.copy(file, folder / file.name)
    return [str(folder) for folder in folders]


@pytest.mark.parametrize("way", ["fields", "folders", "weighted"])
def test_every_way_of_naming_gives_the_same_conversations(way, halves):
    weighted = [[folder, 3 - n] for n, folder in enumerate(halves)]
    named = {"fields": FIELDS, "folders": halves, "weighted": weighted}[way]
    expected = audio_of(read_shar(SHAR, ManifestOptions()))
    found = sources(named)
    assert all(source.is_shar for source in found)
    assert_same(audio_of(c for source in found for c in source.conversations), expected)
    entries = [{"shar_path": named, "type": "lhotse_shar"}]
    inside = sources(None, input_cfg=entries)
    assert [s.share for s in inside] == [s.share for s in found]
    if way == "weighted":
        np.testing.assert_allclose([s.share for s in found], [0.6, 0.4])
    else:
        assert [s.share for s in found] == [None]


def test_weights_of_folders_share_their_entrys_part_whatever_the_temperature(halves):
    entries = [
        {"shar_path": [[halves[0], 1], [halves[1], 4.5]], "weight": 1},
        {"shar_path": halves, "weight": 4},
    ]
    found = sources(None, input_cfg=entries, reweight_temperature=0.5)
    np.testing.assert_allclose([s.share for s in found], [1 / 3 / 5.5, 4.5 / 3 / 5.5, 2 / 3])


@pytest.mark.parametrize(
    ("shar_path", "message"),
    [
        ({"recording": "a.tar"}, "`cuts` are missing"),
        ([["a", 1], "b"], "a weight to every path or to none"),
        ([["a", 0]], "weights must be positive"),
        ([["a", 1, 2]], "shar_path"),
        (3, "shar_path"),
        ({**FIELDS, "recording": "gone.tar"}, "2 files of cuts and 1 of recording"),
        ({**FIELDS, "recording": ["x.tar", "y.tar"]}, "x.tar: no such file"),
        ({"cuts": FIELDS["cuts"]}, "lists no recording; the recording of cut 'u09'"),
        ({"cuts": "pipe:cat cuts.jsonl"}, "pipe:cat cuts.jsonl is not on this machine"),
    ],
)
def test_what_names_no_shar_is_one_line_with_its_reason(shar_path, message):
    with pytest.raises(SettingsError, match="data.train_ds") as caught:
        sources(shar_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_recordings_that_are_not_packed_are_read_in_place(tmp_path):
    from lhotse import CutSet

    cuts = corpus.corpus(tmp_path, 3)
    (tmp_path / "shar").mkdir()
    CutSet.from_cuts(cuts).to_shar(tmp_path / "shar", {}, warn_unused_fields=False)
    manifest = corpus.write_cuts(tmp_path / "cuts.jsonl", cuts)["cuts_path"]
    expected = audio_of(read_manifest(manifest, ManifestOptions()))
    assert_same(audio_of(read_shar(tmp_path / "shar", ManifestOptions())), expected)


def voices(conversations):
    return {
        c.id: np.concatenate([c.source.load(RATE), c.target.load(22050)]) for c in conversations
    }


@pytest.mark.parametrize("way", ["folder", "fields", "folders"])
def test_an_agent_that_is_not_packed_is_read_from_its_recording(way, tmp_path):
    from lhotse import CutSet

    cuts = corpus.corpus(tmp_path, 4)
    manifest = corpus.write_cuts(tmp_path / "cuts.jsonl", cuts)["cuts_path"]
    folder = tmp_path / "shar"
    folder.mkdir()
    packed = CutSet.from_cuts(cuts)
    packed.to_shar(folder, {"recording": "wav"}, shard_size=2, warn_unused_fields=False)
    assert not list(folder.glob("target_audio*"))
    fields = {
        "cuts": tuple(f"{folder}/cuts.00000{n}.jsonl.gz" for n in range(2)),
        "recording": f"{folder}/recording._OP_000000..000001_CL_.tar",
    }
    named = {"folder": str(folder), "fields": fields, "folders": (str(folder),)}[way]
    assert_same(voices(read_duplex(named)), voices(read_duplex(None, [manifest])))


def test_duplex_shar_of_several_folders_and_of_fields_makes_batches(tmp_path):
    whole = corpus.write_shar(tmp_path / "one", corpus.corpus(tmp_path, 4))["shar_path"]
    names = ("cuts", "recording", "target_audio")
    files = {n: str(next(Path(whole).glob(f"{n}.*"))) for n in names}
    for named in (files, [whole], [[whole, 2.0]]):
        module = corpus.module({"input_cfg": [{"type": "lhotse_shar", "shar_path": named}]})
        batches = islice(module.train_batches(), module.batches_per_pass())
        assert len({i for batch in batches for i in batch.ids}) == 4


def test_a_packed_recording_longer_than_its_cut_is_not_truncated_silently(tmp_path):
    import lhotse
    import soundfile

    from speechlm2_jax.data.audio import AudioError

    soundfile.write(tmp_path / "a.wav", np.full(32_000, 0.1, np.float32), 16_000)
    cut = lhotse.Recording.from_file(tmp_path / "a.wav", recording_id="a").to_cut()
    (tmp_path / "shar").mkdir()
    lhotse.CutSet.from_cuts([cut]).to_shar(tmp_path / "shar", fields={"recording": "wav"})
    manifest = tmp_path / "shar" / "cuts.000000.jsonl.gz"
    text = gzip.decompress(manifest.read_bytes()).decode()
    text = text.replace('"duration": 2.0', '"duration": 1.0').replace("32000", "16000")
    manifest.write_bytes(gzip.compress(text.encode()))
    (conversation,) = read_shar(tmp_path / "shar", ManifestOptions())
    with pytest.raises(AudioError, match="declared 1.0 s") as caught:
        conversation.clips[0].load(16_000)
    assert caught.value.cause == "longer_than_declared"
