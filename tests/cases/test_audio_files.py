"""A recording is read whole, whatever its header claims, in every common format."""

import io
import math
import struct

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data.audio import (
    LOSSY_TOLERANCE_S,
    AudioError,
    audio_length,
    read_audio,
)
from tests.cases.audio_case import RATE_HZ, correlation, encode, speechlike, without_first_frame

PCM16_STEP = 1 / 32768
MP3_FRAME = 1152


def mp3(path, wave, rate_hz, *, mode="VARIABLE", level=0.2, has_header=True):
    """Writes an MP3; gives its length in samples if nothing is cut from its ends."""
    soundfile.write(path, wave, rate_hz, format="MP3", bitrate_mode=mode, compression_level=level)
    if not has_header:
        without_first_frame(path)
    return path


def read_segments(path, rate_hz, bounds_s=((0.0, 0.5), (0.25, 1.0), (1.3, 0.5), (1.75, 0.25))):
    """Segments, each beside the same stretch of the whole."""
    whole = read_audio(path)
    for offset_s, duration_s in bounds_s:
        start = math.floor(offset_s * rate_hz + 0.5)
        part = read_audio(path, offset_s=offset_s, duration_s=duration_s)
        yield part, whole[start : start + len(part)]


# MP3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 32000, 44100, 48000])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
def test_an_mp3_without_header_is_read_to_its_end(tmp_path, rate_hz, mode):
    wave = speechlike(2.0, rate_hz)
    path = mp3(tmp_path / "a.mp3", wave, rate_hz, mode=mode)
    whole = read_audio(path)
    assert audio_length(path) == (len(whole), rate_hz)
    without_first_frame(path)
    streamed = read_audio(path)
    assert audio_length(path) == (len(streamed), rate_hz)
    delay = 1105  # of encoder and decoder, which only a header tells
    assert len(wave) + delay <= len(streamed) <= len(wave) + delay + 2 * MP3_FRAME
    assert correlation(streamed[delay:], wave) > 0.999
    for part, expected in read_segments(path, rate_hz):
        np.testing.assert_allclose(part, expected, atol=1e-6)


def test_the_header_that_libsndfile_guesses_from_is_not_believed(tmp_path):
    """A quiet start makes it guess a length too short."""
    wave = speechlike(3.0, 48000)
    path = mp3(tmp_path / "a.mp3", wave, 48000, has_header=False)
    assert soundfile.info(path).duration < 2.9
    assert len(read_audio(path, sample_rate_hz=RATE_HZ)) >= 3.0 * RATE_HZ
    late = read_audio(path, offset_s=2.5, duration_s=0.5)
    np.testing.assert_allclose(late, read_audio(path)[120_000:144_000], atol=1e-6)


def test_an_mp3_equals_what_libsndfile_decodes(tmp_path):
    path = mp3(tmp_path / "a.mp3", speechlike(1.0, 44100), 44100)
    expected, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(read_audio(path), expected, atol=1e-5)
    np.testing.assert_array_equal(read_audio(io.BytesIO(path.read_bytes())), read_audio(path))


def test_an_mp3_late_segment_needs_no_decoding_of_what_lies_before(tmp_path):
    wave = np.tile(speechlike(2.0, 44100), 10)
    path = mp3(tmp_path / "a.mp3", wave, 44100)
    bounds = [(0.05, 0.2), (7.3, 2.0), (19.0, 1.0), (3.001, 0.017)]
    for part, expected in read_segments(path, 44100, bounds):
        assert len(part) == len(expected)
        np.testing.assert_allclose(part, expected, atol=1e-6)


@pytest.mark.parametrize("rate_hz", [8000, 44100])
def test_a_declared_length_with_the_encoders_delay_is_kept(tmp_path, rate_hz):
    """ffprobe and sox count it, decoders do not: padded as in Lhotse, or cut."""
    wave = speechlike(2.0, rate_hz)
    path = mp3(tmp_path / "a.mp3", wave, rate_hz)
    declared = len(wave) / rate_hz + 0.14
    read = read_audio(path, duration_s=declared, is_segment=False)
    assert len(read) == round(declared * rate_hz)
    mirrored = np.pad(read_audio(path), (0, len(read) - len(wave)), mode="reflect")
    np.testing.assert_array_equal(read, mirrored)
    short = read_audio(path, duration_s=1.8, is_segment=False)
    np.testing.assert_array_equal(short, read_audio(path)[: round(1.8 * rate_hz)])


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_half_of_an_mp3_is_truncated(tmp_path, seconds):
    path = mp3(tmp_path / "a.mp3", speechlike(seconds), RATE_HZ, mode="CONSTANT")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match="declared") as caught:
        read_audio(path, duration_s=seconds, is_segment=False)
    assert caught.value.cause == "truncated"


