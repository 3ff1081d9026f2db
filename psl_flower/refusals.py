"""What is refused is told in the log, in a sentence, but not without end: who keeps knocking shall not fill it."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger("flwr.psl_flower")

_LOGGED = 20  # then only every thousandth


class Refusals:
    """Logs what is refused, and counts it. Safe for threads.

    Parameters
    ----------
    what : str
        What is refused, with a place for whose it is: "a stream from {}".
    """

    def __init__(self, what: str) -> None:
        self._what, self._count, self._lock = what, 0, threading.Lock()

    def add(self, whose: object, reason: object) -> None:
        """Take note of one."""
        with self._lock:
            self._count += 1
            if self._count <= _LOGGED or self._count % 1000 == 0:
                log.warning("Refused %s: %s (%d so far).", self._what.format(whose), reason, self._count)
