"""One client process, as the server sees it: what it is sent, in its order, and what came of it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from itertools import count

from psl_flower.errors import ProtocolError
from psl_flower.exchange.codec import Sent
from psl_flower.exchange.frames import Decoder, Frame, encode, put
from psl_flower.exchange.limits import MAX_FRAME_BYTES, MAX_HEADER_BYTES, MAX_UNASKED_HEADER
from psl_flower.exchange.shared_memory import Offer, SharedMemory

_MAX_WAITING = 16  # frames on their way to one process
_MAX_UNASKED = 16  # replies of one process that nobody asked for

# Makes a frame when its turn has come; None if it is not wanted any more.
Job = Callable[[], Frame | None]


class Connection:
    """One client process, as the server sees it. Safe for threads.

    Parameters
    ----------
    peer : str
        Its address, for the log.
    max_frame_bytes : int
        Of the largest frame let in.
    """

    _ids = count()

    def __init__(self, peer: str, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.peer = peer
        self.id = next(Connection._ids)
        self.decoder = Decoder(max_frame_bytes)
        self.sent_weights: Sent = {}  # read and written by the jobs, which run one after the other
        self.offer: Offer | None = None  # of memory, until it is answered
        self.memory: SharedMemory | None = None  # with a process of this machine
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._number = 0  # frames so far
        self._idle = True  # whether no job is being done by `write`
        self.ended = False  # whether `Closed` was told: nothing comes after it
        self._closing: str | None = None
        self._unanswered = 0  # requests sent less replies received; below zero, replies that nobody asked for
        self._wake: Callable[[], object] = lambda: None

    def replied(self) -> None:
        """Take note of a reply.

        Raises
        ------
        ProtocolError
            If far more came than were asked for: they would fill the memory.
        """
        with self._lock:
            self._unanswered -= 1
            if self._unanswered < -_MAX_UNASKED:
                raise ProtocolError(f"it sent {_MAX_UNASKED} replies that nobody asked for")

    @property
    def is_asked(self) -> bool:
        """Whether a reply is to come."""
        return self._unanswered > 0

    def send(self, job: Job, *, asks: bool = False) -> bool:
        """Have a frame sent after those before; False if the stream is closing, or the process does not read.

        Parameters
        ----------
        job : callable
        asks : bool
            Whether it is to be replied to.
        """
        with self._lock:
            if self._closing is not None or len(self._jobs) >= _MAX_WAITING:
                return False
            self._unanswered += asks
            if self.memory is not None and self.memory.outgoing.has_room(0) and self._idle and not self._jobs:
                # here and now: to have another thread do it costs more than the doing
                try:
                    frame = job()
                    if frame is None or self._put(frame, self.memory):
                        self._unanswered -= asks and frame is None
                        return True
                    job = partial(_same, frame)
                except Exception as error:  # as in `write`: this stream ends, not the run
                    self._unanswered -= asks
                    self._closing = _unsendable(error)
            if self._closing is None:
                self._jobs.append(job)
        self._wake()
        return self._closing is None

    def _put(self, frame: Frame, memory: SharedMemory) -> bool:
        done = put(frame, self._number, memory)
        self._number += done
        return done

    def feed(self, chunk: bytes) -> Frame | None:
        """Return the frame that a chunk completes, if it does."""
        self.decoder.max_header = MAX_HEADER_BYTES if self.is_asked else MAX_UNASKED_HEADER
        return self.decoder.feed(chunk)

    def take(self) -> Frame | None:
        """Return the next frame, if it lies in shared memory."""
        self.decoder.max_header = MAX_HEADER_BYTES if self.is_asked else MAX_UNASKED_HEADER
        return self.decoder.take()

    def close(self, reason: str) -> None:
        """End the stream once what waits is sent."""
        with self._lock:
            if self._closing is None:
                self._closing = reason
        self._wake()

    @property
    def closing(self) -> str | None:
        """Why the stream is closing; None while it is open."""
        return self._closing

    async def write(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Write what is to be sent, as it comes, until the stream closes."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(changed.set)
        while True:
            changed.clear()
            with self._lock:
                job = self._jobs.popleft() if self._jobs else None
                self._idle = job is None
            if job is not None:
                try:
                    chunks = self._chunks(job)
                except Exception as error:
                    self.close(_unsendable(error))
                    return
                for chunk in chunks:
                    await write(chunk)
            elif self._closing is not None:
                return
            else:
                await changed.wait()

    def _chunks(self, job: Job) -> Iterable[bytes]:
        """Return what the stream has to carry of a frame."""
        frame = job()
        with self._lock:  # in which the memory is forgotten
            if frame is None or (self.memory is not None and self._put(frame, self.memory)):
                return ()
            chunks = encode(frame, self._number, None if self.memory is None else self.memory.incoming.taken)
            self._number += 1  # what cannot be encoded was not sent
        return chunks

    def forget_memory(self) -> None:
        """Use no shared memory any more."""
        with self._lock:
            if self.offer is not None:
                self.offer.close()
            if self.memory is not None:
                self.memory.close()
            self.offer = self.memory = self.decoder.memory = None


def _unsendable(error: Exception) -> str:
    return f"what it was to be asked cannot be sent: {error!s:.300}"


def _same(frame: Frame) -> Frame:
    return frame
