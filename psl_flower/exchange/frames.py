"""Frames: what a stream carries, cut into chunks of bounded size. Pure bytes; nothing is pickled.

Note [Frame layout]: a frame is a JSON header and raw buffers. It travels as chunks, one gRPC message each::

    chunk   := prefix body
    prefix  := magic "PSLF", version u8, 3 zero bytes, frame number u32, chunk index u32       (16 bytes, little-endian)
    frame   := header length u32, 4 zero bytes, payload length u64, header, padding, payload   (all chunks' bodies)
    payload := the buffers, each padded to a multiple of 64 bytes

The first chunk holds the header whole. Frames are numbered from 0 and their chunks follow each other in order, so what
is lost, repeated, cut short or made up is noticed at once. The header is a list: how long each buffer is, and an
object; between two processes of one machine also how many frames its sender has taken out of the memory they share,
see Note [Shared memory] in shared_memory.py: a frame that lies there is all bodies in one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from psl_flower.errors import ProtocolError
from psl_flower.exchange.limits import MAX_BUFFERS, MAX_CONTAINERS, MAX_FRAME_BYTES, MAX_HEADER_BYTES
from psl_flower.exchange.shared_memory import SharedMemory, aligned

Buffer = memoryview  # of bytes, contiguous

# Small enough that TLS, the socket and the copies of two chunks overlap, large enough that Python's share is small: of
# 64 kB, 256 kB, 1 MB and 4 MB the third was the fastest for 16 MB, by a fifth over the second.
CHUNK_BYTES = 2**20
# What gRPC must accept: a first chunk is as long as the header it holds. Anything longer never reaches Python.
MAX_CHUNK_BYTES = MAX_HEADER_BYTES + CHUNK_BYTES

_PREFIX = struct.Struct("<4sB3xII")
_LENGTHS = struct.Struct("<I4xQ")
_MAGIC = b"PSLF"
_VERSION = 1
_ALIGNMENT = 64
_PADDING = bytes(_ALIGNMENT)
_MOST_OF_LENGTH = 24  # characters of a buffer's length in a header, with what stands around it


@dataclass(frozen=True, eq=False)
class Frame:
    """A header and raw buffers.

    Parameters
    ----------
    header : dict
        What JSON can say.
    buffers : sequence of (sequence of memoryview)
        Each buffer in pieces, which are joined on the way; a decoded frame has one piece a buffer.
    """

    header: Mapping[str, Any]
    buffers: Sequence[Sequence[Buffer]] = ()

    @cached_property
    def text(self) -> bytes:
        """The header in JSON.

        Raises
        ------
        ProtocolError
            If JSON cannot say it, or the other side would refuse it for its length.
        """
        try:
            text = _WRITER.encode(self.header).encode()
        except (TypeError, ValueError, RecursionError) as exc:
            raise ProtocolError(f"a header must be what JSON can say: {exc!s:.200}") from exc
        length = len(text) + _MOST_OF_LENGTH * (len(self.buffers) + 1)
        if length > MAX_HEADER_BYTES:
            raise ProtocolError(
                f"a header of {length} bytes is too long, the most is {MAX_HEADER_BYTES}: it holds all but the tensors "
                "(configuration, which rows to leave out, names of parameters): send less of them"
            )
        return text

    def num_bytes(self) -> int:
        """Return the bytes of all buffers."""
        return sum(piece.nbytes for pieces in self.buffers for piece in pieces)


def encode(frame: Frame, number: int, taken: int | None = None) -> Iterator[bytes]:
    """Cut a frame into chunks, one at a time: no more than a chunk of it is ever copied ahead of the network.

    Parameters
    ----------
    number : int
        How many frames went before on this stream.
    taken : int, optional
        How many frames have been taken out of shared memory, if there is one.

    Raises
    ------
    ProtocolError
        At once, if it cannot be: no chunk of it has been made then.
    """
    lengths, payload = _lengths(frame)
    return _chunks(number, _first(frame, lengths, payload, taken), _pieces(frame.buffers, lengths))


def _chunks(number: int, first: list[bytes], pieces: Iterator[Buffer]) -> Iterator[bytes]:
    for index, body in enumerate(_bodies(first, pieces)):
        yield b"".join([_PREFIX.pack(_MAGIC, _VERSION, number & 0xFFFFFFFF, index), *body])


def join(frame: Frame) -> bytes:
    """Return a frame in one piece, for `parse`.

    Raises
    ------
    ProtocolError
        If it cannot be encoded.
    """
    lengths, payload = _lengths(frame)
    return b"".join([*_first(frame, lengths, payload, None), *_pieces(frame.buffers, lengths)])


def parse(data: bytes) -> Frame:
    """Return the frame that is in one piece; its buffers are views of a copy.

    Raises
    ------
    ProtocolError
        If it is not one.
    """
    copy = aligned(len(data))
    copy[:] = data
    return Decoder(len(data)).whole(copy)


def put(frame: Frame, number: int, memory: SharedMemory) -> bool:
    """Lay a frame into shared memory; return whether there is room. If not, it is to take the stream.

    Raises
    ------
    ProtocolError
        If it cannot be encoded; nothing has been written then.
    """
    lengths, payload = _lengths(frame)
    if not memory.outgoing.has_room(payload):  # before its header is written
        return False
    first = _first(frame, lengths, payload, memory.incoming.taken)
    if not memory.outgoing.has_room(sum(map(len, first)) + payload):
        return False
    memory.outgoing.put(number, [*first, *_pieces(frame.buffers, lengths)])
    return True


def _lengths(frame: Frame) -> tuple[list[int], int]:
    """Return the bytes of each buffer, and of all with their padding."""
    lengths = [sum(piece.nbytes for piece in pieces) for pieces in frame.buffers]
    return lengths, sum(map(_padded, lengths))


def _first(frame: Frame, lengths: list[int], payload: int, taken: int | None) -> list[bytes]:
    """Return what comes before the payload."""
    after = b"" if taken is None else b",%d" % taken
    header = b"[[%s],%s%s]" % (",".join(map(str, lengths)).encode(), frame.text, after)
    return [_LENGTHS.pack(len(header), payload), header, _PADDING[: -(_LENGTHS.size + len(header)) % _ALIGNMENT]]


def _pieces(buffers: Sequence[Sequence[Buffer]], lengths: Sequence[int]) -> Iterator[Buffer]:
    for pieces, length in zip(buffers, lengths, strict=True):
        for piece in pieces:
            if piece.nbytes:
                yield piece.cast("B")
        if padding := -length % _ALIGNMENT:
            yield memoryview(_PADDING)[:padding]


def _bodies(first: list[bytes], pieces: Iterator[Buffer]) -> Iterator[list[Any]]:
    """Yield the parts of each chunk's body: the first with the header, then up to `CHUNK_BYTES` each."""
    body: list[Any] = [*first]
    room = CHUNK_BYTES
    for piece in pieces:
        while len(piece) > room:
            yield [*body, piece[:room]]
            piece, body, room = piece[room:], [], CHUNK_BYTES
        body.append(piece)
        room -= len(piece)
    yield body


