"""What the trainings of an audit log, and when not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warning_once(message: str, seen: set[str]) -> Iterator[None]:
    """Let a message be logged once only, whatever it is of, as long as this lasts.

    Parameters
    ----------
    message : str
        Before its arguments are put in.
    seen : set of str
        Holds it once it was logged.
    """

    def unseen(record: logging.LogRecord) -> bool:
        if record.msg != message:
            return True
        first = message not in seen
        seen.add(message)
        return first

    log = logging.getLogger("flwr.psl_flower")
    log.addFilter(unseen)
    try:
        yield
    finally:
        log.removeFilter(unseen)


@contextmanager
def quietly(level: int) -> Iterator[None]:
    """Keep what trainings log below a level out of the log, as long as this lasts."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
