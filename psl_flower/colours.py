"""Colours, which belong in a terminal only: Flower colours its log whatever it goes to."""

import logging
import os
import sys
from typing import TextIO


def wanted(stream: TextIO) -> bool:
    """Return whether a stream is a terminal, and nobody has asked for no colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def plain_log() -> None:
    """Leave colours out of what Flower's log of this process writes, unless they are wanted."""
    if not wanted(sys.stderr):
        for handler in logging.getLogger("flwr").handlers:
            vars(handler)["colored"] = False