class Decoder:
    """Puts the chunks of one stream together again.

    Parameters
    ----------
    max_frame_bytes : int
        Payload of the largest frame let in.

    Attributes
    ----------
    memory : SharedMemory or None
        Where frames may lie.
    max_header : int
        Bytes of the longest header let in next.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max = max_frame_bytes
        self.memory: SharedMemory | None = None
        self.max_header = MAX_HEADER_BYTES
        self._number = 0
        self._open: _Open | None = None

    def feed(self, chunk: bytes) -> Frame | None:
        """Take the next chunk; return the frame it completes, if it does.

        Raises
        ------
        ProtocolError
            If it is not what has to come next. The stream is of no use any more.
        """
        if len(chunk) < _PREFIX.size:
            raise ProtocolError(f"a chunk needs at least {_PREFIX.size} bytes, got {len(chunk)}")
        magic, version, number, index = _PREFIX.unpack_from(chunk)
        if magic != _MAGIC or version != _VERSION:
            raise ProtocolError(f"not a frame of version {_VERSION}: it starts with {chunk[:5].hex(' ')}")
        expected = (self._number & 0xFFFFFFFF, 0 if self._open is None else self._open.chunks)
        if (number, index) != expected:
            raise ProtocolError(f"out of order: expected frame {expected[0]} chunk {expected[1]}, got {number} {index}")
        body = memoryview(chunk)[_PREFIX.size :]
        if self._open is None:
            self._open = self._begin(body)
        else:
            self._open.add(body)
        return None if self._open.missing() else self._finish(self._open)

    def take(self) -> Frame | None:
        """Return the frame that lies in shared memory, if one does and it is the next.

        Raises
        ------
        ProtocolError
            If it is not one. The stream is of no use any more.
        """
        # what the pipe says is taken off it in any case: who waits for it is woken as long as something is there
        if self.memory is None or (number := self.memory.incoming.look()) is None or self._open is not None:
            return None
        if number != self._number:
            if number < self._number:
                raise ProtocolError(
                    f"out of order: expected frame {self._number}, frame {number} lies in shared memory"
                )
            return None  # those before it are on their way
        return self.whole(self.memory.incoming.take())

    def whole(self, body: memoryview) -> Frame:
        """Return the next frame, which is in one piece: all chunks' bodies."""
        found = self._begin(body)
        if missing := found.missing():
            raise ProtocolError(f"a frame in one piece lacks {missing} bytes of its payload")
        return self._finish(found)

    def _finish(self, whole: _Open) -> Frame:
        self._open = None
        self._number += 1
        return whole.frame()

    def _begin(self, body: memoryview) -> _Open:
        if len(body) < _LENGTHS.size:
            raise ProtocolError(f"a first chunk is at least {_LENGTHS.size} bytes long, got {len(body)}")
        header_length, payload_length = _LENGTHS.unpack_from(body)
        if header_length > self.max_header:
            raise ProtocolError(f"a header of {header_length} bytes is too long, the most is {self.max_header}")
        if payload_length > self._max:
            raise ProtocolError(f"a frame of {payload_length} bytes is too long, the most is {self._max}")
        start = _LENGTHS.size + header_length
        if len(body) < start:
            raise ProtocolError(f"the header is cut short: {len(body) - _LENGTHS.size} of {header_length} bytes")
        lengths, header, taken = _parse(bytes(body[_LENGTHS.size : start]))
        if sum(map(_padded, lengths)) != payload_length:
            raise ProtocolError(f"buffers of {sum(lengths)} bytes do not make a payload of {payload_length}")
        body = body[start + -start % _ALIGNMENT :]
        if self.memory is not None and taken is not None:
            self.memory.outgoing.acknowledge(taken)
        return _Open(header, lengths, payload_length, body)


