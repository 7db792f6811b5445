"""Audio swapped between utterances: none keeps its own text, and the swap is deterministic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechlm2_jax.data.conversations import AudioClip, AudioTurn, TextTurn
from speechlm2_jax.evaluation.controls import control_inputs
from speechlm2_jax.evaluation.dialogs import EvaluatedDialog
from speechlm2_jax.evaluation.swap_audio import swap_audio
from speechlm2_jax.settings import SettingsError
from tests.evaluation.page_case import utterance


def _utterances(texts):
    return [utterance(f"u{n}", 1.0 + n, text, voice=f"v{n}") for n, text in enumerate(texts)]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40))
def test_no_utterance_keeps_its_text_and_every_recording_is_used_once(texts):
    utterances = _utterances(texts)
    texts_by_id = {u.id: u.text for u in utterances}
    if max(texts.count(t) for t in texts) > len(texts) // 2:
        with pytest.raises(SettingsError, match="swap_audio: needs"):
            swap_audio(utterances, str)
        return
    swapped = swap_audio(utterances, str)
    assert [(u.id, u.text) for u in swapped] == list(texts_by_id.items())
    assert all(texts_by_id[u.audio_of] != u.text for u in swapped)
    assert sorted(u.audio_of for u in swapped) == sorted(texts_by_id)


def test_audio_length_and_voice_are_those_of_the_other_recording():
    utterances = _utterances("abcd")
    by_id = {u.id: u for u in utterances}
    for one in swap_audio(utterances, str):
        other = by_id[one.audio_of]
        assert (one.duration_s, one.voice) == (other.duration_s, other.voice)
        np.testing.assert_array_equal(one.read(8000), other.read(8000))


def test_texts_that_are_scored_as_equal_count_as_equal():
    utterances = _utterances(["One", "one", "two", "Two"])
    for one in swap_audio(utterances, str.lower):
        other = next(u for u in utterances if u.id == one.audio_of)
        assert other.text.lower() != one.text.lower()


def test_the_swap_is_the_same_every_time():
    first = swap_audio(_utterances("abcdefg"), str)
    assert [u.audio_of for u in swap_audio(_utterances("abcdefg"), str)] == [
        u.audio_of for u in first
    ]


def test_utterances_without_a_reference_are_left_out():
    swapped = swap_audio(_utterances(["a", None, "b"]), str)
    assert [(u.id, u.audio_of) for u in swapped] == [("u0", "u2"), ("u2", "u0")]
    with pytest.raises(SettingsError, match="two or more utterances with references"):
        swap_audio(_utterances([None, "a"]), str)


KINDS = ("transcribe", "spell", "form")


def _dialogs(recordings, kinds=KINDS, each=1):
    """A row for each recording and kind of instruction; texts differ in all rows."""

    def turns(name, kind):
        clip = AudioClip(id=name, path=f"{name}.wav", duration_s=2.0)
        audio = [AudioTurn(role="user", clip=clip)] * each
        return (TextTurn(role="user", text=kind), *audio)

    return [
        utterance(
            f"{name}-{kind}", 2.0, f"{kind} {name}", dialog=EvaluatedDialog(turns=t, fields={})
        )
        for name in recordings
        for kind in kinds
        for t in [turns(name, kind)]
    ]


def test_a_conversation_keeps_its_turns_and_gets_another_recording():
    dialogs = _dialogs([f"r{n}" for n in range(20)])
    mixed = [*_utterances("abcd"), *dialogs]
    by_id = {u.id: u for u in mixed}
    swapped = swap_audio(mixed, str)
    assert [u.id for u in swapped] == [u.id for u in mixed]
    for one in swapped[4:]:
        own, other = by_id[one.id].dialog, by_id[one.audio_of].dialog
        assert one.dialog.turns[0] == own.turns[0] and one.text == by_id[one.id].text
        assert one.dialog.clips == other.clips != own.clips
    assert all(one.dialog is None for one in swapped[:4])


def test_a_conversation_of_two_recordings_has_no_swapped_audio():
    dialogs = _dialogs("ab", each=2)
    with pytest.raises(SettingsError, match="conversations with one recording"):
        swap_audio(dialogs, str)
    assert set(control_inputs(dialogs, "basic")) == {"silent"}
    both = control_inputs([*dialogs, *_dialogs("cd")], "basic")
    first = len(dialogs)
    assert list(both["swapped"]) == [*range(first, first + 6)] and len(both["silent"]) == first + 6
