"""Metrics for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psl_flower.callbacks.base import Callback
from psl_flower.callbacks.names import numbers, round_metrics, step_metrics
from psl_flower.extras import extra
from psl_flower.records import RoundRecord, StepRecord


class TensorBoardLogger(Callback):
    """Writes an event file; all curves are against the number of steps made.

    Parameters
    ----------
    folder : path
        What ``tensorboard --logdir`` is given. Curves of an earlier run in it are hidden by this one's.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        with extra("tensorboard", "the logger 'tensorboard'"):
            from torch.utils.tensorboard import SummaryWriter
        self._make, self._folder = SummaryWriter, Path(folder)
        self._writer: Any = None
        self._step = 0

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Open the event file."""
        self._writer = self._make(str(self._folder), purge_step=0)  # 0: hide what an earlier run has left
        rows = "\n".join(f"| {name} | {value} |" for name, value in config.items())
        self._writer.add_text("configuration", f"| key | value |\n|---|---|\n{rows}", 0)

    def on_step(self, record: StepRecord) -> None:
        """Write a step's scalars."""
        self._step += 1
        self._write(step_metrics(record))

    def on_round(self, record: RoundRecord) -> None:
        """Write a round's scalars."""
        self._write({**round_metrics(record), "round": record.round})
        self._writer.flush()

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Close the event file."""
        self._writer.close()

    def _write(self, metrics: dict[str, Any]) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, self._step)
