"""Keeps the model of the round whose metric is the best."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psl_flower.callbacks.best import BestRound
from psl_flower.monitor import round_values

if TYPE_CHECKING:
    from torch import Tensor

    from psl_flower.records import RoundRecord

log = logging.getLogger("flwr.psl_flower")


class BestModel(BestRound):
    """Writes the whole model's state dict into a file after every round that is better than all before.

    ``model.load_state_dict(safetensors.torch.load_file(path))`` has it back. The file's metadata say the round, the
    metric and its value.

    Parameters
    ----------
    path : path
        Of the file, for example ``outputs/best.safetensors``. Its folder is made; an earlier run's file is replaced.
    monitor : str
        A metric's name, as for `EarlyStopping`.
    mode : str
        "min": less is better; "max": more; "auto": as the metric's name tells.

    Attributes
    ----------
    best_round : int or None
        The round whose model it is.
    best_value : float
        Its metric; NaN while there is none.

    Raises
    ------
    ConfigError
        If an argument is out of range; during the run, if there is no such metric.
    """

    def __init__(self, path: str | Path, *, monitor: str, mode: str = "auto") -> None:
        self.path = Path(path)
        super().__init__(monitor, mode=mode)
        self._better = False

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Begin anew."""
        super().on_run_start(config)
        self._better = False

    def on_round(self, record: RoundRecord) -> None:
        """Look at the metric."""
        self._better = bool(self._best.update(record.round, round_values(record)))

    def on_model(self, server_round: int, state: Mapping[str, Tensor]) -> None:
        """Write the model if its round was the best."""
        if not self._better:
            return
        from psl_flower.checkpoint import write_state

        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"round": str(server_round), "monitor": self._best.name, "value": repr(self._best.value)}
        write_state(self.path, state, metadata)

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Log which round it was."""
        if self._best.round is None:
            log.warning("BestModel: there was no round with %s, so no model was written", self._best.name)
        elif not self.path.exists():  # found by a run that this one resumed, written elsewhere
            log.warning("BestModel: round %d was the best, but its model is not at %s", self._best.round, self.path)
        else:
            value, name = self._best.value, self._best.name
            log.info("The best round was %d (%s %.6g): %s", self._best.round, name, value, self.path)
