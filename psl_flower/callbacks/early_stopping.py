"""Ends a run whose metric does not get better any more, as Lightning's callback of that name does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psl_flower.callbacks.best import BestRound
from psl_flower.checks import check_int
from psl_flower.monitor import round_values

if TYPE_CHECKING:
    from psl_flower.records import RoundRecord


class EarlyStopping(BestRound):
    """Asks for the end of the run once a metric has not become better for some rounds.

    Rounds in which the metric is not measured (`evaluate_every`) do not count. In a run that is resumed, the rounds
    before the checkpoint count.

    Parameters
    ----------
    monitor : str
        ``"loss"``, ``"accuracy"`` or another metric of the training, ``"val_loss"``, ``"val_accuracy"``, ... on the
        clients' test data, ``"server/NAME"`` for those that `evaluate_fn` returns.
    patience : int
        Measured rounds in a row without a better value.
    mode : str
        "min": less is better; "max": more; "auto": as the metric's name tells.
    min_delta : float
        By how much a value must be better, at least.

    Attributes
    ----------
    best_round : int or None
        The round with the best value so far.
    best_value : float
        That value; NaN while there is none.

    Raises
    ------
    ConfigError
        If an argument is out of range; during the run, if there is no such metric.
    """

    def __init__(self, monitor: str, *, patience: int = 3, mode: str = "auto", min_delta: float = 0.0) -> None:
        self._patience = check_int(patience, "EarlyStopping: patience", least=1)
        super().__init__(monitor, mode=mode, min_delta=min_delta)
        self._since = 0

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Begin anew."""
        super().on_run_start(config)
        self._since = 0

    def on_round(self, record: RoundRecord) -> None:
        """Look at the metric."""
        better = self._best.update(record.round, round_values(record))
        if better is None:
            return
        self._since = 0 if better else self._since + 1
        if self._since >= self._patience:
            self.stop = (
                f"{self._best.name} has not become better than {self._best.value:.6g} of round {self._best.round} "
                f"for {self._since} rounds"
            )
