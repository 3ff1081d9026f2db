"""Memory shared by processes of one machine: what goes through it, who may open it, and what is left of it."""

import math
import os
import select
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from psl_flower.errors import ProtocolError
from psl_flower.exchange import shared_memory
from psl_flower.exchange.frames import Decoder, Frame, encode, put
from psl_flower.exchange.shared_memory import Offer, accept, aligned, whereabouts
from psl_flower.exchange.streams import open_files

pytestmark = pytest.mark.skipif(not whereabouts(), reason="only Linux has such memory")

SIZE = 100_000


class End:
    """One end of a stream."""

    def __init__(self, memory):
        self.memory, self.decoder, self.number = memory, Decoder(), 0
        self.decoder.memory = memory

    def send(self, *sizes, fill=1):
        """Return the chunks that the stream has to carry."""
        frame = Frame({"fill": fill}, [[memoryview(np.full(size, fill, np.uint8).data)] for size in sizes])
        number, self.number = self.number, self.number + 1
        return [] if put(frame, number, self.memory) else list(encode(frame, number, self.memory.incoming.taken))

    def receive(self, chunks=()):
        if not chunks:
            return self.decoder.take()
        *before, last = map(self.decoder.feed, chunks)
        assert not any(before)
        return last


def taken_up(offer):
    client = End(accept(offer.header()))
    offer.close()
    offer.memory.outgoing.open = True
    return End(offer.memory), client


@pytest.fixture
def ends():
    server, client = taken_up(Offer())
    yield server, client
    for end in (server, client):
        end.memory.close()


def test_frames_lie_in_the_memory_and_the_stream_carries_nothing(ends):
    server, client = ends
    for sender, receiver, fill in [(server, client, 1), (client, server, 2), (server, client, 3)]:
        assert receiver.receive() is None
        assert not sender.send(SIZE, 7, SIZE, fill=fill)
        frame = receiver.receive()
        assert frame.header == {"fill": fill}
        assert [bytes(pieces[0]) for pieces in frame.buffers] == [bytes([fill]) * n for n in (SIZE, 7, SIZE)]
        assert np.frombuffer(frame.buffers[2][0], np.uint8).ctypes.data % 64 == 0  # as tensors of torch's own


def test_a_frame_is_not_written_over_before_it_was_copied(ends):
    server, client = ends
    assert not server.send(SIZE, fill=1)
    second = server.send(SIZE, fill=2)  # takes the stream
    frames = [client.receive(), client.receive(second)]
    third = server.send(SIZE, fill=3)  # nobody has said yet that the first was copied
    frames.append(client.receive(third))
    client.send()
    assert server.receive().header == {"fill": 1}
    assert not server.send(SIZE, fill=4)
    frames.append(client.receive())
    assert [bytes(frame.buffers[0][0]) for frame in frames] == [bytes([n]) * SIZE for n in (1, 2, 3, 4)]


def test_a_frame_in_the_memory_waits_for_those_before_it(ends):
    server, client = ends
    server.memory.outgoing.open = False
    first = server.send(SIZE, fill=1)
    server.memory.outgoing.open = True
    assert not server.send(SIZE, fill=2)
    assert client.receive() is None
    assert client.receive(first).header == {"fill": 1}
    assert client.receive().header == {"fill": 2}


def test_what_does_not_fit_takes_the_stream(monkeypatch):
    monkeypatch.setattr(shared_memory, "MEMORY_BYTES", 2**16)
    server, client = taken_up(Offer())
    assert not server.send(2**16 - 128)
    assert client.receive() is not None
    client.send()
    server.receive()
    assert server.send(2**16 - 60)  # its header is too much
    assert server.send(SIZE)


def test_nothing_is_written_before_the_other_has_the_memory():
    offer = Offer()
    assert End(offer.memory).send(SIZE)
    offer.close()


@pytest.mark.parametrize("length", [2**26 + 1, 2**63, 10])
def test_a_frame_that_is_not_there_is_refused(ends, length):
    server, client = ends
    os.write(server.memory.outgoing._bell, struct.pack("<QQ", 0, length))
    with pytest.raises(ProtocolError, match=r"does not lie in a shared memory of 67108864|at least 16 bytes long"):
        client.receive()


def test_a_frame_cut_short_is_refused(ends):
    server, client = ends
    server.send(SIZE)
    os.read(client.memory.incoming.bell, 16)
    os.write(server.memory.outgoing._bell, struct.pack("<QQ", 0, SIZE))
    with pytest.raises(ProtocolError, match="lacks 96 bytes"):
        client.receive()


def test_a_frame_that_was_there_before_is_refused(ends):
    server, client = ends
    server.send(SIZE)
    client.receive()
    os.write(server.memory.outgoing._bell, struct.pack("<QQ", 0, SIZE))
    with pytest.raises(ProtocolError, match="out of order: expected frame 1, frame 0 lies in shared memory"):
        client.receive()


def test_more_copied_than_was_written_is_refused(ends):
    server, client = ends
    client.memory.incoming.taken = 5
    client.send()
    with pytest.raises(ProtocolError, match="5 frames cannot have been taken out of shared memory, 0 lay there"):
        server.receive()


def test_writing_to_one_that_is_gone_does_no_harm():
    """Whoever gives SIGPIPE its default back would be killed by one."""
    server, client = taken_up(Offer())
    client.memory.close()
    signals = []
    before = signal.signal(signal.SIGPIPE, lambda *which: signals.append(which))
    try:
        assert not server.send(SIZE)
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert not signals
    assert server.receive() is None
    server.memory.close()
    server.memory.close()  # is closed once
    assert server.send(SIZE)


