"""Frames as the content of Flower messages, and back."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from psl_flower.errors import ProtocolError
from psl_flower.exchange.frames import Frame, parse_header
from psl_flower.exchange.limits import MAX_BUFFERS

# ``Array.stype`` of ours: the bytes of a buffer, without a header.
RAW = "psl_flower.raw"


def frame_to_content(frame: Frame) -> RecordDict:
    """Return a frame as a message's content: the header as JSON, the buffers as arrays of bytes.

    Raises
    ------
    ProtocolError
        If its header cannot be sent.
    """
    buffers = ArrayRecord()
    for i, pieces in enumerate(frame.buffers):
        data = b"".join(pieces)
        buffers[str(i)] = Array("uint8", (len(data),), RAW, data)
    return RecordDict({"frame": ConfigRecord({"header": frame.text}), "buffers": buffers})


def content_to_frame(content: RecordDict) -> Frame:
    """Return the frame that a message's content holds.

    Raises
    ------
    ProtocolError
        If it holds none.
    """
    record, buffers = content.get("frame"), content.get("buffers")
    if not isinstance(record, ConfigRecord) or not isinstance(buffers, ArrayRecord):
        raise ProtocolError(
            f"expected a frame and its buffers, got records named {', '.join(content)[:200] or 'nothing'}"
        )
    text = record.get("header")
    if not isinstance(text, bytes):
        raise ProtocolError("the frame has no header")
    header = parse_header(text)
    if not isinstance(header, dict):
        raise ProtocolError("the header must be an object")
    if len(buffers) > MAX_BUFFERS:
        raise ProtocolError(f"a frame has at most {MAX_BUFFERS} buffers, got {len(buffers)}")
    if list(buffers) != [str(i) for i in range(len(buffers))]:
        raise ProtocolError("the buffers must be numbered")
    if any(array.stype != RAW for array in buffers.values()):
        raise ProtocolError(f"the buffers must be {RAW!r}")
    return Frame(header, [(memoryview(array.data),) for array in buffers.values()])
