"""Lhotse cuts of dialogs and of questions, packed and in files, and groups read as a type."""

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.data_pipeline.small_corpus import (
    read_input_cfg,
    refusal,
    turns,
    wav_bytes,
    write_lines,
    write_tar,
)

RATE = 16000
TURNS = [
    ("User", 0.0, 0.5, "hi"),
    ("assistant", 0.5, 0.5, "<|1|> hello  <|4|> you"),
    ("user", 0.75, 0.5, "more"),
    ("Agent", 1.25, 0.25, "no"),
]


@pytest.fixture
def cut(tmp_path):
    """A cut of 1.5 s, from 0.5 s of its file on; each sample is its time."""
    from lhotse import MonoCut, Recording, SupervisionSegment

    soundfile.write(tmp_path / "a.wav", np.arange(2 * RATE) / (4 * RATE), RATE, subtype="FLOAT")

    def make(name="cut", spoken=TURNS, **custom):
        recording = Recording.from_file(tmp_path / "a.wav")
        segments = [
            SupervisionSegment(f"{name}-{n}", recording.id, start, duration, text=text, speaker=who)
            for n, (who, start, duration, text) in enumerate(spoken)
        ]
        return MonoCut(
            id=name,
            start=0.5,
            duration=1.5,
            channel=0,
            recording=recording,
            supervisions=segments,
            custom=custom or None,
        )

    return make


def write(folder, *cuts, packed=False):
    from lhotse import CutSet

    cuts = CutSet.from_cuts(cuts)
    if not packed:
        cuts.to_file(folder / "cuts.jsonl.gz")
        return {"cuts_path": str(folder / "cuts.jsonl.gz")}
    (folder / "shar").mkdir()
    cuts.to_shar(folder / "shar", {"recording": "wav"})
    return {"shar_path": str(folder / "shar")}


S2S = {"type": "s2s_as_conversation"}


@pytest.mark.parametrize("packed", [False, True])
def test_each_supervision_of_a_dialog_is_a_turn(tmp_path, cut, packed):
    entry = {**S2S, **write(tmp_path, cut(system_prompt="own"), packed=packed)}
    (source,) = read_input_cfg({**entry, "tags": {"context": "tag"}})
    (one,) = source.conversations
    assert turns(one) == [
        ("system", "own"),
        ("user", "tag"),
        ("user", "cut-0"),
        ("assistant", "hello you"),
        ("user", "cut-2"),
        ("assistant", "no"),
    ]
    waves = [clip.load(RATE) for clip in one.clips]
    assert [len(wave) for wave in waves] == [8000, 8000]
    np.testing.assert_allclose([wave[0] for wave in waves], [0.125, 0.3125], atol=1e-4)


def test_cuts_that_only_lhotse_can_load_are_cut_by_it(tmp_path, cut):
    part = cut().perturb_speed(1.0).perturb_volume(0.5)
    (source,) = read_input_cfg({**S2S, **write(tmp_path, part)})
    wave = source.conversations[0].clips[1].load(RATE)
    assert len(wave) == 8000
    np.testing.assert_allclose(wave[0], 0.15625, atol=1e-3)


def test_the_channel_of_a_turn_is_that_of_its_supervision(tmp_path, cut):
    from lhotse import MultiCut, Recording, SupervisionSegment

    both = np.stack([np.full(RATE, 0.1), np.full(RATE, 0.3)], axis=1)
    soundfile.write(tmp_path / "two.wav", both, RATE)
    recording = Recording.from_file(tmp_path / "two.wav")
    segments = [
        SupervisionSegment("u", recording.id, 0.0, 0.5, channel=1, speaker="user", text="a"),
        SupervisionSegment("v", recording.id, 0.5, 0.5, channel=[0, 1], speaker="user", text="b"),
        SupervisionSegment("a", recording.id, 0.5, 0.5, channel=0, speaker="agent", text="c"),
    ]
    two = MultiCut("two", 0.0, 1.0, [0, 1], recording=recording, supervisions=segments)
    (source,) = read_input_cfg({**S2S, **write(tmp_path, two)})
    found = [clip.load(RATE).mean() for clip in source.conversations[0].clips]
    np.testing.assert_allclose(found, [0.3, 0.2], atol=1e-4)


def test_dialogs_of_other_speakers_are_left_out_and_roles_can_be_named(tmp_path, cut, caplog):
    caplog.set_level(logging.WARNING)
    other = cut("other", [("caller", 0.0, 0.5, "a"), ("clerk", 0.5, 0.5, "<|2|>  b")])
    entry = {**S2S, **write(tmp_path, cut(), other)}
    (source,) = read_input_cfg(entry)
    assert [c.id for c in source.conversations] == ["cut"]
    assert "1 dialogs are left out, as a speaker is neither in input_roles" in caplog.text
    assert "caller in " in caplog.text
    roles = {"input_roles": ["caller"], "output_roles": ["clerk"], "strip_timestamp_tokens": False}
    (source,) = read_input_cfg({**entry, **roles})
    assert turns(source.conversations[0]) == [("user", "other-0"), ("assistant", "<|2|>  b")]


