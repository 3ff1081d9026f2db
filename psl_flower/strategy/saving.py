"""What the checkpoints of a run hold, which one it goes on from, and how."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result
from safetensors import SafetensorError
from torch import Tensor

from psl_flower import checkpoint
from psl_flower.checkpoint import Checkpoints
from psl_flower.checks import check_path
from psl_flower.errors import ConfigError
from psl_flower.methods import SplitMethod
from psl_flower.server import LocalBackend, Scheduler
from psl_flower.server.optimizer import keeps_averages_apart
from psl_flower.stragglers import DelayEstimator, DelayModel
from psl_flower.strategy import settings
from psl_flower.strategy.arrays import state_to_arrays
from psl_flower.strategy.epoch import Epoch
from psl_flower.strategy.ledger import EpochLedger
from psl_flower.strategy.run import Run
from psl_flower.strategy.settings import Change

log = logging.getLogger("flwr.psl_flower")

_RESULT_METRICS = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")


class Saver:
    """Writes the checkpoints of a run, and finds the one it goes on from.

    Parameters
    ----------
    checkpoints : Checkpoints or None
        Where they go; None: none are written.
    backend : LocalBackend
    scheduler : Scheduler
    template : dict of str to Tensor
        The model's state dict, as far as the run keeps it.
    options : dict
        The other settings of the run, by the names of the strategy's arguments: plain values or objects.
    run_config : dict
        What the user has besides.

    Raises
    ------
    ConfigError
        If the state of the optimizer or the scheduler is nothing that a checkpoint can hold.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        backend: LocalBackend,
        scheduler: Scheduler,
        *,
        template: Mapping[str, Tensor],
        options: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        self._checkpoints, self._scheduler = checkpoints, scheduler
        self._settings = {
            "model": {name: f"{t.dtype} {tuple(t.shape)}" for name, t in template.items()},
            "layers": settings.describe_layers(backend.parts.values()),
            **{name: settings.describe(value) for name, value in options.items()},
            "optimizer": settings.describe_optimizer(backend.optimizer),
            "scheduler": settings.describe_scheduler(scheduler.wrapped),
            "run_config": settings.describe(run_config),
        }
        self._run_config = dict(run_config)
        self._history: list[dict[str, Any]] = []  # what was changed when
        self._changes: list[Change] = []  # with this start
        if checkpoints:
            checkpoint.check({"optimizer": backend.optimizer.state_dict(), "scheduler": scheduler.state_dict()})

    def find(self, resume_from: str | Path | None) -> dict[str, Any] | None:
        """Return the checkpoint to resume from, if there is one; put those of another branch of the run aside.

        Parameters
        ----------
        resume_from : path, optional
            "latest", or the path of one.

        Raises
        ------
        ConfigError
            If it is not there, damaged, in another version of the format, or of another run.
        """
        found = None
        if resume_from == "latest" and self._checkpoints:
            found = self._checkpoints.latest()
            if found is None:
                log.warning("There is no checkpoint in %s yet: starting from the beginning", self._checkpoints.folder)
        elif resume_from is not None:
            found = Path(resume_from), checkpoint.read(Path(resume_from))
        if found is None:
            return None
        path, saved = found
        self._changes = settings.compare(saved["settings"], self._settings)
        log.info("Resuming from %s", path)
        self._history = list(saved["changes"])
        if self._changes:
            changes = {change.name: [change.then, change.now] for change in self._changes}
            self._history.append({"round": saved["round"], "step": _steps(saved), "changes": changes})
        if self._checkpoints:
            self._checkpoints.keep_aside(path)
        return saved

    def configuration(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: the settings in force, and what was changed when.

        What the user has besides is at the top, the strategy's own is in "strategy"; "changes" is a list of dicts, one
        for each time that the run was resumed with other settings: "round" and "step" (0-based) from which they are in
        force, and "changes", which has the value before and the new one by setting.
        """
        own = {name: value for name, value in self._settings.items() if name not in ("model", "layers", "run_config")}
        return {**self._run_config, "strategy": own, "changes": self._history}

    def save(self, run: Run, server_round: int, ledger: EpochLedger, epoch: Epoch, delays: DelayModel | None) -> None:
        """Write a checkpoint, within or at the end of a round's training; what hinders that is logged, not raised."""
        if self._checkpoints is not None:
            try:
                with run.summary.spending("records"):
                    self._save(self._checkpoints, run, server_round, ledger, epoch, delays)
            except (OSError, SafetensorError) as error:
                folder = self._checkpoints.folder
                log.error("round %d: no checkpoint was written in %s, the run goes on: %s", server_round, folder, error)

    def _save(
        self,
        checkpoints: Checkpoints,
        run: Run,
        server_round: int,
        ledger: EpochLedger,
        epoch: Epoch,
        delays: DelayModel | None,
    ) -> None:
        tree = {
            "settings": self._settings,
            "changes": self._history,
            "round": server_round,
            "trainer": {**run.backend.state_dict(run.state), "state": run.current_state()},
            "membership": run.membership.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "ledger": ledger.state_dict(),
            "epoch": epoch.state_dict(),
            "pooled": run.saved_pooled(),
            "norms": None if run.runner.validator.bounds is None else run.runner.validator.bounds.state_dict(),
            "secure": None if run.runner.secure is None else run.runner.secure.state_dict(),
            "delays": delays.state_dict() if isinstance(delays, DelayEstimator) else None,
            "metrics_position": run.recorder.position(),
            "summary": run.summary.state_dict(),
            "result": {name: _plain(getattr(run.result, name)) for name in _RESULT_METRICS},
        }
        checkpoints.save(server_round, len(epoch), tree)

    def restore(self, run: Run, saved: Mapping[str, Any], delays: DelayModel | None) -> None:
        """Bring a run to where a checkpoint was written, with the settings that it has now."""
        run.backend.load_state_dict(saved["trainer"])
        run.membership.load_state_dict(saved["membership"])
        run.state |= saved["trainer"]["state"]
        self._scheduler.load_state_dict(saved["scheduler"])
        settings.apply(run.backend.optimizer, self._scheduler.wrapped, saved["settings"], self._settings)
        run.restore_pooled(saved["pooled"])
        if saved["delays"] is not None and isinstance(delays, DelayEstimator):
            delays.load_state_dict(saved["delays"])
        run.summary.load_state_dict(saved["summary"])
        if run.runner.validator.bounds is not None and saved["norms"] is not None:
            run.runner.validator.bounds.load_state_dict(saved["norms"])
        if run.runner.secure is not None and saved["secure"] is not None:
            run.runner.secure.load_state_dict(saved["secure"])
        run.summary.resumed += 1
        log.info("Resumed in round %d, after step %d.", saved["round"], _steps(saved))
        if keeps_averages_apart(run.backend.optimizer):
            log.warning(
                "The optimizer has hooks after its steps: if they keep averages of the weights, those begin anew: a "
                "checkpoint holds what is in the optimizer's state_dict. Add them to it with "
                "register_state_dict_post_hook, as in docs/transformers.md, Recipes"
            )
        if self._changes:
            told = "".join(f"\n  {change}" for change in self._changes)
            log.warning("Settings have changed since the checkpoint was written, the new ones are used:%s", told)
        if self._settings["num_rounds"] < saved["round"]:
            log.warning(
                "num_rounds is %d, but the checkpoint is of round %d, after step %d: nothing is trained, the result is "
                "the checkpoint's model",
                *(self._settings["num_rounds"], saved["round"], _steps(saved)),
            )


def check_checkpoints(
    method: SplitMethod, every: int, keep: int, resume_from: str | Path | None, output_dir: str | Path | None
) -> str | Path | None:
    """Return "latest", or where the checkpoint lies to resume from; refuse what cannot be written or read.

    Raises
    ------
    ConfigError
        If checkpoints are wanted that cannot be.
    """
    if (every or resume_from == "latest") and (output_dir is None or not keep):
        raise ConfigError(
            "checkpoint_every and resume_from='latest' need an output_dir and keep_checkpoints of at least 1, got "
            f"{output_dir!r} and {keep}"
        )
    if every and not method.resumable_within_round:
        raise ConfigError(
            f"with method {method.name!r} clients keep parts of the model within a round: checkpoints are "
            f"written at its end only, got checkpoint_every={every}: leave it 0"
        )
    return resume_from if resume_from == "latest" else check_path(resume_from or None, "resume_from")


def checkpoints_in(output_dir: str | Path | None, keep: int) -> Checkpoints | None:
    """Return where checkpoints are kept, if any are."""
    return Checkpoints(Path(output_dir) / checkpoint.FOLDER, keep) if output_dir is not None and keep else None


def saved_result(saved: Mapping[str, Any]) -> Result:
    """Return Flower's result as far as a checkpoint has it: the model as it was, and the metrics of the rounds."""
    result = Result()
    result.arrays = state_to_arrays(saved["trainer"]["state"])
    for name in _RESULT_METRICS:
        setattr(result, name, {r: MetricRecord(values) for r, values in saved["result"][name].items()})
    return result


def _steps(saved: Mapping[str, Any]) -> int:
    """Return how many steps the round of a checkpoint had."""
    return sum(len(saved["epoch"][name]) for name in ("steps", "waiting"))


def _plain(metrics: Mapping[int, MetricRecord]) -> dict[int, dict[str, Any]]:
    return {server_round: dict(record) for server_round, record in metrics.items()}
