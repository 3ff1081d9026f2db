"""The one thread that serves all streams.

gRPC's asyncio module works with one event loop a process, so there is one, for all endpoints, made when it is first
needed. A stream costs some objects in it, not a thread; a step costs what the clients that take part in it cost.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

_END_SECONDS = 5.0  # for the frame that is being written

_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork has no threads of its parent's
_lock = threading.Lock()


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Do something in that thread, and wait for what comes of it; not to be called there."""
    return asyncio.run_coroutine_threadsafe(work, _loop()).result()


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        process = os.getpid()
        if process not in _loops:
            _loops[process] = loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="psl-streams", daemon=True)
            thread.start()
            atexit.register(_end, process, loop, thread)
        return _loops[process]


def _end(process: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """End the thread before the interpreter, which ends others wherever they are: in torch's code that is an abort."""
    if process == os.getpid():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_END_SECONDS)
