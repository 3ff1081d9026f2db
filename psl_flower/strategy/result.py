"""What a run leaves behind: metrics of steps and rounds, curves, the model and the configuration."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from flwr.app import MetricRecord
from safetensors.torch import save_file
from torch import Tensor

from psl_flower.strategy.curves import save_curves

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"

log = logging.getLogger("flwr.psl_flower")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One committed step.

    Parameters
    ----------
    loss, accuracy : float
        Over the global batch, before the update; accuracy is None unless it is classification.
    deviation : float or None
        L1 distance of the batch's class distribution to that of all data. None until that is known: it takes the
        first epoch where clients are not asked for their class counts.
    batch_size, clients : int
        Examples, and clients that contributed them.
    bytes_sent, bytes_received : int
        Of tensors, both exchanges.
    seconds_real : float
        Wall clock.
    seconds_simulated : float or None
        What the step takes with the simulated delays, on the virtual clock; None without simulated delays.
    """

    round: int
    step: int
    loss: float
    accuracy: float | None
    deviation: float | None = None
    batch_size: int
    clients: int
    bytes_sent: int
    bytes_received: int
    seconds_real: float
    seconds_simulated: float | None = None


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round: the means over its examples, and the evaluations after it.

    `deviation_mean` and `deviation_p95` are over steps (mean and 95th percentile), `deviation_weighted` is the mean
    over examples: tiny batches count little in it. `client_mix_mean` is the mean L1 distance of the steps' client
    shares to the clients' shares of all data. `examples_unseen` are those of clients that could not be reached.
    `seconds_plan` is the time it took to build the schedule; `seconds_real` and `seconds_simulated` add up the steps on
    the wall clock and on the virtual clock.
    """

    round: int
    loss: float
    accuracy: float | None
    deviation_mean: float | None
    deviation_p95: float | None
    deviation_weighted: float | None
    num_examples: int
    num_steps: int
    num_clients: int
    clients_per_step: float
    bytes_sent: int
    bytes_received: int
    examples_unseen: int = 0
    client_mix_mean: float
    seconds_plan: float
    seconds_real: float
    seconds_simulated: float | None
    evaluate_clientapp: dict[str, Any] = field(default_factory=dict)
    evaluate_serverapp: dict[str, Any] = field(default_factory=dict)

    def metrics(self) -> MetricRecord:
        """Return the training metrics as Flower has them."""
        skipped = ("round", "evaluate_clientapp", "evaluate_serverapp")
        return MetricRecord({k: v for k, v in asdict(self).items() if k not in skipped and v is not None})


class RunRecorder:
    """Writes what a run leaves behind into a folder; without a folder it only keeps the rounds. A context manager.

    Parameters
    ----------
    folder : path, optional
        Made if it is not there; files of an earlier run in it are replaced.
    config : dict
        The resolved configuration, written at once.
    position : int, optional
        Go on from here in the metrics of the run that this one resumes, a `position` of its recorder.
    """

    def __init__(self, folder: str | Path | None, config: Mapping[str, Any], position: int | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self.config = json.loads(json.dumps(dict(config), default=str))
        self._file: IO[str] | None = None
        self.steps: list[StepRecord] = []
        self.rounds: list[RoundRecord] = []
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.config, indent=2)
            (self._folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            if position is not None:
                self._go_on(self._folder / METRICS_FILE, position)
            self._file = (self._folder / METRICS_FILE).open("w" if position is None else "a", encoding="utf-8")

    def _go_on(self, path: Path, position: int) -> None:
        """Cut the metrics off behind `position`, and read those before it."""
        if not path.exists() or path.stat().st_size < position:
            log.warning("The metrics before the checkpoint are not in %s: it will hold those from now on.", path)
            path.unlink(missing_ok=True)
            return
        os.truncate(path, position)
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if values.pop("kind") == "step":
                self.steps.append(StepRecord(**values))
            else:
                self.rounds.append(RoundRecord(**values))

    def position(self) -> int:
        """Return how long the metrics are, in bytes; they are on the disk then."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary of faults and time."""
        if self._folder is not None:
            text = json.dumps(dict(summary), indent=2)
            (self._folder / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """Write a step's line."""
        self.steps.append(record)
        self._write("step", asdict(record))

    def round(self, record: RoundRecord) -> None:
        """Write a round's line."""
        self.rounds.append(record)
        self._write("round", asdict(record))

    def finish(self, state: Mapping[str, Tensor]) -> None:
        """Write the model and the curves."""
        if self._folder is None:
            return
        # tensors that share memory, or are not contiguous, cannot be written as they are
        save_file({name: t.detach().cpu().clone().contiguous() for name, t in state.items()}, self._folder / MODEL_FILE)
        if self.rounds:
            save_curves(self._folder / CURVES_FILE, self.steps, self.rounds)

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **_finite(values)}, allow_nan=False) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _finite(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
