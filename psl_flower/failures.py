"""What can go wrong with a client, by kind: nothing that happens next is decided by reading texts.

An outage is a process that is gone or silent: nobody's fault, and over by itself. A mistake is code that raises, or a
reply that is not what was asked for: it will happen again, so somebody must be told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

_NAMES = re.compile(r"(?<!\w)(?:'[^']*'|\"[^\"]*\")")
_VALUES = re.compile(r"(?<![\w:.\[(])-?\d+(?:\.\d+)?\b")
_NUMBERS = re.compile(r"0x[0-9a-f]+|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)
_LISTED = re.compile(r"#(?:, (?:#|\.\.\.))+")

IN_LOG = " (what is left out here is in the log of the client)"  # goes with `without_values`


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
    OUTLIER = "far out of bounds"
    LEFT_OUT = "left out for the round"
    KEY = "another key"
    RANGE = "beyond fixed point"
    FORGOTTEN = "weights not there"

    @property
    def is_outage(self) -> bool:
        """Whether nobody is at fault."""
        return self in (Kind.TIMEOUT, Kind.UNREACHABLE)

    @property
    def is_mistake(self) -> bool:
        """Whether code raised, or a reply was refused."""
        others = (Kind.UNREADABLE, Kind.OUTLIER, Kind.LEFT_OUT, Kind.KEY, Kind.RANGE)
        return not self.is_outage and self not in others


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
    partition_id : int, optional
        The client's, of one that could not be built, and so has not described itself.
    joint : bool
        Whether it is about what several clients sent as one: asked one by one, most may turn out to be innocent.
    """

    kind: Kind
    detail: str
    rows: Mapping[int, str] = field(default_factory=dict)
    labels: Mapping[int, int] = field(default_factory=dict)
    partition_id: int | None = None
    joint: bool = False

    def __str__(self) -> str:
        return self.detail


def likeness(text: str) -> str:
    """Return a text without its numbers and names: what clients say of the same mistake is equal but for these."""
    return _LISTED.sub("#", _NUMBERS.sub("#", _NAMES.sub("#", text)))


def without_values(text: str) -> str:
    """Return a text without names in quotes and numbers that stand alone: either may be a label."""
    return _VALUES.sub("...", _NAMES.sub("'...'", text))


def mistakes_of(failures: Mapping[int, Failure]) -> dict[int, Failure]:
    """Return those of some failures, by client, that are mistakes."""
    return {client: failure for client, failure in failures.items() if failure.kind.is_mistake}


def alike(failures: Iterable[Failure]) -> bool:
    """Return whether it is the same that went wrong with all."""
    return len({(failure.kind, likeness(failure.detail)) for failure in failures}) <= 1


def failure_lines(failures: Mapping[int, Failure], name: Callable[[int], str]) -> list[str]:
    """Return what went wrong, a line for each mistake: the first client that made it, and how many others did.

    Parameters
    ----------
    failures : dict of int to Failure
        By client.
    name : callable
        Takes a client, and returns how it is called.
    """
    groups: dict[tuple[Kind, str], list[int]] = {}
    for client, failure in sorted(failures.items()):
        groups.setdefault((failure.kind, likeness(failure.detail)), []).append(client)
    lines = []
    for first, *others in groups.values():
        more = f" and {len(others)} other{'s' * (len(others) > 1)} likewise" if others else ""
        lines.append(f"{name(first)}{more}: {failures[first]}")
    return lines
