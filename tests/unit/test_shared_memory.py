"""Memory shared by processes of one machine: what goes through it, who may open it, and what is left of it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from psl_flower.errors import ProtocolError
from psl_flower.exchange import shared_memory
from psl_flower.exchange.frames import Decoder, Frame, encode
from psl_flower.exchange.shared_memory import Offer, accept, aligned, whereabouts

pytestmark = pytest.mark.skipif(not whereabouts(), reason="only Linux has such memory")

SIZE = 100_000


class End:
    """One end of a stream."""

    def __init__(self, memory):
        self.memory, self.decoder, self.number = memory, Decoder(memory=memory), 0

    def send(self, *sizes, fill=1):
        buffers = [[memoryview(np.full(size, fill, np.uint8).data)] for size in sizes]
        chunks = list(encode(Frame({"fill": fill}, buffers), self.number, self.memory))
        self.number += 1
        return chunks

    def receive(self, chunks):
        *before, last = map(self.decoder.feed, chunks)
        assert not any(before)
        return last


@pytest.fixture
def ends():
    offer = Offer()
    client = End(accept(offer.header()))
    offer.close()
    offer.memory.outgoing.open = True
    return End(offer.memory), client


def length(chunks):
    return sum(map(len, chunks))


def test_payloads_lie_in_the_memory_and_the_stream_carries_headers(ends):
    server, client = ends
    for sender, receiver, fill in [(server, client, 1), (client, server, 2), (server, client, 3)]:
        chunks = sender.send(SIZE, 7, SIZE, fill=fill)
        assert length(chunks) < 300
        frame = receiver.receive(chunks)
        assert [bytes(pieces[0]) for pieces in frame.buffers] == [bytes([fill]) * n for n in (SIZE, 7, SIZE)]


def test_a_payload_is_not_written_over_before_it_was_copied(ends):
    server, client = ends
    first, second = server.send(SIZE, fill=1), server.send(SIZE, fill=2)
    assert length(first) < 300 < SIZE < length(second)  # the second takes the stream
    frames = [client.receive(chunks) for chunks in (first, second)]
    third = server.send(SIZE, fill=3)  # nobody has said yet that the first was copied
    assert length(third) > SIZE
    frames.append(client.receive(third))
    server.receive(client.send())
    fourth = server.send(SIZE, fill=4)
    assert length(fourth) < 300
    frames.append(client.receive(fourth))
    assert [bytes(frame.buffers[0][0]) for frame in frames] == [bytes([n]) * SIZE for n in (1, 2, 3, 4)]


def test_what_is_small_or_does_not_fit_takes_the_stream(ends, monkeypatch):
    server, _ = ends
    assert length(server.send(100)) > 100
    monkeypatch.setattr(shared_memory, "MEMORY_BYTES", 2**16)
    offer = Offer()
    offer.memory.outgoing.open = True
    assert length(End(offer.memory).send(SIZE)) > SIZE
    offer.close()


def test_nothing_is_written_before_the_other_has_the_memory():
    offer = Offer()
    assert length(End(offer.memory).send(SIZE)) > SIZE
    offer.close()


@pytest.mark.parametrize("sizes", [(SIZE,), (2**26 + 1,)])
def test_a_payload_that_is_not_there_is_refused(ends, sizes):
    server, client = ends
    server.memory.outgoing.open = False
    chunks = [chunk.replace(b"0,false]", b"0,true] ") for chunk in server.send(*sizes)]
    with pytest.raises(ProtocolError, match=r"lies? in (a )?shared memory"):
        client.receive(chunks[:1])


def test_more_copied_than_was_written_is_refused(ends):
    server, client = ends
    client.memory.incoming.taken = 5
    with pytest.raises(ProtocolError, match="5 payloads cannot have been taken out of shared memory, 0 lay there"):
        server.receive(client.send())


def test_the_memory_has_no_name_cannot_be_cut_off_and_is_only_the_users(ends):
    offer = Offer()
    process, file = offer.header()["process"], offer.header()["files"][0]
    status = os.fstat(file)
    assert (status.st_mode & 0o777, status.st_uid, status.st_nlink) == (0o600, os.getuid(), 0)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 0)
    if os.getuid() == 0:  # only root can try as somebody else
        program = f"import os; os.setuid(65534); os.open('/proc/{process}/fd/{file}', os.O_RDONLY)"
        tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "PermissionError" in tried.stderr
    offer.close()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"process": 2**30}, OSError),
        ({"files": [0, 1]}, OSError),
        ({"name": "psl-flower-of-another-machine"}, OSError),
        ({"name": "etc"}, ProtocolError),
        ({"files": ["0", 1]}, ProtocolError),
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
