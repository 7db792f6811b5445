"""Truncation, windows and padding of two voices: recordings and turns stay alongside."""

import numpy as np
import pytest

from speechlm2_jax.data.augmentation.config import AugmentationConfig
from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.data.duplex.conversations import DuplexConversation, SpokenTurn
from speechlm2_jax.data.duplex.variants import at_place, with_variants
from tests.data_pipeline.duplex_corpus import cut, module, rows, write_cuts

TURNS = [
    ("user", 0.2, 0.8, "hi"),
    ("agent", 0.9, 1.5, "yes of course"),
    ("user", 1.6, 2.4, "no"),
    ("agent", 2.5, 3.1, "fine"),
]


def dialog(seconds=3.2, turns=TURNS):
    clip = AudioClip(id="d", path="d.wav", duration_s=seconds, is_segment=False)
    spoken = [SpokenTurn(speaker=s, start_s=a, end_s=b, text=t) for s, a, b, t in turns]
    return DuplexConversation(
        id="d",
        duration_s=seconds,
        sample_rate_hz=16000,
        source=clip,
        target=clip,
        turns=tuple(spoken),
    )


def made(**keys):
    return with_variants([dialog()], AugmentationConfig(**keys))


def times(conversation):
    return [(t.text, round(t.start_s, 6), round(t.end_s, 6)) for t in conversation.turns]


def lhotse_cut():
    from lhotse import MonoCut, SupervisionSegment
    from lhotse.testing.dummies import dummy_recording

    spoken = [
        SupervisionSegment(f"s{n}", "r", a, round(b - a, 6), text=text, speaker=who)
        for n, (who, a, b, text) in enumerate(TURNS)
    ]
    recording = dummy_recording(0, duration=3.2)
    return MonoCut("d", 0.0, 3.2, channel=0, recording=recording, supervisions=spoken)


def times_of_cut(cut):
    return [(s.text, round(s.start, 6), round(s.end, 6)) for s in cut.supervisions]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["start", "end"])
def test_a_truncated_conversation_has_lhotses_turns(keep, kind):
    (part,) = made(
        truncate_duration=2.0, truncate_offset_type=kind, keep_excessive_supervisions=keep
    )
    start = 0.0 if kind == "start" else 3.2 - 2.0
    expected = lhotse_cut().truncate(offset=start, duration=2.0, keep_excessive_supervisions=keep)
    assert times(part) == times_of_cut(expected) and part.duration_s == 2.0
    for clip in (part.source, part.target):
        assert (clip.offset_s, clip.duration_s) == (pytest.approx(start), 2.0)


@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
def test_a_random_stretch_has_the_turns_of_its_place(place):
    (part,) = made(truncate_duration=2.0)
    placed = at_place(part, place)
    expected = lhotse_cut().truncate(offset=place * 1.2, duration=2.0)
    assert times(placed) == times_of_cut(expected) and placed.placement is None


@pytest.mark.parametrize("keep", [True, False])
def test_windows_have_lhotses_turns(keep):
    keys = {"cut_into_windows_duration": 1.0, "cut_into_windows_hop": 0.7}
    windows = made(keep_excessive_supervisions=keep, **keys)
    expected = list(lhotse_cut().cut_into_windows(1.0, 0.7, keep))
    assert len(windows) == len(expected) > 3
    for number, (window, cut_) in enumerate(zip(windows, expected, strict=True)):
        assert window.id == f"d-{number}" and times(window) == times_of_cut(cut_)
        assert window.duration_s == pytest.approx(cut_.duration)
        assert window.source.offset_s == pytest.approx(cut_.start)


@pytest.mark.parametrize(("direction", "shift"), [("right", 0), ("left", 0.8), ("both", 0.4)])
def test_silence_before_a_conversation_moves_its_turns(direction, shift):
    (padded,) = made(pad_min_duration=4.0, pad_direction=direction)
    assert padded.duration_s == padded.source.duration_s == padded.target.duration_s == 4.0
    expected = [(t, round(a + shift, 6), round(b + shift, 6)) for _, a, b, t in TURNS]
    assert times(padded) == expected
    (drawn,) = made(pad_min_duration=4.0, pad_direction="random")
    assert times(at_place(drawn, 0.25))[0] == ("hi", 0.4, 1.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    return write_cuts(folder / "cuts.jsonl", [cut(folder, "d", 3.2, TURNS)])


def one_row(corpus, epochs=1, **keys):
    stream = module(corpus, batch_size=1, **keys).train_batches()
    found = [rows(next(stream)) for _ in range(epochs)]
    return [next(iter(row.values())) for row in found]


def start_of(part, whole):
    """Where most of a stretch fits best: samples differ a little at its ends, by resampling."""
    from scipy.signal import correlate

    middle = part[50:-50]
    return int(np.argmax(correlate(whole, middle, "valid", "fft"))) - 50


def test_random_stretches_keep_both_voices_and_texts_alongside(corpus):
    (whole,) = one_row(corpus)
    parts = one_row(corpus, epochs=4, truncate_duration=1.6)
    starts = []
    for part in parts:
        start = start_of(part["source_audio"], whole["source_audio"])
        starts.append(start)
        target = round(start * 22050 / 16000)
        piece = whole["target_audio"][target : target + len(part["target_audio"])]
        assert (
            max(
                np.corrcoef(
                    piece[20 : len(piece) - 20],
                    np.roll(part["target_audio"], s)[20 : len(piece) - 20],
                )[0, 1]
                for s in (-2, -1, 0, 1, 2)
            )
            > 0.9
        )
        frame = start / 1280
        tokens, all_tokens = part["target_tokens"], whole["target_tokens"]
        first = np.flatnonzero(tokens != tokens[-1])
        assert len(tokens) == 20 and len(first)
        assert any(
            (tokens[2:-2] == all_tokens[f + 2 : f + len(tokens) - 2]).mean() > 0.75
            for f in (int(frame), int(frame) + 1)
        )
    assert len(set(starts)) == 4


def test_padding_adds_silence_to_both_voices(corpus):
    (whole,) = one_row(corpus)
    (padded,) = one_row(corpus, pad_min_duration=4.0, pad_direction="left")
    source = padded["source_audio"]
    assert len(source) == 64000 and not source[:12700].any()
    np.testing.assert_allclose(source[13000:60000], whole["source_audio"][200:47200], atol=1e-3)
    np.testing.assert_array_equal(padded["target_audio"][-60000:], whole["target_audio"][-60000:])
    np.testing.assert_array_equal(padded["target_tokens"][10:], whole["target_tokens"])
