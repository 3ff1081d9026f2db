"""How failures are retried: which clients are left out until when, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from psl_flower.failures import Failure

# Attempts at a step that a client is left out of at most.
LONGEST_BACKOFF = 64


class Backoff:
    """Exponential backoff, in attempts at a step: clients that fail again and again are asked ever more seldom.

    After its first failure a client is tried again at once; after the second in a row it is left out of one attempt,
    then of 2, 4, 8, ... A success forgets its failures.
    """

    def __init__(self) -> None:
        self._attempt = 0
        self._failures: dict[int, int] = {}  # in a row
        self._until: dict[int, int] = {}  # the first attempt that it takes part in again

    def next_attempt(self) -> None:
        """Count an attempt at a step."""
        self._attempt += 1

    def failed(self, clients: Iterable[int]) -> None:
        """Take note of failures in the attempt that was last counted."""
        for client in clients:
            failures = self._failures[client] = self._failures.get(client, 0) + 1
            interval = 0 if failures == 1 else min(2 ** (failures - 2), LONGEST_BACKOFF)
            self._until[client] = self._attempt + 1 + interval

    def succeeded(self, clients: Iterable[int]) -> None:
        """Forget the failures of clients."""
        for client in clients:
            self._failures.pop(client, None)
            self._until.pop(client, None)

    def left_out(self) -> set[int]:
        """Return the clients that are left out of the next attempt."""
        return {client for client, until in self._until.items() if until > self._attempt + 1}

    def failing(self) -> set[int]:
        """Return the clients whose last attempt failed."""
        return set(self._failures)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a checkpoint."""
        return {"attempt": self._attempt, "failures": dict(self._failures), "until": dict(self._until)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._attempt = state["attempt"]
        self._failures, self._until = dict(state["failures"]), dict(state["until"])


# Attempts before anything is given up, and how long to pause between them: so that a client that is restarted is found,
# but nobody is asked a thousand times a second.
LEAST_TRIES = 3
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds


class Retries:
    """Attempts in a row that nothing came of: how long to wait between them, and when to give up.

    Attributes
    ----------
    failures : dict of int to Failure
        What went wrong, by client id.
    """

    def __init__(self) -> None:
        self._tries, self._begin = 0, 0.0
        self.failures: dict[int, Failure] = {}

    def succeeded(self) -> None:
        """Forget them: something came of an attempt."""
        self._tries, self.failures = 0, {}

    def exhausted(self, patience: float) -> bool:
        """Count another attempt, and return whether it is time to give up, `patience` seconds after the first."""
        self._tries += 1
        if self._tries == 1:
            self._begin = time.monotonic()
        return self._tries >= LEAST_TRIES and time.monotonic() - self._begin >= patience

    def pause(self, patience: float) -> float:
        """Return how many seconds to wait before the next attempt: twice as long each time, within the patience."""
        left = self._begin + patience - time.monotonic()
        return max(0.0, min(FIRST_PAUSE * 2.0 ** (self._tries - 1), LONGEST_PAUSE, left))