def test_dialogs_that_are_read_as_one_recording_are_warned_of(tmp_path, cut, caplog):
    caplog.set_level(logging.WARNING)
    (source,) = read_input_cfg(write(tmp_path, cut(), cut("two", TURNS[:1]), cut("three")))
    assert [c.response for c in source.conversations] == ["hi"] * 3
    (message,) = caplog.messages
    assert "2 cuts have several supervisions" in message and "s2s_as_conversation" in message
    assert "cuts.jsonl.gz line 1, " in message


def test_the_first_rows_of_a_large_manifest_tell_that_cuts_are_dialogs(tmp_path, cut, caplog):
    from speechlm2_jax.data.cuts import warn_of_dialogs

    path = Path(write(tmp_path, cut("one", TURNS[:1]), cut("two"), cut("three"))["cuts_path"])
    warn_of_dialogs(path, 1)
    assert not caplog.messages
    warn_of_dialogs(path, 2)
    (message,) = caplog.messages
    assert f"{path}: 1 cuts have several supervisions" in message and "line 2)" in message


def test_a_nemo_manifest_has_no_speakers(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "duration": 1})
    assert "m.jsonl line 1: a NeMo manifest has no speakers" in refusal(
        {**S2S, "manifest_filepath": path}
    )


KEY = "answer"
SQA = {"type": "sqa_as_conversation"}
ASKED = [("user", "what?"), ("user", "a"), ("assistant", "a tone")]


def question(**more):
    return {"audio_filepath": "a.wav", "duration": 0.5, "question": "what?", **more}


def test_questions_about_a_recording(tmp_path, cut):
    soundfile.write(tmp_path / "a.wav", np.full(8000, 0.1), RATE)
    given = {KEY: "a tone"}
    path = write_lines(tmp_path / "m.jsonl", question(text="unused", **given), question(**given))
    entry = {**SQA, "manifest_filepath": path}
    (source,) = read_input_cfg(entry)
    assert [turns(c) for c in source.conversations] == [ASKED, ASKED]
    (source,) = read_input_cfg({**entry, "tags": {"context": "c", "question": "tag?"}})
    assert turns(source.conversations[0])[:2] == [("user", "c"), ("user", "tag?")]
    (source,) = read_input_cfg({**SQA, **write(tmp_path, cut(question="q", **{KEY: "r"}))})
    assert turns(source.conversations[0]) == [("user", "q"), ("user", "cut"), ("assistant", "r")]
    write_lines(tmp_path / "m.jsonl", question(**given), question())
    assert f"line 2: {KEY} is missing" in refusal(entry)


def test_questions_about_recordings_in_tars(tmp_path):
    tar = write_tar(tmp_path / "audio_0.tar", [("a.wav", wav_bytes(0.5))])
    path = write_lines(tmp_path / "manifest_0.jsonl", question(**{KEY: "a tone"}))
    (source,) = read_input_cfg({**SQA, "manifest_filepath": path, "tarred_audio_filepaths": tar})
    expected = [("user", "what?"), ("user", "a.wav"), ("assistant", "a tone")]
    assert turns(source.conversations[0]) == expected


def test_entries_inside_a_type_are_read_as_it_with_its_tags(tmp_path, cut):
    cuts = write(tmp_path, cut(question="q", **{KEY: "r"}))
    path = write_lines(tmp_path / "m.jsonl", question(sampling_rate=RATE, **{KEY: "a tone"}))
    plain = {"type": "lhotse", **cuts, "weight": 1, "tags": {"context": "inner", "lang": "en"}}
    grouped = {"type": "group", "weight": 3, "tags": {"question": "group?"}}
    grouped["input_cfg"] = [{"type": "nemo", "manifest_filepath": path, "tags": {"context": "own"}}]
    outer = {**SQA, "tags": {"context": "outer"}, "input_cfg": [plain, grouped]}
    first, second = read_input_cfg(outer)
    np.testing.assert_allclose([first.share, second.share], [0.25, 0.75])
    asked = [("user", "outer"), ("user", "q"), ("user", "cut"), ("assistant", "r")]
    assert turns(first.conversations[0]) == asked
    assert first.conversations[0].fields["lang"] == "en"
    assert turns(second.conversations[0])[:2] == [("user", "outer"), ("user", "group?")]
    roles = {"input_roles": ["User", "user"], "output_roles": ["assistant", "Agent"]}
    inside = {"type": "lhotse", **cuts}
    (source,) = read_input_cfg({**S2S, **roles, "input_cfg": [inside]})
    assert len(source.conversations[0].clips) == 2
    wrong = {**S2S, "input_cfg": [{"type": "txt", "paths": path}]}
    message = refusal(wrong)
    assert "input_cfg.0.input_cfg.0.type: 'txt' cannot be read as 's2s_as_conversation'" in message