def test_the_pipe_is_empty_while_a_frame_waits_for_one_that_is_half_there(ends):
    """Whoever waits for the pipe would be woken again and again."""
    server, client = ends
    server.memory.outgoing.open = False
    *before, last = server.send(3 * 2**20)
    server.memory.outgoing.open = True
    assert before
    assert not any(map(client.decoder.feed, before))
    assert not server.send(SIZE, fill=2)
    assert client.receive() is None
    assert not select.select([client.memory.incoming.bell], [], [], 0)[0]
    assert client.receive([last]).header == {"fill": 1}
    assert client.receive().header == {"fill": 2}


def test_who_rings_before_the_last_frame_was_taken_is_refused(ends):
    server, client = ends
    server.send(SIZE)
    client.decoder._open = object()
    assert client.receive() is None
    os.write(server.memory.outgoing._bell, struct.pack("<QQ", 1, SIZE))
    with pytest.raises(ProtocolError, match="one frame in shared memory at a time"):
        client.receive()


def test_a_pipe_that_says_something_else_is_refused(ends):
    server, client = ends
    os.write(server.memory.outgoing._bell, b"short")
    with pytest.raises(ProtocolError, match="in 16 bytes"):
        client.receive()


@pytest.mark.parametrize("header", [{"x": math.nan}, {"x": object()}, {"x": "y" * 2**24}])
def test_what_cannot_be_encoded_is_told_before_anything_of_it_is_sent(ends, header):
    server, client = ends
    with pytest.raises(ProtocolError, match=r"must be what JSON can say|a header of 16777248 bytes is too long"):
        put(Frame(header), 0, server.memory)
    with pytest.raises(ProtocolError):
        encode(Frame(header), 0)  # before its first chunk is asked for
    assert not server.send(SIZE)
    assert client.receive() is not None


# --- files -----------------------------------------------------------------------------------------------------------
def files():
    return len(os.listdir("/proc/self/fd"))


def test_as_many_files_are_open_as_are_reckoned_with_and_none_is_left():
    before = files()
    offer = Offer()
    assert files() == before + open_files._OF_MEMORY
    client = accept(offer.header())
    offer.close()
    assert files() == before + 2 * (open_files._OF_MEMORY - 1)
    client.close()
    offer.memory.close()
    assert files() == before


@pytest.mark.parametrize("what", ["ftruncate", "pipe2", "readlink"])
def test_an_offer_that_fails_leaves_no_file_open(monkeypatch, what):
    before = files()

    def fail(*args):
        raise OSError("none is left")

    monkeypatch.setattr(os, what, fail)
    with pytest.raises(OSError, match="none is left"):
        Offer()
    assert files() == before


def test_an_offer_that_is_not_taken_leaves_no_file_open():
    before = files()
    offer = Offer()
    offered = files()
    for change in ({"bytes": 2**20}, {"pipes": [offer.header()["pipes"][0], 1]}):
        with pytest.raises(OSError, match="is not"):
            accept({**offer.header(), **change})
        assert files() == offered
    offer.close()
    offer.memory.close()
    assert files() == before


def test_a_file_that_has_changed_since_it_was_looked_at_is_not_taken(monkeypatch, tmp_path):
    """The server may have closed what it offered, and have something of value under its number."""
    offer = Offer()
    header, real, other = offer.header(), os.readlink, os.open(tmp_path / "checkpoint", os.O_RDWR | os.O_CREAT)

    def readlink(path):
        found = real(path)
        if str(path) == f"/proc/{os.getpid()}/fd/{header['files'][0]}":
            os.dup2(other, header["files"][0])
        return found

    monkeypatch.setattr(os, "readlink", readlink)
    with pytest.raises(FileNotFoundError, match="is not /memfd:psl-flower-"):
        accept(header)
    monkeypatch.undo()
    os.close(other)
    offer.close()
    offer.memory.close()


def test_the_memory_has_no_name_cannot_be_cut_off_and_is_only_the_users(ends):
    offer = Offer()
    process, files = offer.header()["process"], offer.header()["files"]
    status = os.fstat(files[0])
    assert (status.st_mode & 0o777, status.st_uid, status.st_nlink) == (0o600, os.getuid(), 0)
    with pytest.raises(PermissionError):
        os.ftruncate(files[0], 0)
    for file in files if os.getuid() == 0 else ():  # only root can try as somebody else
        program = f"import os; os.setuid(65534); os.open('/proc/{process}/fd/{file}', os.O_RDONLY)"
        tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "PermissionError" in tried.stderr
    offer.close()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"process": 2**30}, OSError),
        ({"files": [0, 1, 2]}, OSError),
        ({"bytes": 2**20}, OSError),
        ({"pipes": [1, 2]}, OSError),
        ({"name": "psl-flower-of-another-machine"}, OSError),
        ({"name": "etc"}, ProtocolError),
        ({"bytes": 0}, ProtocolError),
        ({"bytes": None}, ProtocolError),
        ({"files": ["0", 1, 2]}, ProtocolError),
        ({"files": [0, 1]}, ProtocolError),
        ({"pipes": 1}, ProtocolError),
        ({"process": -1}, ProtocolError),
        ({"process": None}, ProtocolError),
    ],
)
def test_an_offer_that_cannot_be_taken_is_told(change, error):
    offer = Offer()
    with pytest.raises(error):
        accept({**offer.header(), **change})
    offer.close()


@pytest.mark.parametrize("size", [0, 1, 64, 1000])
def test_copies_begin_where_tensors_do(size):
    memory = aligned(size)
    assert len(memory) == size
    assert np.frombuffer(memory, np.uint8).ctypes.data % 64 == 0 if size else True
