"""Each effect on samples: its maths, and Lhotse's own result for the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data.augmentation import effects, noise, reverberation, variants
from speechlm2_jax.data.augmentation.augmentation import make_augmentation
from speechlm2_jax.data.augmentation.config import AugmentationConfig
from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.settings import SettingsError, build

RATE_HZ = 16000


def tone(seconds=0.4, hz=440.0, amplitude=0.3):
    return (
        amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE_HZ)) / RATE_HZ)
    ).astype(np.float32)


def hiss(seconds=0.4, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE_HZ)).astype(np.float32)


def power(wave):
    return float(np.mean(np.square(wave, dtype=np.float64)))


@pytest.fixture
def recording(tmp_path):
    """A Lhotse recording of samples, in a file."""
    from lhotse import Recording

    def make(wave, name="speech"):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, wave, RATE_HZ, subtype="FLOAT")
        return Recording.from_file(path)

    return make


def clip_of(recording):
    path = recording.sources[0].source
    return AudioClip(id="a", path=path, duration_s=recording.duration, is_segment=False)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 17.5])
def test_noise_is_so_many_decibels_below_speech(snr_db):
    speech = tone()
    pieces = [hiss(0.25), hiss(0.15, seed=1)]
    added = noise.mixed(speech, RATE_HZ, pieces, snr_db) - speech
    for part in (added[:4000], added[4000:]):
        assert 10 * np.log10(power(speech) / power(part)) == pytest.approx(snr_db, abs=1e-3)


def test_a_mix_is_that_of_lhotses_cuts(recording):
    speech, sound = recording(tone()), recording(hiss(), "noise")
    mixed = speech.to_cut().mix(sound.to_cut(), snr=7.0).load_audio()[0]
    ours = noise.mixed(tone(), RATE_HZ, [hiss()], 7.0)
    np.testing.assert_array_equal(ours, mixed)


def test_noise_that_is_shorter_is_followed_by_more_and_longer_noise_is_cut(recording):
    short, long = clip_of(recording(hiss(0.1), "short")), clip_of(recording(hiss(2.0), "long"))
    speech = tone(0.35)
    for clip in (short, long):
        sources = [noise.NoiseSource(clips=[clip], share=1)]
        mix = noise.Noise(probability=1.0, snr_db=(10.0, 10.0), sources=sources)
        added = mix(speech, RATE_HZ, draw()) - speech
        assert len(added) == len(speech) and (np.abs(added) > 0).mean() > 0.99
    starts = {
        noise.Noise(probability=1.0, snr_db=(10.0, 10.0), sources=sources)(
            speech, RATE_HZ, draw(seed)
        )[0]
        for seed in range(4)
    }
    assert len(starts) == 4  # a random stretch


def draw(seed=0, report=lambda error: None):
    return effects.Draw(rng=np.random.default_rng(seed), report=report)


def test_noise_that_is_missing_is_told_and_another_takes_its_place(recording):
    there = clip_of(recording(hiss(2.0), "there"))
    gone = AudioClip(id="gone", path="/nowhere/gone.wav", duration_s=2.0)
    told = []
    sources = [noise.NoiseSource(clips=[there, gone], share=1)]
    mix = noise.Noise(probability=1.0, snr_db=(10.0, 10.0), sources=sources)
    for seed in range(10):
        added = mix(tone(), RATE_HZ, draw(seed, told.append)) - tone()
        assert np.abs(added).max() > 0
    assert told and {error.cause for error in told} == {"missing"}
    assert {error.path for error in told} == {"/nowhere/gone.wav"}


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_another_speed_is_lhotses(recording, factor):
    source = recording(tone() + hiss())
    clip = variants.faster(clip_of(source), factor, RATE_HZ)
    cut = source.to_cut().perturb_speed(factor)
    assert (clip.samples(RATE_HZ), clip.duration_s) == (cut.num_samples, cut.duration)
    np.testing.assert_allclose(clip.load(RATE_HZ), cut.load_audio()[0], atol=1e-6)


def test_speed_moves_the_pitch():
    wave = effects.change_speed(tone(1.0, hz=440.0), RATE_HZ, 1.1)
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert spectrum.argmax() * RATE_HZ / len(wave) == pytest.approx(484.0, abs=1.5)


@pytest.mark.parametrize(
    ("samples", "factor", "left"), [(5, 0.9, 6), (9, 0.9, 10), (11, 1.1, 10), (1000, 1.1, 909)]
)
def test_samples_at_another_speed_are_counted_as_lhotse_counts_them(samples, factor, left):
    from lhotse.utils import perturb_num_samples

    assert effects.changed_length(samples, factor) == left
    for n in range(1, 400):
        assert effects.changed_length(n, factor) == perturb_num_samples(n, factor)


def test_a_low_pass_removes_what_is_above_and_nothing_below(recording):
    low, high = tone(1.0, hz=1000.0), tone(1.0, hz=5500.0)
    filtered = effects.lowpass(low + high, RATE_HZ, 4000)
    assert len(filtered) == len(low)
    middle = slice(2000, -2000)
    error = filtered[middle] - low[middle]
    assert power(error) < 1e-5 * power(high)
    cut = recording(low + high).to_cut().resample(8000).resample(RATE_HZ)
    np.testing.assert_allclose(filtered, cut.load_audio()[0], atol=1e-6)
    np.testing.assert_array_equal(effects.lowpass(high, RATE_HZ, 8000), high)


def test_cut_offs_are_drawn_evenly_in_octaves():
    filtered = effects.Lowpass(probability=1.0, cutoff_hz=(1000.0, 4000.0))
    met = []
    original, effects.lowpass = effects.lowpass, lambda wave, rate_hz, hz: met.append(hz)
    try:
        for seed in range(200):
            filtered(tone(0.01), RATE_HZ, draw(seed))
    finally:
        effects.lowpass = original
    assert min(met) >= 1000 and max(met) <= 4000 and all(hz % 50 == 0 for hz in met)
    assert np.mean(np.asarray(met) < 2000) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("oversampling", [1, 2])
def test_clipping_is_lhotses(recording, hard, oversampling):
    source = recording(tone() + hiss())
    values = {"hard": hard, "gain_db": 12.0, "normalize": True}
    ours = effects.clip_amplitude(tone() + hiss(), RATE_HZ, oversampling=oversampling, **values)
    lhotses = source.clip_amplitude(**values, oversampling=oversampling).load_audio()[0]
    np.testing.assert_allclose(ours, lhotses, atol=1e-6)


def test_hard_clipping_cuts_off_at_the_gain_below_the_peak():
    wave = tone(amplitude=0.5)
    clipped = effects.clip_amplitude(wave, RATE_HZ, hard=True, gain_db=20 * np.log10(2))
    assert np.abs(clipped).max() == pytest.approx(0.25, abs=1e-4)
    below = np.abs(wave) < 0.24
    np.testing.assert_allclose(clipped[below], wave[below], atol=1e-5)


@pytest.mark.parametrize("codec", ["opus", "mp3", "vorbis", "gsm"])
def test_a_codec_is_lhotses(recording, codec):
    wave = tone() + hiss()
    ours = effects.compress(wave, RATE_HZ, codec=codec, level=0.9)
    lhotses = recording(wave).compress(codec, 0.9).load_audio()[0]
    assert len(ours) == len(wave) and power(ours - wave) > 1e-4
    np.testing.assert_allclose(ours, lhotses, atol=1e-6)


def test_a_rate_that_a_codec_does_not_know_is_resampled():
    wave = tone()
    for codec in ("opus", "mp3"):
        coded = effects.compress(wave, 22050, codec=codec, level=0.0)
        assert len(coded) == len(wave) and np.corrcoef(coded, wave)[0, 1] > 0.9


def test_reverberation_by_a_recorded_response_is_lhotses(recording, tmp_path):
    from lhotse import RecordingSet

    response = np.zeros(3000, np.float32)
    response[[100, 700, 2500]] = [1.0, 0.5, -0.25]
    source, room = recording(tone() + hiss()), recording(response, "room")
    RecordingSet.from_recordings([room]).to_file(tmp_path / "responses.jsonl")
    (read,) = reverberation.read_responses(str(tmp_path / "responses.jsonl"))
    effect = reverberation.Reverberation(probability=1.0, responses=[read])
    ours = effect(tone() + hiss(), RATE_HZ, draw())
    np.testing.assert_allclose(ours, source.reverb_rir(room).load_audio()[0], atol=1e-6)
    assert power(ours) == pytest.approx(power(tone() + hiss()), rel=1e-3)


def test_a_response_that_is_missing_is_told_and_leaves_the_samples(recording, tmp_path):
    from lhotse import RecordingSet

    room = recording(hiss(0.1), "room")
    RecordingSet.from_recordings([room]).to_file(tmp_path / "responses.jsonl")
    responses = reverberation.read_responses(str(tmp_path / "responses.jsonl"))
    (tmp_path / "room.wav").unlink()
    told = []
    effect = reverberation.Reverberation(probability=1.0, responses=responses)
    np.testing.assert_array_equal(effect(tone(), RATE_HZ, draw(0, told.append)), tone())
    assert [error.cause for error in told] == ["unreadable"]
    with pytest.raises(SettingsError, match="no such file"):
        reverberation.read_responses(str(tmp_path / "other.jsonl"))


def test_a_simulated_response_decays_until_its_time(monkeypatch):
    falls = {}
    for t60_s in (0.2, 0.7):
        monkeypatch.setattr(reverberation, "T60_S", (t60_s, t60_s))
        monkeypatch.setattr(reverberation, "DISTANCE_M", (3.4, 3.4))
        for seed in range(4):
            response = reverberation.simulated_response(RATE_HZ, np.random.default_rng(seed))
            assert response.dtype == np.float32 and len(response) == round(t60_s * RATE_HZ)
            level = np.abs(response) / np.abs(response).max()
            arrival = RATE_HZ * 3.4 / reverberation.SOUND_M_PER_S
            assert level[: int(arrival) - 12].max() < 1e-3 and level[int(arrival) + 8 :].max() > 0.1
            assert level[-len(level) // 10 :].max() < 10 ** (-25 / 20)
            falls.setdefault(t60_s, []).append(level[2800:3200].max())
    assert np.median(falls[0.7]) > 4 * np.median(falls[0.2])
    one, same, other = (
        reverberation.simulated_response(RATE_HZ, np.random.default_rng(s)) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert len(one) != len(other) or not np.array_equal(one, other)


def test_volume_is_a_factor_from_an_interval():
    factors = [
        effects.Volume(probability=0.5, factor=(0.5, 0.8))(tone(), RATE_HZ, draw(seed)).max()
        / tone().max()
        for seed in range(60)
    ]
    changed = [f for f in factors if f != 1.0]
    assert 15 < len(changed) < 45 and 0.5 <= min(changed) < 0.6 and 0.7 < max(changed) <= 0.8


EVERYTHING = {
    "perturb_volume": True,
    "lowpass_enabled": True,
    "clipping_enabled": True,
    "rir_enabled": True,
    "compression_enabled": True,
}


def changed_by(key=(0, 0, 0), seed=1, **keys):
    augmentation = make_augmentation(build(AugmentationConfig, keys), seed)
    return augmentation.of_example(*key).of_clip(0).on_result(hiss(), RATE_HZ)


def test_effects_depend_on_seed_epoch_batch_and_example_alone():
    first = changed_by(perturb_volume=True, volume_prob=1.0)
    np.testing.assert_array_equal(first, changed_by(perturb_volume=True, volume_prob=1.0))
    others = [
        changed_by(key, seed, perturb_volume=True, volume_prob=1.0).max()
        for key, seed in [((1, 0, 0), 1), ((0, 1, 0), 1), ((0, 0, 1), 1), ((0, 0, 0), 2)]
    ]
    assert len({*others, first.max()}) == 5


def test_an_effect_that_is_switched_on_changes_no_other():
    alone = changed_by(
        lowpass_enabled=True, lowpass_prob=1.0, lowpass_frequencies_interval=[2e3, 4e3]
    )
    both = changed_by(
        lowpass_enabled=True,
        lowpass_prob=1.0,
        lowpass_frequencies_interval=[2e3, 4e3],
        perturb_volume=True,
        volume_prob=1.0,
    )
    np.testing.assert_allclose(both / both.max(), alone / alone.max(), atol=1e-4)


def test_effects_come_in_nemos_order_and_keep_the_length():
    augmentation = make_augmentation(build(AugmentationConfig, EVERYTHING), 1)
    names = [type(effect).__name__ for _, effect in augmentation.after_padding]
    assert names == ["Volume", "Lowpass", "Clipping", "Reverberation", "Compression"]
    probabilities = {f"{name}_prob": 1.0 for name in ("volume", "lowpass", "clipping", "rir")}
    wave = changed_by(**EVERYTHING, **probabilities, compression_prob=1.0)
    assert wave.shape == hiss().shape and wave.dtype == np.float32 and np.isfinite(wave).all()
    assert make_augmentation(AugmentationConfig(), 1) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"noise_snr": [20.0, 10.0]}, "noise_snr must be"),
        ({"noise_snr": [10.0]}, "noise_snr: expected"),
        ({"rir_prob": 1.5}, "rir_prob must be from 0 to 1"),
        ({"truncate_duration": 0}, "truncate_duration must be positive"),
        ({"truncate_offset_type": "middle"}, "truncate_offset_type: expected"),
        ({"pad_direction": "up"}, "pad_direction: expected"),
        ({"compression_codecs": ["opus", "opus"]}, "compression_codecs must be distinct"),
        ({"compression_codecs": ["aac"]}, "compression_codecs.0: expected"),
        ({"compression_codec_weights": [1.0, 2.0]}, "compression_codec_weights: give one"),
        ({"compression_level_interval": [0.5, 1.5]}, "compression_level_interval must lie"),
        ({"clipping_oversampling": 0}, "clipping_oversampling must be"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(keys, message):
    with pytest.raises(SettingsError, match=message):
        build(AugmentationConfig, keys)


def test_stretches_of_a_clip_that_ends_in_silence_hold_their_part_of_it(recording):
    wave = tone(0.4)
    clip = replace(clip_of(recording(wave)), duration_s=0.6, silence_s=0.2)
    whole = np.pad(wave, (0, 3200))
    for start, seconds in ((0.0, 0.3), (0.2, 0.3), (0.35, 0.25), (0.45, 0.1)):
        part = clip.stretch(start, seconds).load(RATE_HZ)
        first = round(start * RATE_HZ)
        np.testing.assert_array_equal(part, whole[first : first + len(part)])
        assert len(part) == round(seconds * RATE_HZ)
    fast = variants.faster(clip, 1.1, RATE_HZ)
    np.testing.assert_allclose(
        fast.load(RATE_HZ), effects.change_speed(whole, RATE_HZ, 1.1), atol=1e-6
    )


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_random_stretch_may_reach_into_silence(recording, place):
    wave = tone(0.4)
    clip = replace(clip_of(recording(wave)), duration_s=0.6, silence_s=0.2)
    part = variants.shortened(clip, 0.0, 0.3, room_s=0.3)
    augmentation = make_augmentation(AugmentationConfig(truncate_duration=0.3), 1)
    drawn = augmentation.of_example(0, 0, 0).of_clip(0)
    whole = np.pad(wave, (0, 3200))
    first = round(place * 0.3 * RATE_HZ)
    read = part._source(place)._load(RATE_HZ)
    np.testing.assert_array_equal(read, whole[first : first + 4800])
    first = round(drawn.place() * 0.3 * RATE_HZ)
    np.testing.assert_array_equal(part.load(RATE_HZ, drawn), whole[first : first + 4800])
