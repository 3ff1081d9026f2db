"""Frames as the content of Flower messages, and back."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

from psl_flower.errors import ProtocolError
from psl_flower.exchange.frames import Frame, join, parse

# Name of the one record, and of the one array in it: of each that there is, Flower takes more time than we of all.
_NAME = "frame"
# ``Array.stype`` of ours: a frame in one piece, as Note [Frame layout] in frames.py has it.
FRAME = "psl_flower.frame"


def frame_to_content(frame: Frame) -> RecordDict:
    """Return a frame as a message's content: one array of bytes.

    Raises
    ------
    ProtocolError
        If its header cannot be sent.
    """
    data = join(frame)
    return RecordDict({_NAME: ArrayRecord({_NAME: Array("uint8", (len(data),), FRAME, data)})})


def content_to_frame(content: RecordDict) -> Frame:
    """Return the frame that a message's content holds.

    Raises
    ------
    ProtocolError
        If it holds none.
    """
    record = content.get(_NAME)
    if not isinstance(record, ArrayRecord):
        raise ProtocolError(f"expected a frame, got records named {', '.join(content)[:200] or 'nothing'}")
    if list(record) != [_NAME] or record[_NAME].stype != FRAME:
        raise ProtocolError(f"expected a frame in one array of the type {FRAME!r}: has the other end this release?")
    return parse(record[_NAME].data)
