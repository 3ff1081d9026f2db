"""What the trainings of an audit log, and when not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
