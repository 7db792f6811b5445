"""Every format tells the same conversations, and what cannot be read is named."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import AudioTurn, TextTurn
from speechlm2_jax.data.cuts import read_cuts
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.paths import expand_shards
from speechlm2_jax.data.readers import read_manifest
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.shar import read_shar
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.settings import SettingsError, build

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
RATE = 16000


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(conversation):
    return [(t.role, t.text if isinstance(t, TextTurn) else t.clip.id) for t in conversation.turns]


def test_a_nemo_manifest_and_lhotse_cuts_of_the_same_data_tell_the_same():
    reading = ManifestOptions(tags={"context": "Say it."})
    nemo = {c.id: c for c in read_manifest(MANIFESTS / "manifest.jsonl", reading)}
    cuts = list(read_manifest(MANIFESTS / "cuts.jsonl.gz", reading))
    assert len(cuts) == 23
    for cut in cuts:
        assert told(cut) == told(nemo[cut.id])
        np.testing.assert_array_equal(cut.clips[0].load(RATE), nemo[cut.id].clips[0].load(RATE))


def test_shar_tells_the_same_as_the_files_it_was_made_from():
    files = {c.id: c for c in read_manifest(MANIFESTS / "cuts.jsonl.gz", ManifestOptions())}
    packed = list(read_shar(MANIFESTS / "shar", ManifestOptions()))
    assert [c.id for c in packed] == [f"u{n:02d}" for n in range(9, 17)]
    for one in packed:
        original = files[one.id].clips[0].load(RATE)
        np.testing.assert_array_equal(one.clips[0].load(RATE), original)


def test_clips_load_as_lhotse_loads_them():
    path = MANIFESTS / "cuts_with_stereo.jsonl.gz"
    for (_, cut), one in zip(read_cuts(path), read_manifest(path, ManifestOptions()), strict=True):
        expected = cut.resample(RATE).load_audio().mean(axis=0)
        np.testing.assert_array_equal(one.clips[0].load(RATE), expected)


def test_cuts_that_only_lhotse_can_load_are_left_to_it(tmp_path):
    from lhotse import CutSet

    first, second = [cut for _, cut in read_cuts(MANIFESTS / "cuts.jsonl.gz")][:2]
    broken = first.append(second).with_id("broken")
    broken.tracks[0].cut.recording.sources[0].source = "/nowhere.flac"
    path = tmp_path / "cuts.jsonl.gz"
    CutSet.from_cuts([second.append(second).with_id("mixed"), broken]).to_file(path)
    mixed, broken = (c.clips[0] for c in read_manifest(path, ManifestOptions()))
    assert len(mixed.load(8000)) == round(2 * second.duration * 8000)
    with pytest.raises(AudioError, match="cut broken"):
        broken.load(RATE)


def test_conversations_keep_their_turns_and_a_context_goes_before_audio_only():
    reading = ManifestOptions(tags={"context": "CTX"})
    told_of = {c.id: told(c) for c in read_manifest(MANIFESTS / "conversations.jsonl", reading)}
    assert "conv-4" not in told_of  # marked _skipme
    assert told_of["conv-1"][:2] == [("user", "CTX"), ("user", "u02")]
    assert told_of["conv-0"][0] == ("user", "Transcribe")
    assert told_of["conv-2"] == [("user", "only text here"), ("assistant", "fine")]
    assert told_of["conv-3"][1] == ("user", "u03_0.250_1.500")


def test_tags_go_before_the_fields_of_a_line_and_a_missing_text_leaves_a_question(tmp_path):
    rows = [
        {"audio_filepath": "a.wav", "duration": 1, "text": "x", "context": "own"},
        {"audio_filepath": "b.wav", "duration": 1},
        {"audio_filepath": "c.wav", "duration": 1, "_skipme": True},
    ]
    path = write(tmp_path / "m.json", *rows)
    first, second = read_manifest(path, ManifestOptions())
    assert told(first) == [("user", "own"), ("user", "a"), ("assistant", "x")]
    assert first.response == "x" and second.response is None
    tags = {"context": "tag", "system_prompt": "sys"}
    first, _ = read_manifest(path, ManifestOptions(tags=tags))
    assert told(first)[:2] == [("system", "sys"), ("user", "tag")]
    assert first.clips[0].path == str(tmp_path / "a.wav")


def test_a_turn_without_a_duration_takes_the_rest_of_the_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.1), 16000)
    turns = [
        {"from": "User", "type": "audio", "value": "a.wav", "offset": 0.25},
        {"from": "User", "type": "audio", "value": "missing.wav"},
        {"from": "Assistant", "value": "yes"},
    ]
    (one,) = read_manifest(write(tmp_path / "c.jsonl", {"conversations": turns}), ManifestOptions())
    assert [c.duration_s for c in one.clips] == [0.75, 0.0]
    assert len(one.clips[0].load(RATE)) == 12000
    with pytest.raises(AudioError) as caught:
        one.clips[1].load(RATE)
    assert caught.value.cause == "missing"


GOOD = {"audio_filepath": "a.wav", "duration": 1.0, "text": "x"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "the manifest is empty"),
        ("{\n", "line 1: not JSON"),
        ("[1]\n", "not a JSON object"),
        (
            json.dumps(GOOD) + "\n" + json.dumps({"audio_file": "b.wav"}),
            "line 2: audio_filepath is",
        ),
        (json.dumps({"audio_filepath": "b.wav", "sampling_rate": 8000}), "line 1: duration is"),
        (json.dumps({**GOOD, "duration": "1 s"}), "line 1: duration must be seconds"),
        (json.dumps({**GOOD, "offset": -1}), "line 1: offset must be seconds"),
        (json.dumps({**GOOD, "audio_filepath": "ftp://x/a.wav"}), "ftp:// is not supported"),
        (json.dumps({"conversations": [{"from": "User"}]}), "line 1: not a conversation"),
        (json.dumps({"conversations": []}), "line 1: conversations must be a list"),
        (json.dumps({"id": "x", "type": "MonoCut"}), "not Lhotse cuts"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, lines, message):
    path = tmp_path / "m.jsonl"
    path.write_text(lines)
    with pytest.raises(SettingsError, match=message) as caught:
        list(read_manifest(path, ManifestOptions()))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/m.jsonl", "s3://bucket/m.jsonl"])
def test_a_manifest_that_is_not_there_is_named(path):
    with pytest.raises(SettingsError, match=path):
        list(read_manifest(path, ManifestOptions()))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("command", "reads audio from a command"), ("url", "ftp:// is not supported")],
)
def test_cuts_of_commands_and_unknown_schemes_are_refused(tmp_path, kind, message):
    with gzip.open(MANIFESTS / "cuts.jsonl.gz", "rt") as file:
        row = json.loads(file.readline())
    row["recording"]["sources"][0] |= {"type": kind, "source": "ftp://somewhere/a.wav"}
    with pytest.raises(SettingsError, match=message):
        list(read_manifest(write(tmp_path / "cuts.jsonl", row), ManifestOptions()))


def test_shards_expand_in_both_spellings():
    assert expand_shards("m_{0..2}.json") == ["m_0.json", "m_1.json", "m_2.json"]
    assert expand_shards("a__OP_08..10_CL_.json") == [f"a_{n}.json" for n in ("08", "09", "10")]
    assert expand_shards(("x.json", "y{0..1}.json")) == ["x.json", "y0.json", "y1.json"]


def sources(*entries, **more):
    values = {"input_cfg": list(entries), "batch_size": 1, **more}
    return read_sources(
        build(DataLoaderConfig, values, "data.train_ds"), "data.train_ds", SALMDataset.read
    )


NEMO = {"manifest_filepath": str(MANIFESTS / "manifest.jsonl")}
CUTS = {"cuts_path": str(MANIFESTS / "cuts.jsonl.gz")}


@pytest.mark.parametrize("type", ["lhotse_as_conversation", "lhotse", "nemo"])
def test_types_that_mean_the_same_read_the_same(type):
    (source,) = sources({**CUTS, "type": type})
    assert len(source.conversations) == 23 and source.share is None


def test_groups_pass_their_settings_down_and_weights_multiply():
    group = {
        "type": "group",
        "weight": 3,
        "tags": {"context": "outer", "lang": "en"},
        "audio_locator_tag": "<a>",
        "input_cfg": [{**NEMO, "weight": 1}, {**CUTS, "weight": 1, "tags": {"context": "inner"}}],
    }
    first, second, third = sources(group, {**NEMO, "weight": 1})
    np.testing.assert_allclose([s.share for s in (first, second, third)], [0.375, 0.375, 0.25])
    assert isinstance(first.conversations[1].turns[0], AudioTurn)  # a group's context is no turn
    assert second.conversations[1].turns[0] == TextTurn(role="user", text="inner")
    assert second.conversations[1].fields["context"] == "outer"
    tags = [t.locator_tag for t in second.conversations[0].turns if isinstance(t, AudioTurn)]
    assert tags == ["<a>"] and second.conversations[0].fields["lang"] == "en"


def test_entries_may_be_a_file_of_their_own(tmp_path):
    path = tmp_path / "inputs.yaml"
    path.write_text(f"- type: nemo\n  manifest_filepath: {NEMO['manifest_filepath']}\n")
    values = {"input_cfg": str(path), "batch_size": 1}
    (source,) = read_sources(build(DataLoaderConfig, values), "data", SALMDataset.read)
    assert len(source.conversations) == 24


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**NEMO, "wieght": 1}, "did you mean 'weight'"),
        ({**NEMO, "type": "multi_speaker_simulator"}, "type: 'multi_speaker_simulator': mixtures"),
        ({**NEMO, "type": "nmeo"}, "unknown type 'nmeo'"),
        ({**NEMO, **CUTS}, "exactly one of cuts_path"),
        ({}, "exactly one of cuts_path"),
        ({**NEMO, "weight": 0}, "weight must be positive"),
        ({**CUTS, "tarred_audio_filepaths": "a.tar"}, "give manifest_filepath with it"),
        ({"manifest_filepath": "/nowhere.jsonl"}, "input_cfg.0: /nowhere.jsonl: no such file"),
        ({"type": "group", **NEMO}, "type: group"),
    ],
)
def test_a_wrong_entry_is_named_with_its_place(entry, message):
    with pytest.raises(SettingsError, match=message) as caught:
        sources(entry)
    assert "data.train_ds.input_cfg.0" in str(caught.value)


def test_weights_are_given_to_all_neighbours_or_none():
    with pytest.raises(SettingsError, match="to every entry or to none"):
        sources({**NEMO, "weight": 1}, CUTS)
