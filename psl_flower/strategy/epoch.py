"""The bookkeeping of one round: its steps as they commit, their batch deviation, and the round's summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Self

import numpy as np

from psl_flower.batch_plan import BatchPlan, PlanStep
from psl_flower.metrics.deviation import batch_deviation, client_mix_deviation, summarize_deviation
from psl_flower.population import Population
from psl_flower.records import RoundRecord, StepRecord
from psl_flower.server import Outcome, Scores
from psl_flower.strategy.recorder import RunRecorder
from psl_flower.typing import IntArray


class Epoch:
    """Collects the committed steps of a round and hands them to the recorder; a context manager.

    A step is written as soon as its batch deviation can be told. Where the classes of the pooled data are not known
    yet, that is at the end of the epoch: by then every example's label has been seen exactly once.

    Parameters
    ----------
    recorder : RunRecorder
        Not closed here.
    server_round : int
        1-based.
    population : Population
        The epoch's clients with all they hold.
    pooled : (C,) int64, optional
        Class counts of all data, if known.
    metrics : dict, optional
        The user's own, see `psl_flower.server.Scores`.
    once : bool
        Whether each example is in the epoch once. If not, its labels do not tell the classes of the pooled data.
    """

    def __init__(
        self,
        recorder: RunRecorder,
        server_round: int,
        population: Population,
        *,
        pooled: IntArray | None = None,
        metrics: Mapping[str, Any] | None = None,
        once: bool = True,
    ) -> None:
        self._once = once
        self._recorder, self._round = recorder, server_round
        self.population = population
        self.seconds_plan = 0.0
        self.bytes_around = [0, 0]  # sent and received before and after the steps
        self._pooled = pooled
        self._steps: list[StepRecord] = []
        self._class_counts: list[IntArray] = []
        self._waiting: list[StepRecord] = []
        self._client_mix: list[float] = []
        self._scores = Scores(metrics)

    def __len__(self) -> int:
        return len(self._steps) + len(self._waiting)

    def add(
        self, record: StepRecord, step: PlanStep, class_counts: IntArray | None, outcome: Outcome | None = None
    ) -> None:
        """Count a committed step in.

        Parameters
        ----------
        record : StepRecord
        step : PlanStep
            Who contributed how much.
        class_counts : (C,) int64, optional
            Its batch's labels.
        outcome : Outcome, optional
            What the server's part made of it; without it, the round's loss is the steps' mean over examples.
        """
        if outcome is not None:
            outcome.add_to(self._scores)
        alone = BatchPlan(self.population, np.array([0, len(step.clients)]), step.clients, step.quotas)
        self._client_mix.append(float(client_mix_deviation(alone)[0]))
        if class_counts is None or (self._pooled is None and not self._once):
            self._keep(record)
            return
        self._class_counts.append(class_counts)
        if self._pooled is None:
            self._waiting.append(record)
        else:
            self._keep(_with_deviation([record], [class_counts], self._pooled)[0])

    def pooled(self) -> IntArray | None:
        """Return the class counts of the examples used so far, (C,); those of all data once the epoch is over."""
        return _stack(self._class_counts).sum(axis=0) if self._class_counts else None

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a checkpoint."""
        return {
            "steps": [asdict(record) for record in self._steps],
            "waiting": [asdict(record) for record in self._waiting],
            "class_counts": _stack(self._class_counts) if self._class_counts else None,
            "client_mix": self._client_mix,
            "seconds_plan": self.seconds_plan,
            "bytes_around": self.bytes_around,
            "scores": self._scores.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; what it has written is not written again."""
        self._steps = [StepRecord(**values) for values in state["steps"]]
        self._waiting = [StepRecord(**values) for values in state["waiting"]]
        self._class_counts = [] if state["class_counts"] is None else list(state["class_counts"])
        self._client_mix, self.seconds_plan = list(state["client_mix"]), state["seconds_plan"]
        self.bytes_around = list(state["bytes_around"])
        self._scores.load_state_dict(state["scores"])

    def summary(self, examples_unseen: int = 0) -> RoundRecord:
        """Write the steps still held back, and return the round's record."""
        pooled = self.pooled()
        if self._waiting and pooled is not None:
            for record in _with_deviation(self._waiting, self._class_counts, pooled):
                self._keep(record)
            self._waiting.clear()
        steps = self._steps
        sizes = np.array([s.batch_size for s in steps])
        found = self._scores.result() or _means(steps)
        deviations = [s.deviation for s in steps if s.deviation is not None]
        spread = summarize_deviation(deviations, sizes) if deviations else None
        simulated = [s.seconds_simulated for s in steps if s.seconds_simulated is not None]
        return RoundRecord(
            round=self._round,
            loss=found.pop("loss"),
            accuracy=found.pop("accuracy", None),
            metrics_of_user=found,
            deviation_mean=None if spread is None else spread.mean,
            deviation_p95=None if spread is None else spread.p95,
            deviation_weighted=None if spread is None else spread.weighted_mean,
            num_examples=int(sizes.sum()),
            num_steps=len(steps),
            num_clients=int((self.population.sizes > 0).sum()),
            clients_per_step=float(np.mean([s.clients for s in steps])) if steps else 0.0,
            bytes_sent=_sum([s.bytes_sent for s in steps], self.bytes_around[0]),
            bytes_received=_sum([s.bytes_received for s in steps], self.bytes_around[1]),
            examples_unseen=examples_unseen,
            client_mix_mean=float(np.mean(self._client_mix)) if self._client_mix else 0.0,
            seconds_plan=self.seconds_plan,
            seconds_real=float(sum(s.seconds_real for s in steps)),
            seconds_simulated=float(sum(simulated)) if simulated else None,
        )

    def _keep(self, record: StepRecord) -> None:
        self._steps.append(record)
        self._recorder.step(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for record in self._waiting:  # only after an error: the epoch is not over, so their deviation is not known
            self._keep(record)


def _means(steps: list[StepRecord]) -> dict[str, float]:
    """Return the means over examples, where the steps' outcomes are not known."""
    found = {}
    for name in ("loss", "accuracy"):
        known = [(value, s.batch_size) for s in steps if (value := getattr(s, name)) is not None]
        if known:
            values, sizes = zip(*known, strict=True)
            found[name] = float(np.average(values, weights=sizes))
    return {"loss": math.nan, **found}


def _with_deviation(records: list[StepRecord], counts: list[IntArray], pooled: IntArray) -> list[StepRecord]:
    table = _stack([pooled, *counts])
    return [replace(r, deviation=float(d)) for r, d in zip(records, batch_deviation(table[1:], table[0]), strict=True)]


def _sum(numbers: list[int | None], more: int) -> int | None:
    """Return the sum, with what came around the steps; None where nothing is sent."""
    known = [n for n in numbers if n is not None]
    return sum(known) + more if known else None


def _stack(counts: list[IntArray]) -> IntArray:
    """Return class counts as one table, (len(counts), C); some may know fewer classes than others."""
    width = max(map(len, counts))
    return np.stack([np.pad(c, (0, width - len(c))) for c in counts])
