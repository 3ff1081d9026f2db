"""Train the default app's task in this process, without Ray: for scripts that compare configurations, and notebooks."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord

from psl_flower.app import client_app
from psl_flower.app.server_app import make_strategy
from psl_flower.app.task import central_test, make_model
from psl_flower.config import RunConfig
from psl_flower.grid import InProcessGrid
from psl_flower.strategy.progress import clock
from psl_flower.strategy.recorder import METRICS_FILE
from psl_flower.typing import FloatArray

OnEpoch = Callable[[int, float], None]


@dataclass(frozen=True, eq=False)
class Training:
    """What one training left behind.

    Parameters
    ----------
    accuracy : (epochs + 1,) float64
        On the dataset's own test split, before training and after every epoch.
    rounds, steps : list of dict
        The lines of ``metrics.jsonl``, in order; see `psl_flower.records`.
    """

    accuracy: FloatArray
    rounds: list[dict[str, Any]]
    steps: list[dict[str, Any]]


def train_in_process(config: RunConfig, num_clients: int, on_epoch: OnEpoch | None = None) -> Training:
    """Train as ``flwr run .`` does, but with an `InProcessGrid`; files are left in ``config.output_dir``.

    Parameters
    ----------
    config : RunConfig
        Of the run. Its device and number of threads are the caller's business: torch's are left as they are.
    num_clients : int
        K.
    on_epoch : callable, optional
        Told the number of epochs trained (0 at first) and the test accuracy, after each test.

    Raises
    ------
    PSLError
        As `ParallelSplitLearning.start` does.
    """
    test, accuracy = central_test(config), list[float]()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        metrics = test(server_round, arrays)
        accuracy.append(float(metrics["accuracy"]))  # type: ignore[arg-type]
        if on_epoch:
            on_epoch(server_round, accuracy[-1])
        return metrics

    grid = InProcessGrid(client_app.app, num_nodes=num_clients, run_config=dict(config.as_run_config()))
    model = make_model(config)
    make_strategy(config).start(
        grid, ArrayRecord(model.state_dict()), num_rounds=config.num_server_rounds, evaluate_fn=evaluate
    )
    lines = (Path(config.output_dir) / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    rounds, steps = ([r for r in records if r["kind"] == kind] for kind in ("round", "step"))
    return Training(np.array(accuracy), rounds, steps)


class Progress:
    """Says on standard error which training is where and when all will be done; silences the runs' own log.

    Parameters
    ----------
    num_epochs : int
        Of all trainings together.
    """

    def __init__(self, num_epochs: int) -> None:
        logging.getLogger("flwr").setLevel(logging.WARNING)
        self._num_epochs, self._done = num_epochs, 0
        self._begin = time.monotonic()

    def of(self, name: str) -> OnEpoch:
        """Return what a training called `name` reports to."""

        def report(epoch: int, accuracy: float) -> None:
            self._done += epoch > 0
            passed = time.monotonic() - self._begin
            eta = clock(passed * (self._num_epochs - self._done) / self._done) if self._done else "unknown"
            share = f"{self._done:{len(str(self._num_epochs))}}/{self._num_epochs}"
            print(f"{share}  {name}: epoch {epoch}, accuracy {accuracy:.3f}   ETA {eta}", file=sys.stderr, flush=True)

        return report
