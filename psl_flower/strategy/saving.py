"""What the checkpoints of a run hold, which one it goes on from, and how."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result
from torch import Tensor

from psl_flower import checkpoint
from psl_flower.checkpoint import Checkpoints, check_identity
from psl_flower.samplers.base import Sampler
from psl_flower.stragglers import DelayEstimator, DelayModel
from psl_flower.strategy.epoch import Epoch
from psl_flower.strategy.ledger import EpochLedger
from psl_flower.strategy.run import Run
from psl_flower.strategy.server_step import SplitTrainer
from psl_flower.strategy.tolerance import Backoff

log = logging.getLogger("flwr.psl_flower")

_RESULT_METRICS = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")


class Saver:
    """Writes the checkpoints of a run, and finds the one it goes on from.

    Parameters
    ----------
    checkpoints : Checkpoints or None
        Where they go; None: none are written.
    trainer : SplitTrainer
    scheduler : torch learning-rate scheduler, optional
    template : dict of str to Tensor
        The whole model's state dict.
    cut : str, optional
    sampler : Sampler

    Raises
    ------
    ConfigError
        If the state of the optimizer or the scheduler is nothing that a checkpoint can hold.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        trainer: SplitTrainer,
        scheduler: Any,
        *,
        template: Mapping[str, Tensor],
        cut: str | None,
        sampler: Sampler,
    ) -> None:
        self._checkpoints, self._scheduler = checkpoints, scheduler
        settings = {k: v for k, v in vars(sampler).items() if v is None or isinstance(v, bool | int | float | str)}
        # what a checkpoint must share with a run that resumes from it
        self._identity = {
            "model": {name: f"{t.dtype} {tuple(t.shape)}" for name, t in template.items()},
            "cut": cut,
            "sampler": {"class": type(sampler).__name__, **settings},
            "optimizer": type(trainer.optimizer).__name__,
        }
        if checkpoints:
            checkpoint.check({"optimizer": trainer.optimizer.state_dict(), "scheduler": _state_of(scheduler)})

    def find(self, resume_from: str | Path | None) -> dict[str, Any] | None:
        """Return the checkpoint to resume from, if there is one; put those of another run away if not.

        Parameters
        ----------
        resume_from : path, optional
            "latest", or the path of one.

        Raises
        ------
        ConfigError
            If it is not there, damaged, or of another run.
        """
        saved = None
        if resume_from == "latest" and self._checkpoints:
            saved = self._checkpoints.latest()
            if saved is None:
                log.warning("There is no checkpoint in %s yet: starting from the beginning", self._checkpoints.folder)
        elif resume_from:
            saved = checkpoint.read(Path(resume_from))
        if saved is not None:
            check_identity(saved["identity"], self._identity)
        elif self._checkpoints:
            self._checkpoints.put_away()
        return saved

    def save(self, run: Run, server_round: int, ledger: EpochLedger, epoch: Epoch, delays: DelayModel | None) -> None:
        """Write a checkpoint, within or at the end of a round's training."""
        if self._checkpoints is None:
            return
        tree = {
            "identity": self._identity,
            "configuration": run.recorder.config,
            "round": server_round,
            "trainer": {**run.trainer.saved(), "state": run.current_state()},
            "scheduler": _state_of(self._scheduler),
            "agenda": ledger.state(),
            "epoch": epoch.state(),
            "pooled": run.saved_pooled(),
            "absences": run.backoff.state(),
            "delays": delays.to_dict() if isinstance(delays, DelayEstimator) else None,
            "metrics_position": run.recorder.position(),
            "summary": run.summary.to_dict(),
            "result": {name: _plain(getattr(run.result, name)) for name in _RESULT_METRICS},
        }
        self._checkpoints.save(server_round, len(epoch), tree)

    def restore(self, run: Run, saved: Mapping[str, Any]) -> None:
        """Bring a run to where a checkpoint was written."""
        run.trainer.restore(saved["trainer"])
        run.state |= saved["trainer"]["state"]
        if self._scheduler:
            self._scheduler.load_state_dict(saved["scheduler"])
        run.restore_pooled(saved["pooled"])
        run.backoff = Backoff.restored(saved["absences"])
        run.summary.resumed += 1
        steps = sum(len(saved["epoch"][name]) for name in ("steps", "waiting"))
        log.info("Resumed in round %d, after step %d.", saved["round"], steps)


def saved_result(saved: Mapping[str, Any]) -> Result:
    """Return Flower's result as far as a checkpoint has it."""
    result = Result()
    for name in _RESULT_METRICS:
        setattr(result, name, {r: MetricRecord(values) for r, values in saved["result"][name].items()})
    return result


def _plain(metrics: Mapping[int, MetricRecord]) -> dict[int, dict[str, Any]]:
    return {server_round: dict(record) for server_round, record in metrics.items()}


def _state_of(scheduler: Any) -> dict[str, Any]:
    return dict(scheduler.state_dict()) if hasattr(scheduler, "state_dict") else {}
