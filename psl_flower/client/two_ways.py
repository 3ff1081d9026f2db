"""Frames that come by the stream or through shared memory, in their order, in the thread that asks for them."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Generator, Iterable

from psl_flower.exchange.frames import Decoder, Frame
from psl_flower.exchange.shared_memory import SharedMemory

_AHEAD = 4  # chunks that are read before they are asked for


def frames(chunks: Iterable[bytes], decoder: Decoder, memory: SharedMemory) -> Generator[Frame, None, None]:
    """Yield frames until the stream ends.

    Who waits for two things waits for neither in its own way: another thread waits for the stream, and rings when
    something came. Most frames come through the memory, whose pipe wakes this thread and no other.

    Parameters
    ----------
    chunks : iterable of bytes
        Of the stream. What it raises is raised here.
    decoder : Decoder
        That of the stream so far, with the memory.
    memory : SharedMemory
    """
    inbox = _Inbox(chunks)
    wait = select.poll()
    wait.register(inbox.bell, select.POLLIN)
    wait.register(memory.incoming.bell, select.POLLIN)
    try:
        while True:
            came = inbox.bell in [file for file, _ in wait.poll()]
            # the memory first: a chunk may be of a frame after the one that lies there
            if (frame := decoder.take()) is not None:
                yield frame
            if not came:
                continue
            if (chunk := inbox.next()) is None:
                return
            if (frame := decoder.feed(chunk)) is not None:
                yield frame
                if (frame := decoder.take()) is not None:  # it may have waited for this one
                    yield frame
    finally:
        inbox.close()


class _Inbox:
    """Reads a stream in a thread of its own, a few chunks ahead.

    Attributes
    ----------
    bell : int
        A file that can be read from as long as something is there; so it is with the end, which takes nobody's closing
        of a file: a forked process would keep it open.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._came: deque[bytes | Exception | None] = deque()
        self._room = threading.Semaphore(_AHEAD)
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._read, args=(chunks,), name="psl-stream", daemon=True).start()

    def next(self) -> bytes | None:
        """Return the next chunk, None at the end, or raise what the stream raised."""
        os.eventfd_read(self.bell)
        chunk = self._came.popleft()
        self._room.release()
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    def close(self) -> None:
        """Take nothing more; the thread ends with the stream, or when it has read one more chunk."""
        with self._lock:
            self._closed = True
            os.close(self.bell)
        self._room.release()

    def _read(self, chunks: Iterable[bytes]) -> None:
        try:
            for chunk in chunks:
                if not self._put(chunk):
                    return
                self._room.acquire()
            self._put(None)
        except Exception as error:
            self._put(error)

    def _put(self, chunk: bytes | Exception | None) -> bool:
        with self._lock:
            if not self._closed:
                self._came.append(chunk)
                os.eventfd_write(self.bell, 1)
            return not self._closed
