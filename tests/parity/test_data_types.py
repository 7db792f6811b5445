"""Every data type gives the conversations that NeMo 3.0.0's parsers of `input_cfg` give.

`types.json` holds files, tars of recordings, entries, and what NeMo read of them in one pass.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import TextTurn
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.data.input_config import DUPLEX_TYPES
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.settings import build

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
GOLDEN = json.loads((MANIFESTS / "types.json").read_text())
RATE = 16000
SUM_ATOL = 1e-2
"""Of absolute samples; the golden has three decimals."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("types")
    shutil.copytree(MANIFESTS / "audio", folder / "audio")
    for name, text in GOLDEN["files"].items():
        (folder / name).write_text(text)
    for name, members in GOLDEN["tars"].items():
        with tarfile.open(folder / name, "w") as tar:
            for member, recording in members:
                tar.add(folder / "audio" / f"{recording}.flac", arcname=member)
    return folder


def read(entry, kind, dataset):
    values = {"input_cfg": [entry], "batch_size": 1, "shard_seed": 42}
    (source,) = read_sources(build(kind, values, "data"), "data", dataset.read)
    return source.conversations


def assert_audio(clip, expected, rate_hz=RATE):
    wave, (samples, total) = clip.load(rate_hz), expected
    assert len(wave) == samples
    np.testing.assert_allclose(np.abs(wave).sum(), total, atol=SUM_ATOL)


def named(expected, own):
    """NeMo calls each segment of a member by the member's name; here each has its row's."""
    is_segment = "-sub" in own and own.partition("-sub")[0] == expected.partition(".")[0]
    return own if is_segment else expected


@pytest.mark.parametrize(
    "name", [name for name, entry in GOLDEN["entries"].items() if entry["type"] not in DUPLEX_TYPES]
)
def test_conversations_equal_nemo(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    found = read(GOLDEN["entries"][name], DataLoaderConfig, SALMDataset)
    for one, expected in zip(found, GOLDEN["results"][name], strict=True):
        if "id" in expected:
            assert one.id == named(expected["id"], one.id)
        for turn, (role, content) in zip(one.turns, expected["turns"], strict=True):
            assert turn.role == role
            if isinstance(turn, TextTurn):
                assert turn.text == (content.rstrip("\n") if name == "txt" else content)
            else:
                assert turn.clip.id == named(content["id"], turn.clip.id)
                assert turn.clip.duration_s == pytest.approx(content["duration"], abs=1e-6)
                assert_audio(turn.clip, content["audio"])


@pytest.mark.parametrize(
    "name", [name for name, entry in GOLDEN["entries"].items() if entry["type"] in DUPLEX_TYPES]
)
def test_conversations_of_two_voices_equal_nemo(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    found = read(GOLDEN["entries"][name], DuplexLoaderConfig, DuplexS2SDataset)
    for one, expected in zip(found, GOLDEN["results"][name], strict=True):
        assert one.id == named(expected["id"], one.id)
        assert one.duration_s == pytest.approx(expected["duration"], abs=1e-6)
        turns = [[t.speaker, t.start_s, t.end_s, t.text] for t in one.turns]
        for turn, theirs in zip(turns, expected["turns"], strict=True):
            assert [turn[0], turn[3]] == [theirs[0], theirs[3]]
            np.testing.assert_allclose(turn[1:3], theirs[1:3], atol=1e-4)
        assert_audio(one.source, expected["source"])
        assert_audio(one.target, expected["target"])
