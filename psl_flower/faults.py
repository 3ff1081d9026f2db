"""What faults a run puts up with."""

from __future__ import annotations

from dataclasses import dataclass

from psl_flower.checks import check_choice, check_float
from psl_flower.errors import ConfigError

MISTAKES = ("stop", "exclude", "retry")
JOIN = ("epoch", "step")
NON_FINITE_LOSS = ("stop", "skip")


@dataclass(frozen=True, kw_only=True)
class FaultPolicy:
    """What a run does when clients fail.

    An outage is a process that is gone, or does not reply in time. The client loses that step only: the step goes on
    with the others (the loss is the mean over what arrived), and what the client owes is drawn later in the epoch. A
    mistake is code that raises, or a reply that is not what was asked for: it would happen again. Failures are logged
    as warnings and counted in the run's summary.

    Parameters
    ----------
    tolerate : bool
        False: the first failure ends the run.
    mistakes : str, optional
        "stop": the first one ends the run, with client, rule and remedy. "exclude": whoever makes one is left out for
        the run, which ends once nobody is left. "retry": as an outage. Default: "stop" in process and in Flower's
        simulation, where all clients are the user's own code; "exclude" in a deployment, where they are others'.
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
        A client's parameter gradient (its mean over the client's examples) is scaled down to this L2 norm; with secure
        aggregation by the client itself, for the server does not see it.
    outlier_bound : float, optional
        What a client sends in training is refused if its norm, an example, is far above those of all clients: its
        logarithm this many robust standard deviations above the median. Its step is drawn again later; after the third
        time it is left out for the run. None: any finite value is used. See docs/security.md for false alarms.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    tolerate: bool = True
    mistakes: str | None = None
    step_timeout: float | None = None
    min_batch_fraction: float = 0.5
    patience: float = 30.0
    join: str = "epoch"
    non_finite_loss: str = "stop"
    max_gradient_norm: float | None = None
    outlier_bound: float | None = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.tolerate, bool):
            raise ConfigError(f"tolerate must be True or False, got {self.tolerate!r}")
        if self.mistakes is not None:
            check_choice(self.mistakes, "mistakes", MISTAKES)
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
        if self.outlier_bound is not None:
            check_float(self.outlier_bound, "outlier_bound", above=0)