class _Open:
    """A frame some chunks of which are there."""

    def __init__(self, header: dict[str, Any], lengths: list[int], length: int, body: memoryview) -> None:
        self._header, self._lengths, self._length = header, lengths, length
        self.chunks = 1
        self._filled = len(body)
        self._check()
        # not zeroed: a claim of many bytes costs none before they arrive
        self._payload = body if self._filled == length else aligned(length)
        if self._payload is not body:
            self._payload[: len(body)] = body

    def add(self, body: memoryview) -> None:
        """Add the next chunk's bytes."""
        if not body:
            raise ProtocolError("a chunk in the middle of a frame must not be empty")
        begin, self._filled = self._filled, self._filled + len(body)
        self._check()
        self._payload[begin : self._filled] = body
        self.chunks += 1

    def missing(self) -> int:
        """Return the bytes that are not there yet."""
        return self._length - self._filled

    def frame(self) -> Frame:
        """Return the frame; its buffers are views."""
        buffers, begin = [], 0
        for length in self._lengths:
            buffers.append((self._payload[begin : begin + length],))
            begin += _padded(length)
        return Frame(self._header, buffers)

    def _check(self) -> None:
        if self._filled > self._length:
            raise ProtocolError(f"a frame of {self._length} bytes has {self._filled} or more")


def parse_header(text: bytes) -> Any:
    """Return what a header says, or raise ProtocolError if it is too long, or not JSON."""
    if len(text) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(text)} bytes is too long, the most is {MAX_HEADER_BYTES}")
    if (found := text.count(b"[") + text.count(b"{")) > MAX_CONTAINERS:
        raise ProtocolError(f"a header of {found} lists and objects is too much, the most is {MAX_CONTAINERS}")
    try:
        return _READER.decode(text.decode())
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"the header is not JSON: {exc!s:.80}") from exc


def _parse(text: bytes) -> tuple[list[int], dict[str, Any], int | None]:
    content = parse_header(text)
    if isinstance(content, list) and len(content) == 2:
        content.append(None)
    if not isinstance(content, list) or len(content) != 3 or not isinstance(content[1], dict):
        raise ProtocolError("the header must be a pair: lengths of the buffers, and an object")
    lengths, header, taken = content
    if not (taken is None or type(taken) is int):
        raise ProtocolError("what the header says of shared memory must be a whole number")
    if not isinstance(lengths, list) or len(lengths) > MAX_BUFFERS:
        raise ProtocolError(f"the header must name the lengths of at most {MAX_BUFFERS} buffers")
    if any(type(n) is not int or not 0 <= n <= 2**62 for n in lengths):
        raise ProtocolError("lengths of buffers must be whole numbers, not negative")
    return lengths, header, taken


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# made once: json.dumps and json.loads make one for every call that says how
_WRITER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_READER = json.JSONDecoder(parse_constant=_refuse_constant)


def _padded(length: int) -> int:
    return length + -length % _ALIGNMENT
