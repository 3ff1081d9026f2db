"""What can go wrong with a client, by kind: nothing that happens next is decided by reading texts.

An outage is a process that is gone or silent: nobody's fault, and over by itself. A mistake is code that raises, or a
reply that is not what was asked for: it will happen again, so somebody must be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """Kinds of failures; the value is what summaries call it."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    UNREADABLE = "unreadable rows"
    RAISED = "client error"
    STEP = "another step"
    NOT_FINITE = "not finite"
    LABELS = "label range"
    SHAPE = "shape"
    DTYPE = "dtype"
    NAMES = "tensors missing or unknown"
    MALFORMED = "malformed"
    LEFT_OUT = "left out for the round"
    KEY = "another key"
    RANGE = "beyond fixed point"

    @property
    def is_outage(self) -> bool:
        """Whether nobody is at fault."""
        return self in (Kind.TIMEOUT, Kind.UNREACHABLE)

    @property
    def is_mistake(self) -> bool:
        """Whether code raised, or a reply was refused."""
        return not self.is_outage and self not in (Kind.UNREADABLE, Kind.LEFT_OUT, Kind.KEY, Kind.RANGE)


@dataclass(frozen=True)
class Failure:
    """Why there is no usable reply of a client.

    Parameters
    ----------
    kind : Kind
    detail : str
        The rule, the value found and, where there is one, the remedy.
    rows : dict of int to str
        Of `Kind.UNREADABLE`: indices in the client's training data, and what is wrong with each.
    labels : dict of int to int
        The classes of these rows, where the client knows them.
    """

    kind: Kind
    detail: str
    rows: Mapping[int, str] = field(default_factory=dict)
    labels: Mapping[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.detail
