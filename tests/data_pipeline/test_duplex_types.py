"""NeMo's other layouts of two voices: overlapping segments, swapped roles, speech synthesis."""

import random

import numpy as np
import pytest

from speechlm2_jax.settings import SettingsError
from tests.data_pipeline import duplex_corpus as corpus
from tests.data_pipeline.small_corpus import refusal, wav_bytes, write_lines, write_tar

OVERLAP, REVERSE = "s2s_duplex_overlap_as_s2s_duplex", "s2s_duplex_reverse_role"
CONTINUATION, TO_DUPLEX = "lhotse_magpietts_data_as_continuation", "nemo_tarred_to_duplex"
RATE = 16000


def read(entry, **more):
    from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
    from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
    from speechlm2_jax.data.sources import read_sources
    from speechlm2_jax.settings import build

    values = {"input_cfg": [entry], "batch_size": 1, "sample_rate": RATE, **more}
    config = build(DuplexLoaderConfig, values, "data.train_ds")
    (source,) = read_sources(config, "data.train_ds", DuplexS2SDataset.read)
    return source.conversations


def wrong(entry):
    with pytest.raises(SettingsError) as caught:
        read(entry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spoken(conversation):
    return [(t.speaker, round(t.start_s, 6), round(t.end_s, 6), t.text) for t in conversation.turns]


def write(folder, cuts, packed):
    if packed:
        return corpus.write_shar(folder / "shar", cuts)
    return corpus.write_cuts(folder / "cuts.jsonl.gz", cuts)


def with_segments(folder, name, agent, user):
    keys = ("start", "end", "text")
    made = corpus.cut(folder, name)
    for key, rows in (("agent_segments", agent), ("user_segments", user)):
        made.custom[key] = [dict(zip(keys, row, strict=True)) for row in rows]
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_overlapping_segments_become_turns_in_order(tmp_path, packed):
    cuts = [
        with_segments(tmp_path, "a", [(0.4, 0.9, "A"), (0.1, 0.2, "B")], [(0.3, 0.6, "C")]),
        with_segments(tmp_path, "b", [(0.5, 0.6, "D")], [(0.2, 0.5, "E")]),
        with_segments(tmp_path, "c", [], []),
    ]
    entry = {"type": OVERLAP, **write(tmp_path, cuts, packed)}
    first, second, third = read(entry)
    turns = [("agent", 0.1, 0.2, "B"), ("user", 0.3, 0.6, "C"), ("agent", 0.4, 0.9, "A")]
    assert spoken(first) == turns and not third.turns
    entry |= {"move_agent_text_back_by": 0.4, "filter_samples_starting_with_agent": True}
    assert read(entry) == []
    (kept,) = read({**entry, "move_agent_text_back_by": 0.25})
    assert spoken(kept) == [("user", 0.2, 0.5, "E"), ("agent", 0.25, 0.6, "D")]
    del cuts[0].custom["user_segments"]
    entry = {"type": OVERLAP, **corpus.write_cuts(tmp_path / "x.jsonl.gz", cuts)}
    assert "line 1: cut 'a': user_segments is missing" in wrong(entry)


@pytest.mark.parametrize("packed", [False, True])
def test_roles_are_swapped_with_their_recordings(tmp_path, packed):
    made = corpus.cut(tmp_path, "a", 1.0, [("User", 0, 0.5, "hi"), ("narrator", 0, 1, "x")])
    made.supervisions += corpus.cut(tmp_path, "a", 1.0, [("Assistant", 0.5, 1, "ok")]).supervisions
    source = write(tmp_path, [made], packed)
    (plain,), (swapped,) = read({**source}), read({"type": REVERSE, **source})
    turns = [("agent", 0.0, 0.5, "hi"), ("narrator", 0.0, 1.0, "x"), ("user", 0.5, 1.0, "ok")]
    assert spoken(swapped) == turns
    assert swapped.sample_rate_hz == 22050 and swapped.duration_s == 1.0
    for rate_hz in (RATE, 22050):
        for one, other in ((swapped.source, plain.target), (swapped.target, plain.source)):
            np.testing.assert_array_equal(one.load(rate_hz), other.load(rate_hz))
    named = {"agent_roles": ["NARRATOR"], "user_roles": [], "target_user_name": "caller"}
    (one,) = read({"type": REVERSE, **source, **named})
    assert [t.speaker for t in one.turns] == ["User", "caller", "Assistant"]


def test_a_longer_agent_becomes_the_length_of_swapped_roles(tmp_path):
    made = corpus.cut(tmp_path, "a", 1.0, agent_s=1.5)
    (one,) = read({"type": REVERSE, **corpus.write_cuts(tmp_path / "cuts.jsonl.gz", [made])})
    assert (one.duration_s, one.source.duration_s, one.target.duration_s) == (1.5, 1.5, 1.0)
    assert len(one.source.load(22050)) == 33075


def synthesis(folder, name, speaker="alice", score=(), **custom):
    """A cut of speech synthesis: text, `target_audio`, and scores of its supervision."""
    made = corpus.cut(folder, name, 1.0, [(speaker, 0.0, 1.0, f"text of {name}")])
    made.supervisions[0].custom = dict(score)
    made.custom |= custom
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_speech_synthesis_becomes_an_agent_beside_a_silent_user(tmp_path, packed):
    cuts = [synthesis(tmp_path, "a"), synthesis(tmp_path, "b")]
    entry = {"type": CONTINUATION, **write(tmp_path, cuts, packed)}
    one, _ = read(entry)
    assert one.id == "a_source"
    assert spoken(one) == [("user", 0.0, 0.08, "dummy text"), ("agent", 0.0, 0.92, "text of a")]
    assert one.sample_rate_hz == 22050 and one.duration_s == 1.0
    silence, speech = one.source.load(22050), one.target.load(22050)
    assert len(silence) == len(speech) == 22050 and not silence.any() and speech.any()
    entry |= {"add_extra_end_silence": True, "extra_end_silence_range": [0.5, 0.7]}
    first, second = read(entry, shard_seed=7)
    again, _ = read(entry, shard_seed=7)
    added = random.Random("7 a").uniform(0.5, 0.7)
    assert first.duration_s == again.duration_s == 1.0 + added != second.duration_s
    turns = [(0.0, 0.08 + added), (0.0, 1.92 + added)]
    np.testing.assert_allclose([(t.start_s, t.end_s) for t in first.turns], turns)
    longer = first.target.load(22050)
    assert len(longer) == len(first.source.load(22050)) == round((1 + added) * 22050)
    np.testing.assert_array_equal(longer[:22050], speech)
    assert not longer[22050:].any()


def test_scores_leave_cuts_of_speech_synthesis_out(tmp_path, caplog):
    low = {"context_speaker_similarity": 0.5}
    cuts = [
        synthesis(tmp_path, "fine", score={"cer": 0.03, "context_speaker_similarity": 0.6}),
        synthesis(tmp_path, "cer", score={"cer": 0.04}),
        synthesis(tmp_path, "similarity", score=low),
        synthesis(tmp_path, "status", validation_status="fail"),
        synthesis(tmp_path, "bob", speaker="bob"),
    ]
    entry = {"type": CONTINUATION, **corpus.write_cuts(tmp_path / "cuts.jsonl.gz", cuts)}
    assert [c.id for c in read(entry)] == ["fine_source", "bob_source"]
    assert "max_cer: 1, min_context_speaker_similarity: 1, validation_status: 1" in caplog.text
    more = {"max_cer": 0.1, "min_context_speaker_similarity": 0.1, "target_speaker": "ali"}
    kept = [c.id.removesuffix("_source") for c in read({**entry, **more})]
    assert kept == ["fine", "cer", "similarity"]


@pytest.mark.parametrize(
    ("silence", "total", "agent"),
    [(None, 0.5, (0.42, 0.5)), (-0.25, 0.5, (0.25, 0.5)), (1.0, 1.5, (0.5, 1.5))],
)
def test_transcribed_recordings_get_an_agent_who_stays_silent(tmp_path, silence, total, agent):
    tar = write_tar(tmp_path / "audio_0.tar", [("a.wav", wav_bytes(0.5))])
    row = {"audio_filepath": "a.wav", "duration": 0.5, "text": "hi"}
    path = write_lines(tmp_path / "manifest_0.jsonl", row)
    entry = {"type": TO_DUPLEX, "manifest_filepath": path, "tarred_audio_filepaths": tar}
    (one,) = read({**entry, "agent_silence_duration": silence})
    assert spoken(one) == [("user", 0.0, 0.5, "hi"), ("agent", *agent, "")]
    source, target = one.source.load(RATE), one.target.load(22050)
    assert len(source) == round(total * RATE) and len(target) == round(total * 22050)
    np.testing.assert_allclose(source[:8000], 0.1, atol=1e-4)
    assert not source[8000:].any() and not target.any() and one.duration_s == total
    batch = next(corpus.module({"input_cfg": [entry]}, batch_size=1).train_batches())
    assert batch.ids == ("a.wav",)  # a silent agent is what this type is for


def test_types_of_two_voices_and_of_one_are_told_apart(tmp_path):
    cuts = corpus.write_cuts(tmp_path / "cuts.jsonl.gz", [corpus.cut(tmp_path, "a")])
    assert "conversations of two voices, for duplex models" in refusal({"type": REVERSE, **cuts})
    path = write_lines(tmp_path / "m.jsonl", {"audio_filepath": "a.wav"})
    for entry in ({"type": "txt", "paths": path}, {"manifest_filepath": path}):
        assert "duplex data are Lhotse cuts with target_audio" in wrong(entry)


def test_groups_of_cuts_are_read_as_the_type_around_them(tmp_path):
    cuts = corpus.write_cuts(tmp_path / "cuts.jsonl.gz", [corpus.cut(tmp_path, "a")])
    inside = [{"type": "lhotse", **cuts}]
    (one,) = read({"type": REVERSE, "target_agent_name": "bot", "input_cfg": inside})
    assert [turn.speaker for turn in one.turns] == ["bot", "user"]
