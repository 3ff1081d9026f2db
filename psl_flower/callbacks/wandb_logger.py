"""Metrics for Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psl_flower.callbacks.base import Callback
from psl_flower.callbacks.names import numbers, round_metrics, step_metrics
from psl_flower.extras import extra
from psl_flower.records import RoundRecord, StepRecord


class WandbLogger(Callback):
    """Sends metrics to Weights & Biases; all curves are against the number of steps made.

    The environment variables of wandb apply: with ``WANDB_MODE=offline`` nothing is sent, the run is written to
    `folder` for ``wandb sync``. A run that is resumed becomes a new one there, whole from its first step.

    Parameters
    ----------
    folder : path
        Where wandb keeps its files. Made if it is not there.
    **options
        What ``wandb.init`` takes; the project is "psl-flower" unless given.

    Raises
    ------
    ConfigError
        If wandb is not installed.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        with extra("wandb", "the logger 'wandb'"):
            import wandb
        self._init, self._folder = wandb.init, Path(folder)
        self._options = {"project": "psl-flower", **options}
        self._run: Any = None
        self._step = 0

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Begin the run."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = self._init(dir=str(self._folder), config=dict(config), reinit="create_new", **self._options)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_step(self, record: StepRecord) -> None:
        """Log a step's metrics."""
        self._step += 1
        self._run.log({"step": self._step, **numbers(step_metrics(record))})

    def on_round(self, record: RoundRecord) -> None:
        """Log a round's metrics."""
        self._run.log({"step": self._step, "round": record.round, **numbers(round_metrics(record))})

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Finish the run, as failed if it did not complete."""
        self._run.finish(exit_code=0 if summary.get("completed") else 1)
