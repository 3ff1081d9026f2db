"""Warnings about data, in whose process a hundred clients may live."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("flwr.psl_flower")


@functools.cache
def tell_once(text: str) -> None:
    """Warn once in a process."""
    log.warning(text)
