"""Progress lines with an ETA, a few seconds apart however fast the steps are."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("flwr.psl_flower")

_INTERVAL = 5.0  # seconds


class Progress:
    """Counts the steps of a run and says now and then how far it is.

    Parameters
    ----------
    num_rounds : int
        Rounds of the run.
    share : float
        Of them, what was done before: in the run that this one resumes.
    """

    def __init__(self, num_rounds: int, share: float = 0.0) -> None:
        self._num_rounds, self._share_before = num_rounds, share
        self._begin = self._told = time.monotonic()

    def step(self, server_round: int, done: int, of: int, loss: float, accuracy: float | None) -> None:
        """Count a step: the `done`-th `of` this round's."""
        now = time.monotonic()
        if now - self._told >= _INTERVAL or done == of:
            self._told = now
            share = (server_round - 1 + done / of) / self._num_rounds
            eta = (now - self._begin) * (1 - share) / max(share - self._share_before, 1e-9)
            score = "" if accuracy is None else f"  accuracy {accuracy:.3f}"
            log.info(
                "round %d/%d  step %*d/%d  loss %.4f%s  ETA %s",
                *(server_round, self._num_rounds, len(str(of)), done, of, loss, score, clock(eta)),
            )


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, without the hours where there are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
