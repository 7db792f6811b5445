"""What lies around or inside a recording and is no sound: tags, chunks, padding, junk."""

import io
import struct

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data.audio import audio_length, read_audio
from speechlm2_jax.data.mpeg_frames import frame_bytes
from tests.cases.audio_case import RATE_HZ, correlation, speechlike

LIST = b"LIST\x1a\0\0\0INFOISFT\x0e\0\0\0Lavf58.29.100\0"
ID3_CHUNK = b"id3 \x05\0\0\0title"


def written(wave, rate_hz=RATE_HZ, **options):
    file = io.BytesIO()
    soundfile.write(file, wave, rate_hz, **options)
    return file.getvalue()


def junk(count):
    return np.random.default_rng(count).integers(0, 256, count, np.uint8).tobytes()


# WAV ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["WAV", "RF64"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000])
@pytest.mark.parametrize(
    "chunks", [LIST, ID3_CHUNK, ID3_CHUNK + b"\0", LIST + ID3_CHUNK, ID3_CHUNK + b"\0" + LIST]
)
def test_chunks_behind_a_streamed_wav_are_no_samples(tmp_path, form, subtype, size, chunks):
    data = bytearray(written(speechlike(), format=form, subtype=subtype))
    known, place = read_audio(io.BytesIO(data)), data.index(b"data") + 4
    del data[place + 4 + len(known) * {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}[subtype] :]
    data[place : place + 4] = struct.pack("<I", size)
    if form == "RF64":
        data[20:44] = b"\xff" * 24 if size else bytes(24)
    path = tmp_path / "a.wav"
    path.write_bytes(data + chunks)
    np.testing.assert_array_equal(read_audio(path), known)
    np.testing.assert_array_equal(read_audio(io.BytesIO(data + chunks)), known)
    assert audio_length(path) == (len(known), RATE_HZ)
    part = read_audio(path, offset_s=1.75, duration_s=0.25)
    np.testing.assert_array_equal(part, known[28_000:])


def test_samples_that_spell_a_chunk_stay_samples():
    data = bytearray(written(np.zeros(1000), format="WAV"))
    data[40:44] = bytes(4)
    data[100:108] = b"LIST" + struct.pack("<I", 7)  # ends before the file does
    assert len(read_audio(io.BytesIO(data))) == 1000


# MP3 ----------------------------------------------------------------------------------------------


def mp3(wave, rate_hz, mode="VARIABLE"):
    options = {"format": "MP3", "bitrate_mode": mode, "compression_level": 0.2}
    return written(wave, rate_hz, **options)


def id3(size, fill=b"\0"):
    sizes = bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127])
    return b"ID3\x03\0\0" + sizes + fill * size


def ape(size):
    def end(flags):
        return b"APETAGEX" + struct.pack("<IIII", 2000, size + 32, 0, flags) + bytes(8)

    return end(0xA0000000) + bytes(size) + end(0x80000000)


IN_FRONT = {
    "APE": ape(100),
    "ID3, APE": id3(100) + ape(200_000),
    "APE, ID3": ape(7) + id3(100),
    "ID3, ID3": id3(100) + id3(7),
    "ID3, padding": id3(1000) + bytes(500),
    "padding": bytes(4096),
    "one byte": b"\xff",
    "text": b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n\r\n",
    "junk": junk(3000),
}


@pytest.mark.parametrize("rate_hz", [16000, 44100])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("name", IN_FRONT)
def test_an_mp3_behind_a_tag_or_junk_keeps_its_delay(tmp_path, name, mode, rate_hz):
    """The Xing or Info frame tells the delay; it is in the first frame, wherever that is."""
    wave = speechlike(2.0, rate_hz)
    plain, path = mp3(wave, rate_hz, mode), tmp_path / "a.mp3"
    path.write_bytes(IN_FRONT[name] + plain)
    read = read_audio(path)
    np.testing.assert_array_equal(read, read_audio(io.BytesIO(plain)))
    assert len(read) == len(wave) and correlation(read, wave) > 0.999
    assert audio_length(path) == (len(wave), rate_hz)
    part = read_audio(path, offset_s=1.5, duration_s=0.25)
    at = round(1.5 * rate_hz)
    np.testing.assert_allclose(part, read[at : at + len(part)], atol=1e-6)


@pytest.mark.parametrize("seconds", [0.02, 0.1])
def test_a_very_short_mp3_behind_junk_is_found(seconds):
    wave = speechlike(seconds, 44100)
    plain = mp3(wave, 44100)
    for behind in (b"", b"TAG" + bytes(125)):
        read = read_audio(io.BytesIO(junk(300) + plain + behind))
        np.testing.assert_array_equal(read, read_audio(io.BytesIO(plain + behind)))


def test_an_mp3_that_is_damaged_soon_starts_at_its_start():
    wave = speechlike(2.0, 44100)
    plain = mp3(wave, 44100)
    place = 0
    for _ in range(3):
        place += frame_bytes(plain, place) or 0
    read = read_audio(io.BytesIO(plain[:place] + junk(50) + plain[place:]))
    assert len(wave) - 3 * 1152 <= len(read) <= len(wave)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("count", [1, 100, 417, 5000, 100_000])
@pytest.mark.parametrize("kind", ["junk", "zeros", "ID3", "missing"])
def test_the_length_of_an_mp3_with_junk_inside_is_what_decodes(tmp_path, kind, count, mode):
    plain, path = mp3(speechlike(2.0, 44100), 44100, mode), tmp_path / "a.mp3"
    inside = {"junk": junk(count), "zeros": bytes(count), "ID3": id3(count), "missing": b""}[kind]
    for share in (0.3, 0.5, 0.99):
        place = int(len(plain) * share)
        rest = plain[place + (count if kind == "missing" else 0) :]
        path.write_bytes(plain[:place] + inside + rest)
        assert audio_length(path).samples == len(read_audio(path))


@pytest.mark.parametrize("behind", [ape(100), b"TAG" + bytes(125), junk(3000), bytes(1000)])
def test_what_follows_an_mp3_is_no_sound(behind):
    plain = mp3(speechlike(2.0, 44100), 44100, "CONSTANT")
    data = io.BytesIO(plain + behind)
    assert audio_length(data).samples == len(read_audio(data)) == 88_200


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ("fffb9064", 417),  # MPEG 1 layer III, 128 kbit/s, 44.1 kHz
        ("fffb9264", 418),  # the same, padded
        ("fff384c4", 192),  # MPEG 2 layer III, 64 kbit/s, 24 kHz
        ("ffe364c4", 288),  # MPEG 2.5 layer III, 48 kbit/s, 12 kHz
        ("fffd8404", 384),  # MPEG 1 layer II, 128 kbit/s, 48 kHz
        ("ffff4404", 128),  # MPEG 1 layer I, 128 kbit/s, 48 kHz
        ("fffb0064", None),  # free bit rate
        ("fffbf064", None),
        ("fffb9c64", None),  # no rate
        ("ffeb9064", None),  # no version
        ("fff99064", None),  # no layer
        ("7ffb9064", None),
        ("fffb", None),
    ],
)
def test_a_header_tells_the_bytes_of_its_frame(header, size):
    assert frame_bytes(bytes.fromhex(header)) == size
