"""Progress lines with an ETA, a few seconds apart however fast the steps are."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("flwr.psl_flower")

_INTERVAL = 5.0  # seconds


class Progress:
    """Counts the steps of a run and says now and then how far it is.

    The clock starts with the first step's end: connecting and loading data say nothing of how fast steps are.

    Parameters
    ----------
    num_rounds : int
        Rounds of the run.
    """

    def __init__(self, num_rounds: int) -> None:
        self._num_rounds = num_rounds
        self._begin: tuple[float, float] | None = None  # when, and what share of the run was done
        self._told = 0.0

    def step(self, server_round: int, done: int, of: int, loss: float, accuracy: float | None) -> bool:
        """Count a step, the `done`-th `of` this round's; return whether it was worth a line."""
        now, share = time.monotonic(), (server_round - 1 + done / of) / self._num_rounds
        if self._begin is None:
            self._begin, self._told = (now, share), now
        told = now - self._told >= _INTERVAL or done == of
        if told:
            self._told = now
            begin, share_before = self._begin
            left = (now - begin) * (1 - share) / (share - share_before) if share > share_before else None
            eta = "" if left is None else f"  ETA {clock(left)}"
            score = "" if accuracy is None else f"  accuracy {accuracy:.3f}"
            log.info(
                "round %d/%d  step %*d/%d  loss %.4f%s%s",
                *(server_round, self._num_rounds, len(str(of)), done, of, loss, score, eta),
            )
        return told


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, without the hours where there are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
