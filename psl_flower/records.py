"""What is told of a run: a record a step and a record a round, the lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One committed step.

    Parameters
    ----------
    loss, accuracy : float
        Over the global batch, before the update; accuracy is None unless it is classification. NaN and None where the
        clients withhold them, see `psl_flower.methods.u_shaped`.
    deviation : float or None
        L1 distance of the batch's class distribution to that of all data. None until that is known: it takes the
        first epoch where clients are not asked for their class counts.
    batch_size, clients : int
        Examples, and clients that contributed them.
    bytes_sent, bytes_received : int or None
        Of tensors, both exchanges; None where nothing is sent (`psl_flower.experiments`).
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
    bytes_sent: int | None
    bytes_received: int | None
    seconds_real: float
    seconds_simulated: float | None = None


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round: the means over its examples, and the evaluations after it.

    `deviation_mean` and `deviation_p95` are over steps (mean and 95th percentile), `deviation_weighted` is the mean
    over examples: tiny batches count little in it. `client_mix_mean` is the mean L1 distance of the steps' client
    shares to the clients' shares of all data. `examples_unseen` are those of clients that could not be reached.
    `metrics_of_user` are the user's own metrics of training.
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
    bytes_sent: int | None
    bytes_received: int | None
    examples_unseen: int = 0
    client_mix_mean: float
    seconds_plan: float
    seconds_real: float
    seconds_simulated: float | None
    metrics_of_user: dict[str, float] = field(default_factory=dict)
    evaluate_clientapp: dict[str, Any] = field(default_factory=dict)
    evaluate_serverapp: dict[str, Any] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of training that are known, by name: what Flower's ``MetricRecord`` takes."""
        skipped = ("round", "metrics_of_user", "evaluate_clientapp", "evaluate_serverapp")
        known = {k: v for k, v in asdict(self).items() if k not in skipped and v is not None}
        if not self.num_steps:  # of no example there is no loss
            del known["loss"]
        return {**known, **self.metrics_of_user}


def read_metrics(path: Path) -> list[StepRecord | RoundRecord]:
    """Read a ``metrics.jsonl``, in its order."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{"step": StepRecord, "round": RoundRecord}[line.pop("kind")](**line) for line in lines]
