"""Examples that clients cannot read: they are left out for good, all others are drawn."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from psl_flower.failures import Failure

log = logging.getLogger("flwr.psl_flower")


class UnreadableRows:
    """Which examples of each client are left out.

    Parameters
    ----------
    what : str
        How one is called in messages.

    Attributes
    ----------
    rows : dict of int to tuple of int
        Their indices in the client's data, ascending, by client id.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self.rows: dict[int, tuple[int, ...]] = {}
        self._labels: dict[int, list[int]] = {}

    def count(self, client: int) -> int:
        """Return how many of a client's examples are left out."""
        return len(self.rows.get(client, ()))

    def labels(self, client: int) -> list[int]:
        """Return the classes of these examples, where they are known."""
        return self._labels.get(client, [])

    def add(self, client: int, failure: Failure, held: int, name: str) -> list[int]:
        """Leave examples out; return those that were not left out yet.

        Parameters
        ----------
        client : int
        failure : Failure
            Which, why, and of which classes.
        held : int
            How many examples the client holds: it can leave out no others.
        name : str
            How the client is called in messages.
        """
        before = set(self.rows.get(client, ()))
        new = [row for row in failure.rows if row not in before and 0 <= row < held]
        if new:
            self.rows[client] = tuple(sorted(before.union(new)))
            self._labels.setdefault(client, []).extend(failure.labels[r] for r in new if r in failure.labels)
        for row in new:
            log.warning("%s: %s %d is left out: %s", name, self._what, row, failure.rows[row])
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a checkpoint."""
        return {
            "rows": {client: list(rows) for client, rows in self.rows.items()},
            "labels": {client: list(labels) for client, labels in self._labels.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.rows = {client: tuple(rows) for client, rows in state["rows"].items()}
        self._labels = {client: list(labels) for client, labels in state["labels"].items()}
