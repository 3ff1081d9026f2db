"""What faults a run puts up with, and which clients are left out until when."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from psl_flower.checks import check_choice, check_float
from psl_flower.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FaultPolicy:
    """What a run does when clients fail.

    A client fails a step by an error, by no reply in time, or by a reply that is not what was asked for. It loses that
    step only: the step goes on with the others (the loss is the mean over what arrived), and what the client owes is
    drawn later in the epoch. Failures are logged as warnings and counted in the run's summary. Where every client
    fails from the start, the run ends at once.

    Parameters
    ----------
    tolerate : bool
        False: the first failure ends the run.
    step_timeout : float, optional
        Seconds that clients have for one exchange of a step, of which it has two. Default: `timeout` of `start`.
    min_batch_fraction : float
        From 0 to 1. If a smaller share of a step's examples arrives, the step is redone.
    patience : float
        Seconds without any committed step after which the rest of an epoch is given up, and at its end how long it
        waits for clients that owe examples and fail. Everyone is tried thrice at least.
    join : str
        When clients that were not there at the start of an epoch may enter: "epoch", with the next; "step", at once.
        Clients that come back to an epoch always enter at once.
    non_finite_loss : str
        "stop": NaN or infinite loss or gradients in the server half end the run. "skip": the step is not applied, and
        its examples are left out of this epoch; ten in a row end the run.
    max_gradient_norm : float, optional
        A client's parameter gradient (its mean over the client's examples) is scaled down to this L2 norm.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    tolerate: bool = True
    step_timeout: float | None = None
    min_batch_fraction: float = 0.5
    patience: float = 30.0
    join: str = "epoch"
    non_finite_loss: str = "stop"
    max_gradient_norm: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tolerate, bool):
            raise ConfigError(f"tolerate must be True or False, got {self.tolerate!r}")
        if self.step_timeout is not None:
            check_float(self.step_timeout, "step_timeout", above=0)
        check_float(self.min_batch_fraction, "min_batch_fraction", least=0)
        if self.min_batch_fraction > 1:
            raise ConfigError(f"min_batch_fraction must be at most 1, got {self.min_batch_fraction}")
        check_float(self.patience, "patience", least=0)
        check_choice(self.join, "join", JOIN)
        check_choice(self.non_finite_loss, "non_finite_loss", NON_FINITE_LOSS)
        if self.max_gradient_norm is not None:
            check_float(self.max_gradient_norm, "max_gradient_norm", above=0)


JOIN = ("epoch", "step")
NON_FINITE_LOSS = ("stop", "skip")

# Attempts at a step that a client is left out of at most.
LONGEST_ABSENCE = 64


class Absences:
    """Which clients are left out of the next attempt at a step: those that failed again and again.

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
            interval = 0 if failures == 1 else min(2 ** (failures - 2), LONGEST_ABSENCE)
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


# Attempts before anything is given up, and how long to pause between them: so that a client that is restarted is found,
# but nobody is asked a thousand times a second.
LEAST_TRIES = 3
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds


class Stall:
    """Attempts in a row that nothing came of, and when to give up."""

    def __init__(self) -> None:
        self._tries, self._begin = 0, 0.0

    def over(self) -> None:
        """Forget them: something came of an attempt."""
        self._tries = 0

    def hopeless(self, patience: float) -> bool:
        """Count another attempt, and return whether it is time to give up, `patience` seconds after the first."""
        self._tries += 1
        if self._tries == 1:
            self._begin = time.monotonic()
        return self._tries >= LEAST_TRIES and time.monotonic() - self._begin >= patience

    def pause(self, patience: float) -> float:
        """Return how many seconds to wait before the next attempt: twice as long each time, within the patience."""
        left = self._begin + patience - time.monotonic()
        return max(0.0, min(FIRST_PAUSE * 2.0 ** (self._tries - 1), LONGEST_PAUSE, left))