def test_an_mp3_longer_than_declared_is_refused(tmp_path):
    path = mp3(tmp_path / "a.mp3", speechlike(2.0), RATE_HZ)
    with pytest.raises(AudioError) as caught:
        read_audio(path, duration_s=1.9 - LOSSY_TOLERANCE_S, is_segment=False)
    assert caught.value.cause == "longer_than_declared"


@pytest.mark.parametrize("form", ["MP3", "OGG", "FLAC"])
def test_recordings_joined_into_one_file_are_read_all(tmp_path, form):
    wave = speechlike(1.0, 44100)
    path = tmp_path / f"a.{form.lower()}"
    soundfile.write(path, wave, 44100, format=form)
    path.write_bytes(path.read_bytes() * 2)
    read = read_audio(path)
    assert 2 * len(wave) <= len(read) <= 2 * len(wave) + 4 * MP3_FRAME
    assert audio_length(path).samples == len(read)
    assert correlation(read[:44100], wave) > 0.999
    np.testing.assert_array_equal(read_audio(io.BytesIO(path.read_bytes())), read)
    part = read_audio(path, offset_s=1.5, duration_s=0.25)
    np.testing.assert_allclose(part, read[66_150:77_175], atol=1e-6)


def test_of_joined_recordings_the_first_is_read_where_it_is_what_is_declared(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, speechlike(1.0, 44100), 44100)
    alone = read_audio(path)
    path.write_bytes(path.read_bytes() * 2)
    np.testing.assert_array_equal(read_audio(path, duration_s=1.05, is_segment=False), alone)
    whole = read_audio(path, duration_s=2.0, is_segment=False)
    np.testing.assert_allclose(whole, np.tile(alone, 2), atol=1e-6)
    with pytest.raises(AudioError) as caught:
        read_audio(path, duration_s=1.5, is_segment=False)
    assert caught.value.cause == "longer_than_declared"


# Unknown lengths ----------------------------------------------------------------------------------


def at_text(text: bytes, shift: int, value: bytes):
    """Overwrites what stands `shift` bytes behind the first `text`."""

    def change(data):
        place = data.index(text) + shift
        data[place : place + len(value)] = value

    return change


def unknown_flac(data):
    data[21] &= 0xF0
    data[22:26] = bytes(4)


UNKNOWN = {
    "FLAC": [unknown_flac],
    "WAV": [at_text(b"data", 4, bytes(4)), at_text(b"data", 4, b"\xff" * 4)],
    "AU": [at_text(b".snd", 8, bytes(4)), at_text(b".snd", 8, b"\xff" * 4)],
    "RF64": [at_text(b"ds64", 8, bytes(24)), at_text(b"ds64", 8, b"\xff" * 24)],
    "W64": [at_text(b"data", 16, bytes(8)), at_text(b"data", 16, b"\xff" * 8)],
    "CAF": [at_text(b"data", 4, b"\xff" * 8), at_text(b"data", 4, bytes(8))],
    "AIFF": [at_text(b"SSND", 4, bytes(4)), at_text(b"COMM", 10, bytes(4))],
}


