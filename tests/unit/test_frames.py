"""Frames: what goes in comes out, and what is not a frame is refused."""

import json
import struct

import numpy as np
import pytest

from psl_flower.errors import ProtocolError
from psl_flower.exchange import frames
from psl_flower.exchange.frames import CHUNK_BYTES, Decoder, Frame, encode


def frame(*sizes, **header):
    rng = np.random.default_rng(0)
    return Frame(header, [[memoryview(rng.integers(0, 256, n, dtype=np.uint8))] for n in sizes])


def contents(frame):
    return [b"".join(bytes(piece) for piece in pieces) for pieces in frame.buffers]


def through(frame, decoder=None, number=0):
    decoder = decoder or Decoder()
    *before, last = encode(frame, number)
    assert all(decoder.feed(chunk) is None for chunk in before)
    return decoder.feed(last)


@pytest.mark.parametrize(
    "sizes",
    [(), (0,), (1,), (64,), (3, 0, 65), (CHUNK_BYTES,), (CHUNK_BYTES - 1, 2), (CHUNK_BYTES + 1,), (3 * CHUNK_BYTES, 5)],
)
def test_a_frame_comes_out_as_it_went_in(sizes):
    sent = frame(*sizes, name="ä", values=[1, 2.5, None])
    received = through(sent)
    assert received.header == sent.header
    assert contents(received) == contents(sent)
    assert received.num_bytes() == sent.num_bytes() == sum(sizes)


def test_pieces_of_a_buffer_are_joined():
    sent = Frame({}, [[memoryview(b"abc"), memoryview(b""), memoryview(b"de")], [memoryview(b"f")]])
    assert contents(through(sent)) == [b"abcde", b"f"]


def test_frames_follow_each_other_on_one_stream():
    decoder = Decoder()
    for number, sizes in enumerate([(5,), (2 * CHUNK_BYTES,), ()]):
        assert contents(through(frame(*sizes), decoder, number)) == contents(frame(*sizes))


def test_no_chunk_is_larger_than_the_bound():
    chunks = list(encode(frame(5 * CHUNK_BYTES, 7, CHUNK_BYTES), 0))
    assert len(chunks) == 7
    assert max(map(len, chunks)) <= CHUNK_BYTES + 256


def test_chunks_are_made_only_when_asked_for():
    piece = np.zeros(4 * CHUNK_BYTES, np.uint8)
    chunks = encode(Frame({}, [[memoryview(piece)]]), 0)
    next(chunks)
    piece[-1] = 7  # still to be read: nothing was copied ahead
    assert list(chunks)[-1][-1] == 7


def test_buffers_are_aligned_where_the_frame_has_several_chunks():
    received = through(frame(3, CHUNK_BYTES))
    addresses = [np.frombuffer(pieces[0], np.uint8).ctypes.data for pieces in received.buffers]
    assert (addresses[1] - addresses[0]) % 64 == 0


def altered(chunk, offset, new):
    return chunk[:offset] + new + chunk[offset + len(new) :]


def first_chunk(text, payload=0, length=None, body=b""):
    prefix = struct.pack("<4sB3xII", b"PSLF", 1, 0, 0)
    return prefix + struct.pack("<I4xQ", len(text) if length is None else length, payload) + text + body


GOOD = next(encode(frame(10), 0))
LONG = list(encode(frame(3 * CHUNK_BYTES), 0))


@pytest.mark.parametrize(
    ("chunk", "why"),
    [
        (b"", "at least 16 bytes"),
        (GOOD[:15], "at least 16 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n" + bytes(20), "not a frame"),
        (altered(GOOD, 4, b"\x02"), "not a frame"),
        (altered(GOOD, 8, b"\x01"), "out of order"),
        (LONG[1], "out of order"),
        (GOOD[:20], "first chunk is at least"),
        (GOOD[:40], "cut short"),
        (first_chunk(b"", length=2**31), "too long"),
        (first_chunk(b"[[],{}]", payload=2**40), "a frame of"),
        (first_chunk(b"{}"), "must be a pair"),
        (first_chunk(b"[[],{}"), "not JSON"),
        (first_chunk(b'[[],{"a":NaN}]'), "not JSON"),
        (first_chunk(b"\xff\xfe"), "not JSON"),
        (first_chunk(b"[" * 100_000), "not JSON"),
        (first_chunk(b"[[],[]]"), "must be a pair"),
        (first_chunk(b"[[-1],{}]"), "not negative"),
        (first_chunk(b"[[true],{}]"), "whole numbers"),
        (first_chunk(b"[[1e3],{}]"), "whole numbers"),
        (first_chunk(b"[[64],{}]"), "do not make a payload"),
        (first_chunk(b"[[],{}]", payload=64), "do not make a payload"),
        (first_chunk(json.dumps([[0] * 70_000, {}]).encode()), "at most"),
        (GOOD + bytes(64), "or more"),
    ],
)
def test_what_is_not_a_frame_is_refused(chunk, why):
    with pytest.raises(ProtocolError, match=why):
        Decoder().feed(chunk)


@pytest.mark.parametrize(
    ("chunk", "why"),
    [
        (LONG[0], "out of order"),
        (LONG[2], "out of order"),
        (LONG[1][:16], "must not be empty"),
        (LONG[1] + bytes(2 * CHUNK_BYTES), "or more"),
    ],
)
def test_a_wrong_chunk_in_the_middle_is_refused(chunk, why):
    decoder = Decoder()
    decoder.feed(LONG[0])
    with pytest.raises(ProtocolError, match=why):
        decoder.feed(chunk)


def test_a_frame_cannot_be_repeated():
    decoder = Decoder()
    decoder.feed(GOOD)
    with pytest.raises(ProtocolError, match="expected frame 1 chunk 0, got 0 0"):
        decoder.feed(GOOD)


def test_the_largest_frame_is_the_receivers_choice():
    small = Decoder(max_frame_bytes=1024)
    assert small.feed(next(encode(frame(1024), 0))) is not None
    with pytest.raises(ProtocolError, match="the most is 1024"):
        small.feed(next(encode(frame(1025), 1)))


def test_a_header_too_long_is_refused_before_it_is_sent(monkeypatch):
    monkeypatch.setattr(frames, "MAX_HEADER_BYTES", 100)
    with pytest.raises(ProtocolError, match="too long"):
        next(encode(frame(name="x" * 100), 0))
