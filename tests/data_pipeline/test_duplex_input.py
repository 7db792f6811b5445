"""Errors of duplex data and settings are one line with the remedy."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax import settings
from speechlm2_jax.data import DataModule, DuplexS2SDataset, Tokenizer
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.conversations import (
    ChannelIds,
    DialogEvent,
    FrameGrid,
    SpokenTurn,
    text_channel,
)
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.tokenizer import TokenizerError
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline import duplex_corpus as corpus


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    return corpus.write_cuts(folder / "cuts.jsonl", [corpus.cut(folder, f"c{n}") for n in range(4)])


def spoken(folder, *speakers, text="yes", start=0.1):
    """A manifest of one cut per speaker, with turns of that speaker only."""
    cuts = [
        corpus.cut(folder, f"s{n}", 1.0, [(speaker, start, start + 0.5, text)])
        for n, speaker in enumerate(speakers)
    ]
    return corpus.write_cuts(folder / "cuts.jsonl", cuts)


def refused(source, **more) -> str:
    with pytest.raises(SettingsError) as caught:
        corpus.module(source, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("speaker", "nearest"), [("Agent", "agent"), ("assistant", "Assistant")])
def test_a_role_that_is_spelt_otherwise_is_named_with_its_spelling(speaker, nearest, tmp_path):
    message = refused(spoken(tmp_path, "user", speaker, "agent"))
    assert message.startswith("data.train_ds: ")
    assert f"{speaker!r} is in neither data.input_roles ['user', 'User']" in message
    assert f"did you mean {nearest!r}?" in message and "'user' (1 turns)" in message


def test_a_role_of_its_own_is_named_too(tmp_path):
    message = refused(spoken(tmp_path, "agent", "narrator", None))
    assert "'narrator', None is in neither" in message and "None (1 turns)" in message
    assert "data.input_roles matches no speaker" in message


def test_a_model_is_not_trained_where_the_agent_is_mostly_silent(tmp_path):
    half = spoken(tmp_path, "user", "agent", "agent", "user")
    assert corpus.module(half).batches_per_pass() == 2
    (tmp_path / "more").mkdir()
    message = refused(spoken(tmp_path / "more", "user", "agent", "user"))
    assert (
        "in 2 of 3 conversations of an epoch, 's0' for instance, the agent has no text" in message
    )
    assert "data.output_roles ('agent', 'Assistant')" in message


@pytest.mark.parametrize("more", [{"text": "<|3|>  "}, {"start": 400.0}], ids=["no text", "in ms"])
def test_text_that_never_reaches_the_channel_counts_as_silence(more, tmp_path):
    assert "the agent has no text" in refused(spoken(tmp_path, "agent", **more))


def test_the_rule_counts_what_an_epoch_plans_not_what_lies_on_the_disk(tmp_path):
    (tmp_path / "silent").mkdir()
    silent = spoken(tmp_path / "silent", *["user"] * 9)
    entries = [{**silent, "weight": 1}, {**spoken(tmp_path, "agent", "agent"), "weight": 3}]
    corpus.module({"input_cfg": entries})
    unweighted = [{"cuts_path": entry["cuts_path"]} for entry in entries]
    assert "in 9 of 11 conversations" in refused({"input_cfg": unweighted})


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_without_the_agents_recording_is_named(packed, tmp_path):
    one, two = corpus.cut(tmp_path, "one"), replace(corpus.cut(tmp_path, "two"), custom=None)
    write = corpus.write_shar if packed else corpus.write_cuts
    source = write(tmp_path / ("shar" if packed else "cuts.jsonl"), [one, two])
    message = refused(source)
    assert "cut 'two' has no target_audio: a duplex model learns from two recordings" in message
    assert message.startswith("data.train_ds.input_cfg.0: ")


def test_a_channel_that_the_agents_recording_lacks_is_named(tmp_path):
    one = corpus.cut(tmp_path, "one")
    wrong = {**one.custom, "target_audio_channel_selector": 1}
    message = refused(corpus.write_cuts(tmp_path / "c.jsonl", [replace(one, custom=wrong)]))
    assert "cut 'one': target_audio_channel_selector is 1, and the recording has the ch" in message


def test_mixed_cuts_and_addresses_of_the_network_are_refused(tmp_path):
    one, two = corpus.cut(tmp_path, "one"), corpus.cut(tmp_path, "two")
    mixed = one.append(two).with_id("both")
    message = refused(corpus.write_cuts(tmp_path / "mixed.jsonl", [mixed]))
    assert "cut 'both' is mixed of several" in message
    one.target_audio.sources[0].type = "url"
    message = refused(corpus.write_cuts(tmp_path / "far.jsonl", [one]))
    assert "cut one reads audio from a url" in message


def mixed_cut(folder):
    """A user of two stretches and an agent of two, 3 s in all, as JSON."""
    from lhotse import SupervisionSegment
    from lhotse.cut import MixedCut, MixTrack, PaddingCut

    def voice(name, *placed):
        silence = PaddingCut(f"{name}-pad", 3.0, 16000, 0.0, num_samples=48000)
        tracks = [MixTrack(silence, type="PaddingCut")]
        for n, (start, offset) in enumerate(placed):
            turn = SupervisionSegment(f"{name}{n}", "r", 0.1, 0.3, text=f"{name} {n}", speaker=name)
            one = corpus.cut(folder, name, 2.0, []).truncate(offset=start, duration=0.5)
            one = replace(one, id=f"{name}{n}", custom=None, supervisions=[turn])
            tracks.append(MixTrack(one, offset=offset))
        return MixedCut(name, tracks).to_dict()

    user, agent = voice("user", (0.0, 0.25), (1.0, 1.5)), voice("agent", (0.5, 1.0), (0.5, 2.0))
    events = [{"kind": "pause", "start": 0.5, "end": 1}]
    user["tracks"][0]["cut"]["custom"] = {"target_audio": agent, "events": events}
    return user


def test_mixed_cuts_share_recordings(tmp_path):
    row = mixed_cut(tmp_path)
    for voice in (row, row["tracks"][0]["cut"]["custom"]["target_audio"]):
        for track in voice["tracks"][1:]:
            source = track["cut"]["recording"]["sources"][0]
            source["source"] = Path(source["source"]).name  # beside the manifest
    (tmp_path / "mixed.jsonl").write_text(json.dumps(row) + "\n")
    entry = InputConfig(type="lhotse", cuts_path=(str(tmp_path / "mixed.jsonl"),))
    (made,) = DuplexS2SDataset.read(entry, DuplexLoaderConfig(sample_rate=16000, batch_size=1))
    assert [(turn.text, turn.start_s) for turn in made.turns] == [
        *(("user 0", 0.35), ("agent 0", 1.1), ("user 1", 1.6), ("agent 1", 2.1))
    ]
    assert made.events == (DialogEvent(kind="pause", start_s=0.5, end_s=1.0),)
    waves = {name: soundfile.read(tmp_path / f"{name}_user.wav")[0] for name in ("user", "agent")}
    user, agent = made.source.load(16000), made.target.load(16000)
    assert len(user) == len(agent) == 48000
    for wave, placed in ((user, ("user", 16000, 24000)), (agent, ("agent", 8000, 32000))):
        name, start, offset = placed
        expected = waves[name][start : start + 8000]
        np.testing.assert_allclose(wave[offset : offset + 8000], expected, atol=1e-4)
    assert not user[12000:24000].any() and not agent[:16000].any()
    frames = corpus.module({"cuts_path": str(tmp_path / "mixed.jsonl")}).batches_per_pass()
    assert frames == 1, "an index reads it too"


def test_a_cut_without_the_users_recording_is_named(tmp_path):
    silent = replace(corpus.cut(tmp_path, "one"), recording=None)
    message = refused(corpus.write_cuts(tmp_path / "cuts.jsonl", [silent]))
    assert "cut 'one' has no recording: the user's audio" in message


def test_shar_without_the_agents_field_is_named(tmp_path):
    source = corpus.write_shar(tmp_path / "shar", [corpus.cut(tmp_path, "one")])
    (tmp_path / "shar" / "target_audio.000000.tar").unlink()
    assert "target_audio.000000.tar: no such file" in refused(source)


def test_nemo_manifests_are_no_duplex_data(manifest):
    message = refused({"manifest_filepath": "m.jsonl"})
    assert "duplex data are Lhotse cuts with target_audio: give cuts_path or shar_path" in message
    assert "duplex data are" in refused({"input_cfg": [{**manifest, "type": "nemo"}]})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"batch_tokens": 4000},
            "batch_tokens: conversations are measured in seconds; set batch_d",
        ),
        ({"prompt_format": "qwen"}, "prompt_format: a duplex model has no prompt"),
        ({"batch_size": None}, "no batch size: set batch_size, or batch_duration"),
        ({"batch_duration": -1}, "batch_duration must be positive"),
        ({"batch_durations": 1}, "unknown key; did you mean 'batch_duration'"),
        ({"bucket_duration_bins": [2, 1]}, "must be positive and increasing"),
    ],
)
def test_a_bad_setting_is_one_line_with_its_place(more, message, manifest):
    assert message in refused(manifest, **more)


def test_the_frame_of_the_settings_is_the_models(manifest):
    message = refused(manifest, block={**corpus.BLOCK, "frame_length": 0.04})
    assert "data.frame_length: 0.04 s makes 128 frames of 5.12 s, but the model's speech" in message
    assert "about 0.08 s" in message


@pytest.mark.parametrize("key", ["frame_length", "source_sample_rate", "target_sample_rate"])
def test_a_missing_key_of_the_data_block_is_named(key):
    block = {k: v for k, v in corpus.BLOCK.items() if k != key}
    with pytest.raises(SettingsError, match=f"data.{key}: required for a duplex model"):
        DuplexS2SDataset.from_config(block, corpus.TOKENIZER)


def test_settings_that_contradict_the_dataset_are_refused(manifest):
    dataset = DuplexS2SDataset(corpus.TOKENIZER, 0.08, 16000, 22050)
    cfg = {**corpus.BLOCK, "train_ds": {**manifest, "batch_size": 1}}
    with pytest.raises(SettingsError, match=r"data.input_roles: \('user', 'User'\), but the data"):
        DataModule(cfg, corpus.TOKENIZER, dataset)
    DataModule({"train_ds": {**manifest, "batch_size": 1}}, corpus.TOKENIZER, dataset)


def test_a_tokenizer_without_begin_or_end_is_refused():
    tokenizer = Tokenizer("tests/data/llm/qwen3")
    assert tokenizer.bos_id is None
    with pytest.raises(TokenizerError, match="no begin or no end token"):
        DuplexS2SDataset(tokenizer, 0.08, 16000, 22050)


def test_a_turn_that_began_before_its_cut_is_written_from_its_middle_on():
    grid = FrameGrid(frame_length_s=0.08, sample_rate_hz=16000)
    turns = [SpokenTurn(speaker="agent", start_s=-0.16, end_s=0.4, text="abcd")]
    channel = text_channel(
        turns,
        8,
        grid=grid,
        text_to_ids=lambda text: [ord(c) - 87 for c in text],
        ids=ChannelIds(bos=1, eos=2, pad=0),
    )
    assert channel.tolist() == [11, 12, 13, 0, 0, 2, 0, 0]
    past = replace(turns[0], start_s=-0.8, end_s=-0.16)
    ids = ChannelIds(bos=1, eos=2, pad=0)
    assert not text_channel([past], 4, grid=grid, text_to_ids=lambda t: [9], ids=ids).any()


@pytest.mark.parametrize("name", ["s2s_duplex", "s2s_duplex_speech_decoder"])
def test_the_data_blocks_of_nemo_make_batches_unchanged(name, tmp_path):
    facts = Path(__file__).parents[1] / "data" / "from_nemo" / f"{name}.txt"
    lines = [f"+{line}" for line in facts.read_text().splitlines() if line.startswith("data.")]
    cfg = settings.resolve(settings.override({}, lines))["data"]
    shar = corpus.write_shar(tmp_path / "shar", corpus.corpus(tmp_path, 5))["shar_path"]
    cfg["train_ds"]["input_cfg"][0]["shar_path"] = shar
    cfg["validation_ds"]["datasets"]["val_set_0"]["shar_path"] = shar
    dataset = DuplexS2SDataset.from_config(cfg, corpus.TOKENIZER)
    module = DataModule(cfg, corpus.TOKENIZER, dataset)
    module.setup(frame_count=corpus.frames)
    (bucket,) = module.plan().buckets
    assert bucket.shape.sequences == (4 if cfg["train_ds"]["batch_size"] else 100 // bucket.longest)
    batches = islice(module.train_batches(), module.batches_per_pass())
    assert len({name for batch in batches for name in batch.ids}) == 5
    assert len(list(module.validation_batches()["val_set_0"])) == 5
