"""Moshi's protocol, with the Ogg Opus of its own clients (`sphn`)."""

import json
import struct

import numpy as np
import pytest
import sphn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from speechlm2_jax.data.stream_resampler import StreamResampler
from speechlm2_jax.serving.duplex.ogg import OggError, OggReader, OggWriter
from speechlm2_jax.serving.duplex.opus import GRANULE_HZ, RATE_HZ, OpusReader, OpusWriter
from tests.serving.duplex.fake_sessions import WAIT_S, FakeSessions, quiet, running, tone

FRAME = 1920
SPEECH = np.concatenate([quiet(0.44), tone(0.8), quiet(0.76)])


def sweep(seconds):
    """A tone that rises from 200 to 2,000 Hz: unlike itself at any other time."""
    at = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return (0.3 * np.sin(2 * np.pi * (200 + 900 * at / seconds) * at)).astype(np.float32)


def likeness(a, b, reach=400):
    """The highest correlation of two signals over shifts, and the shift."""
    middle = a[len(a) // 3 : 2 * len(a) // 3]
    found = {}
    for shift in range(-reach, reach):
        other = b[len(a) // 3 + shift :][: len(middle)]
        found[shift] = np.corrcoef(middle, other)[0, 1]
    best = max(found, key=found.get)
    return found[best], best


@pytest.fixture(scope="module")
def server():
    with running(FakeSessions()) as server:
        yield server


def test_what_we_encode_is_decoded_by_sphn():
    wave, writer, reader = sweep(2), OpusWriter(), sphn.OpusStreamReader(RATE_HZ)
    pieces = [writer.push(wave[n : n + 777]) for n in range(0, len(wave), 777)]
    found = np.concatenate([reader.append_bytes(piece) for piece in pieces])
    correlation, shift = likeness(wave, found)
    assert correlation > 0.9 and abs(shift) < 200
    assert len(wave) - FRAME < len(found) <= len(wave)


def test_what_sphn_encodes_is_decoded_by_us():
    wave, writer, reader = sweep(2), sphn.OpusStreamWriter(RATE_HZ), OpusReader()
    data = b"".join(
        bytes(writer.append_pcm(wave[n : n + FRAME])) for n in range(0, len(wave), FRAME)
    )
    pieces = [reader.push(data[n : n + 101]) for n in range(0, len(data), 101)]
    found = StreamResampler(GRANULE_HZ, RATE_HZ).push(np.concatenate(pieces))
    correlation, shift = likeness(wave, found)
    assert correlation > 0.9 and abs(shift) < 200


def test_packets_of_all_sizes_survive_pages():
    packets = [bytes([n % 251]) * n for n in (0, 1, 254, 255, 256, 510, 2000)]
    writer, reader = OggWriter(7), OggReader()
    data = b"".join(writer.page(packet, 960 * n) for n, packet in enumerate(packets))
    found = [packet for n in range(0, len(data), 13) for packet in reader.push(data[n : n + 13])]
    assert found == packets


def test_damaged_bytes_are_refused():
    page = bytearray(OggWriter(7).page(b"abc", 0))
    page[-1] ^= 1
    for data in (b"RIFF", bytes(page), b"OggS\x01" + bytes(30)):
        with pytest.raises(OggError):
            list(OggReader().push(data))
    with pytest.raises(OggError, match="header is missing"):
        OpusReader().push(OggWriter(7).page(b"abc", 0))
    head = struct.pack("<8sBBHIhB", b"OpusHead", 1, 6, 0, 24000, 0, 1)
    with pytest.raises(OggError, match="only mono and stereo"):
        OpusReader().push(OggWriter(7).page(head, 0))


def converse(socket, samples):
    """Sends audio as Moshi's client does; returns the agent's samples and text."""
    writer, reader = sphn.OpusStreamWriter(RATE_HZ), sphn.OpusStreamReader(RATE_HZ)
    wave, text = [], ""
    for start in range(0, len(samples), FRAME):
        socket.send(b"\x01" + bytes(writer.append_pcm(samples[start : start + FRAME])))
    while sum(map(len, wave)) < len(samples) - 3 * FRAME:
        message = socket.recv(WAIT_S)
        if message[0] == 1:
            wave.append(reader.append_bytes(message[1:]))
        elif message[0] == 2:
            text += message[1:].decode()
    return np.concatenate(wave), text


def test_a_client_of_moshi_holds_a_conversation(server):
    with connect(f"{server.ws}/api/chat?seed=1", open_timeout=WAIT_S) as socket:
        assert socket.recv(WAIT_S) == b"\x00" + bytes(8)
        metadata = socket.recv(WAIT_S)
        assert metadata[0] == 4 and json.loads(metadata[1:]) == {"model": "fake"}
        wave, text = converse(socket, SPEECH)
        assert text.startswith("6 7 8 9 10 11 12")
        assert np.abs(wave[12000:28000]).max() == pytest.approx(0.15, abs=0.04)
        assert np.abs(wave[:7000]).max() < 0.01, "the agent's silence is sent too"
    server.until(lambda: server.service.active == 0)


def test_controls_interrupt_and_restart(server):
    sessions = server.service.device._sessions
    before = sessions.interrupted
    with connect(f"{server.ws}/api/chat", open_timeout=WAIT_S) as socket:
        assert [socket.recv(WAIT_S)[0] for _ in range(2)] == [0, 4]
        socket.send(b"\x03\x01")  # the turn ends
        socket.send(b"\x09?")  # of a kind that nobody knows
        socket.send(b"\x06")
        assert socket.recv(WAIT_S) == b"\x06"
        _, text = converse(socket, SPEECH)
        assert text.startswith("6 7")
        assert sessions.interrupted == before + 1
        socket.send(b"\x03\x03")  # from the start
        socket.send(b"\x06")
        while socket.recv(WAIT_S)[0] != 6:
            pass
        server.until(lambda: not sessions.open_now)


BAD = {
    "a text message": ("hello", 1003),
    "no Ogg": (b"\x01RIFF....", 1007),
    "a damaged page": (b"\x01OggS" + bytes(40), 1007),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_messages_close_the_connection_with_their_code(server, what):
    message, code = BAD[what]
    with connect(f"{server.ws}/api/chat", open_timeout=WAIT_S) as socket:
        assert [socket.recv(WAIT_S)[0] for _ in range(2)] == [0, 4]
        socket.send(message)
        error = socket.recv(WAIT_S)
        assert error[0] == 5 and error[1:].decode()
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(WAIT_S)
    assert closed.value.rcvd.code == code and closed.value.rcvd.reason == error[1:].decode()[:123]