@pytest.mark.parametrize(
    ("form", "number"), [(f, n) for f in UNKNOWN for n in range(len(UNKNOWN[f]))]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_stream_of_unknown_length_is_read_to_its_end(tmp_path, form, number, channels):
    wave = np.stack([speechlike()] * channels, axis=1)
    path = tmp_path / "a.bin"
    soundfile.write(path, wave, RATE_HZ, format=form)
    known = read_audio(path)
    data = bytearray(path.read_bytes())
    UNKNOWN[form][number](data)
    path.write_bytes(data)
    np.testing.assert_array_equal(read_audio(path), known)
    np.testing.assert_array_equal(read_audio(io.BytesIO(data)), known)
    assert audio_length(path) == (len(known), RATE_HZ)
    np.testing.assert_array_equal(read_audio(path, duration_s=2.0, is_segment=False), known)
    for part, expected in read_segments(path, RATE_HZ):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("form", ["WAV", "AU", "RF64", "W64", "CAF", "AIFF", "OGG", "NIST"])
def test_an_empty_recording_stays_empty(tmp_path, form):
    path = tmp_path / "a.bin"
    soundfile.write(path, np.zeros(0), RATE_HZ, format=form)
    if form == "WAV":
        data = path.read_bytes() + b"LIST\x0a\0\0\0INFOISFT\0\0"
        path.write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    assert caught.value.cause == "empty"


# Formats ------------------------------------------------------------------------------------------

FORMATS = {
    # name: container, codec, rate, channels, delay in samples, least correlation, is a pipe
    "phone.m4a": ("ipod", "aac", 44100, 1, 0, 0.999, False),
    "stereo.m4a": ("ipod", "aac", 48000, 2, 0, 0.999, False),
    "lossless.m4a": ("ipod", "alac", 44100, 2, 0, 0.9999, False),
    "video.mp4": ("mp4", "aac", 48000, 2, 0, 0.999, False),
    "call.3gp": ("3gp", "libopencore_amrnb", 8000, 1, 138, 0.9, False),
    "call.amr": ("amr", "libopencore_amrnb", 8000, 1, 188, 0.9, True),
    "raw.aac": ("adts", "aac", 44100, 1, 1024, 0.999, True),
    "browser.webm": ("webm", "libopus", 48000, 1, 0, 0.999, True),
    "x.mkv": ("matroska", "aac", 44100, 2, 0, 0.999, True),
    "voice.ogg": ("ogg", "libopus", 48000, 1, 0, 0.999, True),
    "voice.opus": ("opus", "libopus", 16000, 1, 0, 0.999, True),
    "x.mp3": ("mp3", "libmp3lame", 44100, 2, 0, 0.999, False),
    "streamed.mp3": ("mp3", "libmp3lame", 44100, 1, 1105, 0.999, True),
    "x.flac": ("flac", "flac", 16000, 2, 0, 0.9999, True),
    "x.wav": ("wav", "pcm_s16le", 16000, 1, 0, 0.9999, True),
    "big.w64": ("w64", "pcm_s16le", 16000, 2, 0, 0.9999, True),
    "x.caf": ("caf", "pcm_s16be", 16000, 1, 0, 0.9999, True),
    "x.au": ("au", "pcm_s16be", 16000, 1, 0, 0.9999, True),
    "x.aiff": ("aiff", "pcm_s16be", 16000, 1, 0, 0.9999, True),
    "x.wv": ("wv", "wavpack", 16000, 1, 0, 0.999, False),
    "old.wma": ("asf", "wmav2", 44100, 2, -2048, 0.999, False),
    "x.ac3": ("ac3", "ac3", 48000, 2, 256, 0.999, True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_back_its_source(tmp_path, name):
    container, codec, rate_hz, channels, delay, least, is_pipe = FORMATS[name]
    wave = speechlike(2.0, rate_hz)
    given = np.stack([wave, 0.5 * wave], axis=1) if channels == 2 else wave
    path = encode(
        tmp_path / name, given, rate_hz=rate_hz, container=container, codec=codec, is_pipe=is_pipe
    )
    read = read_audio(path)
    mixed = wave if channels == 1 else 0.75 * wave
    assert correlation(read[max(delay, 0) :], mixed[max(-delay, 0) :]) > least
    assert np.abs(read).max() == pytest.approx(np.abs(mixed).max(), rel=0.2)
    assert abs(len(read) - len(wave)) <= max(abs(delay), 0) + 2048
    assert audio_length(path) == (len(read), rate_hz)
    assert len(read_audio(path, sample_rate_hz=RATE_HZ)) == pytest.approx(2 * RATE_HZ, abs=800)
    if container != "w64":  # which libsndfile reads from paths only, where its length is unknown
        np.testing.assert_array_equal(read_audio(io.BytesIO(path.read_bytes())), read)
    for part, expected in read_segments(path, rate_hz):
        np.testing.assert_allclose(part[: len(expected)], expected, atol=PCM16_STEP)
    assert len(read_audio(path, duration_s=2.1, is_segment=codec.startswith("pcm"))) > 0


@pytest.mark.parametrize("form", ["NIST", "CAF", "W64", "RF64", "AU", "AIFF", "VOC", "SVX"])
def test_a_channel_of_libsndfiles_formats_is_chosen(tmp_path, form):
    wave = speechlike()
    is_mono = form == "SVX"
    given = wave if is_mono else np.stack([wave, 0 * wave], axis=1)
    path = tmp_path / "a.bin"
    soundfile.write(path, given, RATE_HZ, format=form, subtype="PCM_16")
    np.testing.assert_allclose(read_audio(path, channel=0), wave, atol=PCM16_STEP)


def test_of_a_video_the_first_audio_stream_is_read(tmp_path):
    import av

    path, waves = tmp_path / "dialog.mp4", (speechlike(), 0.1 * speechlike()[::-1].copy())
    with av.open(str(path), "w") as file:
        video = file.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        streams = [file.add_stream("aac", rate=RATE_HZ, layout="mono") for _ in waves]
        for number in range(50):
            picture = av.VideoFrame.from_ndarray(np.zeros((48, 32), np.uint8), format="yuv420p")
            picture.pts = number
            file.mux(video.encode(picture))
        for stream, wave in zip(streams, waves, strict=True):
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE_HZ, 0
            file.mux(stream.encode(frame))
        for stream in (video, *streams):
            file.mux(stream.encode(None))
    assert correlation(read_audio(path), waves[0]) > 0.99


def test_a_video_without_sound_is_refused_by_name(tmp_path):
    import av

    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as file:
        video = file.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 32), np.uint8), format="yuv420p")
        file.mux([*video.encode(picture), *video.encode(None)])
    with pytest.raises(AudioError, match=r"silent\.mp4: no audio stream, only video") as caught:
        read_audio(path)
    assert caught.value.cause == "unreadable"


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{0}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {0}\n",
    ],
)
def test_a_file_does_not_make_ffmpeg_open_another(tmp_path, text):
    other = encode(
        tmp_path / "a.mp3", speechlike(), rate_hz=RATE_HZ, container="mp3", codec="libmp3lame"
    )
    path = tmp_path / "list.m4a"
    path.write_text(text.format(other.name))
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    assert caught.value.cause == "unreadable"


