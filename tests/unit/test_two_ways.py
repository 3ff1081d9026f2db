"""Frames by a stream and through shared memory, as one thread takes them: order, end, how far is read ahead."""

import os
import queue
import signal
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from psl_flower.client import two_ways
from psl_flower.client.two_ways import frames
from psl_flower.exchange.frames import Decoder, Frame, encode, put
from psl_flower.exchange.shared_memory import Offer, accept, whereabouts

pytestmark = pytest.mark.skipif(not whereabouts(), reason="only Linux has such memory")

PATIENCE = 60


class BrokenError(Exception):
    """The stream is."""


class Server:
    """One end of both ways; the other takes frames."""

    def __init__(self):
        offer = Offer()
        self.client = accept(offer.header())
        offer.close()
        self.memory, self.number = offer.memory, 0
        self.memory.outgoing.open = True
        self.chunks = queue.SimpleQueue()
        self.decoder = Decoder()
        self.decoder.memory = self.client

    def send(self, size=0):
        frame = Frame({"n": self.number}, [[memoryview(np.zeros(size, np.uint8).data)]])
        if not put(frame, self.number, self.memory):
            for chunk in encode(frame, self.number, 0):
                self.chunks.put(chunk)
        self.number += 1

    def received(self):
        """Iterate over the chunks until one is None, or an error."""
        for chunk in iter(self.chunks.get, None):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def frames(self):
        return frames(self.received(), self.decoder, self.client)

    def close(self):
        self.chunks.put(None)
        self.client.close()
        self.memory.close()


@pytest.fixture
def server():
    with closing(Server()) as server:
        yield server


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "psl-stream"]


def test_frames_come_in_their_order_whichever_way_they_take(server):
    rng = np.random.default_rng(0)

    def send():
        for _ in range(200):
            if rng.integers(2):
                server.memory.outgoing.acknowledge(server.client.incoming.taken)
            server.send(int(rng.choice([0, 1000, 1_500_000])))
        server.chunks.put(None)

    sender = threading.Thread(target=send)
    sender.start()
    taken = [frame.header["n"] for frame in server.frames()]
    sender.join()
    assert taken == list(range(200))
    assert 0 < server.client.incoming.taken < 200


def test_what_the_stream_raises_is_raised_after_what_came_before(server):
    server.send()
    server.memory.outgoing.open = False
    server.send()
    server.chunks.put(BrokenError())
    both = server.frames()
    assert [next(both).header["n"] for _ in range(2)] == [0, 1]
    with pytest.raises(BrokenError):
        next(both)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_the_end_is_heard_while_a_forked_process_holds_all_files(server):
    """As a data loader's worker does, or what a data set forks."""
    server.send()
    both, ended = server.frames(), threading.Event()
    assert next(both).header == {"n": 0}
    child = os.fork()
    if child == 0:
        time.sleep(PATIENCE)
        os._exit(0)
    try:
        server.memory.close()
        server.chunks.put(BrokenError())

        def take():
            with pytest.raises(BrokenError):
                next(both)
            ended.set()

        threading.Thread(target=take, daemon=True).start()
        assert ended.wait(PATIENCE / 2)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_no_more_than_a_few_chunks_are_read_ahead_and_closing_ends_the_thread(server):
    read = []

    def chunks():
        for _ in range(100):
            server.memory.outgoing.open = False
            server.send()
            read.append(server.chunks.get())
            yield read[-1]

    others = len(readers())
    both = frames(chunks(), server.decoder, server.client)
    assert next(both).header == {"n": 0}
    (reader,) = readers()[others:]
    end = time.monotonic() + PATIENCE
    while len(read) < two_ways._AHEAD + 1 and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.05)  # in which all could be read
    assert two_ways._AHEAD < len(read) <= two_ways._AHEAD + 2
    both.close()
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert len(read) < 100


def test_all_files_are_closed(server):
    before = len(os.listdir("/proc/self/fd"))
    server.chunks.put(None)
    assert list(server.frames()) == []
    assert len(os.listdir("/proc/self/fd")) == before
