"""Frames that come by the stream or through shared memory, in their order, in the thread that asks for them."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Iterable, Iterator

from psl_flower.exchange.frames import Decoder, Frame
from psl_flower.exchange.shared_memory import SharedMemory


def frames(chunks: Iterable[bytes], decoder: Decoder, memory: SharedMemory) -> Iterator[Frame]:
    """Yield frames until the stream ends.

    Who waits for two things waits for neither in its own way: another thread waits for the stream, and has a pipe say
    that something came. Most frames come through the memory, whose pipe wakes this thread and no other.

    Parameters
    ----------
    chunks : iterable of bytes
        Of the stream. What it raises is raised here.
    decoder : Decoder
        That of the stream so far, with the memory.
    memory : SharedMemory
    """
    came: deque[bytes | Exception | None] = deque()
    here, there = os.pipe()

    def read() -> None:
        try:
            for chunk in chunks:
                came.append(chunk)
                os.write(there, b".")
            came.append(None)
        except Exception as error:
            came.append(error)
        finally:
            os.close(there)  # which says so, too

    threading.Thread(target=read, name="psl-stream", daemon=True).start()
    wait = select.poll()
    wait.register(here, select.POLLIN)
    wait.register(memory.incoming.bell, select.POLLIN)
    try:
        while True:
            ready = [file for file, _ in wait.poll()]
            # the memory first: a chunk may be of a frame after the one that lies there
            yield from iter(decoder.take, None)
            if memory.incoming.ended and memory.incoming.bell in ready:  # the stream will tell why
                wait.unregister(memory.incoming.bell)
            if here not in ready:
                continue
            os.read(here, 1)
            chunk = came.popleft()
            if chunk is None:
                return
            if isinstance(chunk, Exception):
                raise chunk
            if (frame := decoder.feed(chunk)) is not None:
                yield frame
                yield from iter(decoder.take, None)
    finally:
        os.close(here)