# Headers that cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [0, 1, 999, 2_000_003, 2**31 - 1, 2**32 - 1])
def test_a_sample_rate_that_cannot_be_is_an_error(tmp_path, rate_hz):
    path = tmp_path / "a.wav"
    soundfile.write(path, speechlike(), RATE_HZ)
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", rate_hz)
    path.write_bytes(data)
    with pytest.raises(AudioError, match=r"a\.wav") as caught:
        read_audio(path, sample_rate_hz=RATE_HZ)
    assert caught.value.cause == "unreadable"
    with pytest.raises(AudioError):
        audio_length(path)


@pytest.mark.parametrize("channels", [0, 1025, 65535])
def test_a_number_of_channels_that_cannot_be_is_an_error(tmp_path, channels):
    path = tmp_path / "a.wav"
    soundfile.write(path, speechlike(), RATE_HZ)
    data = bytearray(path.read_bytes())
    data[22:24] = struct.pack("<H", channels)
    path.write_bytes(data)
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    assert caught.value.cause == "unreadable"


@pytest.mark.parametrize("samples", [2**36 - 1, 2**30])
def test_a_flac_that_promises_too_much_is_no_allocation(tmp_path, samples):
    path = promising_flac(tmp_path / "a.flac", speechlike(), samples)
    assert audio_length(path) == (2 * RATE_HZ, RATE_HZ)
    np.testing.assert_allclose(read_audio(path), speechlike(), atol=PCM16_STEP)
    with pytest.raises(AudioError) as caught:
        read_audio(path, duration_s=4.0, is_segment=False)
    assert caught.value.cause == "truncated"


def test_a_flac_that_ends_early_is_an_error(tmp_path):
    path = promising_flac(tmp_path / "a.flac", speechlike(), 50_000)
    assert audio_length(path) == (50_000, RATE_HZ)
    with pytest.raises(AudioError, match=r"a\.flac"):
        read_audio(path)


def promising_flac(path, wave, samples):
    """A FLAC whose header claims so many samples."""
    soundfile.write(path, wave, RATE_HZ)
    data = bytearray(path.read_bytes())
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = struct.pack(">I", samples & 0xFFFFFFFF)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["a" * 300 + ".wav", "b/" * 3000 + "a.wav", "a\0.wav", "a\udc80.wav"]
)
def test_a_name_that_no_file_can_have_is_missing(tmp_path, name):
    with pytest.raises(AudioError, match="no such file") as caught:
        read_audio(tmp_path / name)
    assert caught.value.cause == "missing"


@pytest.mark.parametrize("form", ["MP3", "OGG", "FLAC", "WAV", "AIFF", "W64"])
def test_a_damaged_file_is_read_or_an_audio_error(tmp_path, form):
    """Never another exception, whichever bytes are wrong."""
    path, draw = tmp_path / "a.bin", np.random.default_rng(0)
    soundfile.write(path, speechlike(0.5), RATE_HZ, format=form)
    good = np.frombuffer(path.read_bytes(), np.uint8)
    for number in range(60):
        data = good.copy()
        reach = len(data) if number % 2 else 64
        data[draw.integers(0, reach, 8)] = draw.integers(0, 256, 8)
        path.write_bytes(data[: draw.integers(1, len(data))] if number % 3 == 0 else data)
        for read in (audio_length, lambda p: read_audio(p, sample_rate_hz=RATE_HZ)):
            try:
                read(path)
            except AudioError as error:
                assert "a.bin" in str(error)
