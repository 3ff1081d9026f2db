"""The metrics of a round under short names, and waiting for one of them: what schedulers and callbacks look at."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psl_flower.checks import check_choice, check_float
from psl_flower.errors import ConfigError

if TYPE_CHECKING:
    from psl_flower.records import RoundRecord

log = logging.getLogger("flwr.psl_flower")

# Prefixes of what is known only after an evaluation: on the clients' test data, and by `evaluate_fn`.
CLIENTS, SERVER = "val_", "server/"

_RISES = ("acc", "f1", "auc", "auroc", "precision", "recall", "iou", "miou", "dice", "bleu")
_FALLS = ("loss", "error", "mse", "rmse", "mae", "perplexity")


def round_values(record: RoundRecord) -> dict[str, float]:
    """Return a round's numbers under short names.

    ``loss``, ``accuracy`` and the others of the training, ``val_NAME`` for those on the clients' test data,
    ``server/NAME`` for those that `evaluate_fn` returned. What was not measured is not there.
    """
    groups: dict[str, Mapping[str, Any]] = {
        "": record.metrics(),
        CLIENTS: record.evaluate_clientapp,
        SERVER: record.evaluate_serverapp,
    }
    return {
        prefix + name: float(value)
        for prefix, metrics in groups.items()
        for name, value in metrics.items()
        if isinstance(value, int | float)
    }


class Monitor:
    """A metric of rounds that something waits for.

    Parameters
    ----------
    name : str
        One of those of `round_values`.
    who : str
        Who waits, for errors: "EarlyStopping", "scheduler".

    Raises
    ------
    ConfigError
        If `name` is no name.
    """

    def __init__(self, name: str, who: str) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{who}: monitor must be the name of a metric, for example 'val_loss', got {name!r:.80}")
        self.name, self._who = name, who
        self._warned = False

    def check(self, evaluate_every: int) -> None:
        """Raise ConfigError if the metric will never be there, as clients are not evaluated."""
        if self.name.startswith(CLIENTS) and evaluate_every == 0:
            raise ConfigError(
                f"{self._who}: monitor={self.name!r} is measured on the clients' test data, but evaluate_every is 0: "
                "pass evaluate_every=1"
            )

    def read(self, values: Mapping[str, float], *, evaluated: bool = True) -> float | None:
        """Return the metric's value in a round; None where it could not be measured in this round.

        Parameters
        ----------
        values : dict of str to float
            What `round_values` returned.
        evaluated : bool
            Whether this was a round in which the clients' test data were to be used (`evaluate_every`).

        Raises
        ------
        ConfigError
            If there is no such metric; names those that are there.
        """
        group = next((prefix for prefix in (CLIENTS, SERVER) if self.name.startswith(prefix)), "")
        measured = any(name.startswith(group) for name in values)
        if group == CLIENTS and not measured and not evaluated:
            return None
        if group == SERVER and not measured:
            if not self._warned:  # an `evaluate_fn` may leave rounds out
                log.warning(
                    "%s waits for %r, but evaluate_fn returned no metrics in this round: it waits until there are some",
                    self._who,
                    self.name,
                )
                self._warned = True
            return None
        if group == CLIENTS and not measured:
            raise ConfigError(
                f"{self._who}: monitor={self.name!r} is measured on the clients' test data, and no client has any: let "
                f"data_fn return (training data, test data), or monitor one of {', '.join(map(repr, values))}"
            )
        if not group and self.name not in values and values.get("num_steps") == 0:
            return None  # no example was drawn for any step of the round
        return float(values[check_choice(self.name, f"{self._who}: monitor", values)])


class BestValue:
    """The best value of a metric so far, and its round.

    Parameters
    ----------
    monitor : str
        The metric's name.
    who : str
        Who asks, for errors.
    mode : str
        "min": less is better; "max": more; "auto": as the name tells (losses and errors fall, accuracies rise).
    min_delta : float
        By how much a value must be better, at least.

    Raises
    ------
    ConfigError
        If an argument is out of range, or the name does not tell what is better.
    """

    def __init__(self, monitor: str, who: str, *, mode: str = "auto", min_delta: float = 0.0) -> None:
        self._monitor = Monitor(monitor, who)
        self.name = monitor
        if check_choice(mode, f"{who}: mode", ("auto", "min", "max")) == "auto":
            mode = expected_mode(monitor) or ""
        if not mode:
            raise ConfigError(
                f"{who}: the name {monitor!r} does not tell whether less or more is better: pass mode='min' or 'max'"
            )
        self._sign = 1 if mode == "max" else -1
        self._min_delta = check_float(min_delta, f"{who}: min_delta", least=0)
        self.start({})

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin a run; `config` is what a callback hears at its start."""
        self.value = math.nan
        self.round: int | None = None
        strategy = config.get("strategy", {})
        self._evaluate_every = strategy.get("evaluate_every", 1) if isinstance(strategy, Mapping) else 1
        self._monitor.check(self._evaluate_every)

    def update(self, server_round: int, values: Mapping[str, float]) -> bool | None:
        """Take a round in, and return whether it is better than all before; None if it was not measured.

        NaN is never better.

        Parameters
        ----------
        server_round : int
            1-based.
        values : dict of str to float
            What `round_values` returned.

        Raises
        ------
        ConfigError
            If there is no such metric.
        """
        evaluated = self._evaluate_every > 0 and server_round % self._evaluate_every == 0
        value = self._monitor.read(values, evaluated=evaluated)
        if value is None:
            return None
        gain = self._sign * (value - self.value)
        if math.isnan(value) or (self.round is not None and not gain > self._min_delta):
            return False
        self.value, self.round = value, server_round
        return True


def expected_mode(monitor: str) -> str | None:
    """Return "min" or "max" as the name of a metric tells it, None where it does not."""
    words = monitor.lower().replace("/", "_").replace("-", "_").split("_")
    if any(word.endswith(_FALLS) for word in words):
        return "min"
    if any(word.startswith(_RISES) for word in words):
        return "max"
    return None
