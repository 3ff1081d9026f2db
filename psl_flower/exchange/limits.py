"""What a field from the wire may be at most: checked before memory is taken for it.

`LIMITS` is what `docs/security.md` shows, and what tests try from both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from psl_flower.data.classes import MAX_NAMED
from psl_flower.protocol import MAX_CLASSES, MAX_EXAMPLES

MAX_HEADER_BYTES = 16 * 2**20
MAX_UNASKED_HEADER = 2**16  # a long one takes the server a tenth of a second, in which it can do nothing else
MAX_CONTAINERS = 2**20  # each takes thirty times the bytes that it has in JSON
MAX_FRAME_BYTES = 2**31
MAX_BUFFERS = 2**16
MAX_LEAVES = 100_000
MAX_DEPTH = 16
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**48  # as if no dimension were 0: torch's strides must not overflow
MAX_PACKED = 2**28  # what is packed takes up to 32 times its bytes when it is not
MAX_NAME = 1000
MAX_PARTS = 64
MAX_TEXT = 2000
MAX_MODEL = 2**20
MAX_ENTRIES = 2**20
MAX_CONFIG = 10_000
MAX_ROWS = 10_000
MAX_DELAY = 24 * 3600
MAX_KEPT = 2**28  # bytes in the Flower state of a node, which travels whole, with every message, inside its machine


@dataclass(frozen=True)
class Limit:
    """A bound.

    Parameters
    ----------
    of : str
        What it is of.
    most : int
    unit : str
        What is counted.
    then : str
        What happens beyond.
    """

    of: str
    most: int
    unit: str
    then: str


_STREAM, _REQUEST, _MEMBER = "the stream is closed", "the request is lost for its sender", "it is not let in"

LIMITS = (
    Limit("header", MAX_HEADER_BYTES, "bytes of JSON", _STREAM),
    Limit("header of what was not asked for", MAX_UNASKED_HEADER, "bytes, from a client over a stream", _STREAM),
    Limit("lists and objects", MAX_CONTAINERS, "in a header", _STREAM),
    Limit("frame", MAX_FRAME_BYTES, "bytes, `StreamOptions.max_frame_bytes`", _STREAM),
    Limit("buffers", MAX_BUFFERS, "in a frame", _STREAM),
    Limit("tensors", MAX_LEAVES, "in a frame", _REQUEST),
    Limit("nesting", MAX_DEPTH, "levels of a tree of tensors", _REQUEST),
    Limit("dimensions", MAX_DIMENSIONS, "of a tensor", _REQUEST),
    Limit("elements", MAX_ELEMENTS, "of a tensor, 0 counted as 1", _REQUEST),
    Limit("packed elements", MAX_PACKED, "in a frame", _REQUEST),
    Limit("name", MAX_NAME, "characters", _REQUEST),
    Limit("parts", MAX_PARTS, "of a model", _REQUEST),
    Limit("leaves", MAX_PARTS, "that a stage takes or gives", _REQUEST),
    Limit("text", MAX_TEXT, "characters; of a failure, the rest is cut off", _REQUEST),
    Limit("model", MAX_MODEL, "characters that describe it", _MEMBER),
    Limit("list of integers", MAX_ENTRIES, "entries", _REQUEST),
    Limit("configuration", MAX_CONFIG, "entries", _REQUEST),
    Limit("unreadable rows", MAX_ROWS, "told at once", _REQUEST),
    Limit("waiting", MAX_DELAY, "seconds of a simulated straggler", _REQUEST),
    Limit("examples", MAX_EXAMPLES, "that a client says it holds", _MEMBER),
    Limit("classes", MAX_CLASSES, "", _MEMBER),
    Limit("names of classes", MAX_NAMED, "of which a client tells digests", _REQUEST),
)


def table() -> str:
    """Return the limits in Markdown."""
    rows = [f"| {each.of} | {_shown(each.most)} {each.unit}".rstrip() + f" | {each.then} |" for each in LIMITS]
    return "\n".join(["| field | at most | else |", "|---|---|---|", *rows])


def _shown(number: int) -> str:
    power = number.bit_length() - 1
    if number == 1 << power and power >= 16:
        return f"2^{power}"
    return f"{number:,}"
