"""Federated averaging, and the part of it that SplitFed shares: clients that start a round from the same weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from psl_flower.experiments.algorithms.base import Algorithm, Task
from psl_flower.experiments.schedule import Schedule
from psl_flower.samplers.base import FloatArray


class FedAvg(Algorithm):
    """Federated averaging (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) with all clients in every round.

    Every client starts from the global model with a fresh optimizer, trains on batches of its own, and the global model
    becomes the average of what came out, weighted by n_k / n. As in Flower's FedAvg, that is the average of the whole
    state dict, the buffers of batch norm included; buffers of whole numbers are rounded.

    A step is one local update of one client. The clients work at the same time, so that steps have no simulated time of
    their own; a round takes ``max_k(latency_k + per_sample_k * examples_k)``: one exchange with the server, and all the
    examples of the client's passes. A client of FedAvg computes the whole model and not only the client half;
    `per_sample` is the same for all algorithms, which favours FedAvg.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._averaged = self._average_over()
        self._start = [t.clone() for t in self._averaged]
        self._sum = [_zeros(t) for t in self._averaged]
        self._turns = np.zeros(0, dtype=np.int64)
        self._weights = task.population.sizes / task.population.num_examples
        self._fresh = self.optimizers

    def _average_over(self) -> list[Tensor]:
        """Return the tensors that every client has a copy of."""
        return list(self.state().values())

    def _order(self, epoch: int) -> list[int]:
        """Return the order in which the clients are gone through; here it makes no difference."""
        return list(self.task.population.client_ids.tolist())

    def schedule(self, epoch: int) -> Schedule:
        """Return the clients' batches, client by client."""
        schedule = self.task.turns(epoch, self._order(epoch))
        self._turns = schedule.plan.clients  # one a step
        return schedule

    def before(self, step: int) -> None:
        """Start a client's turn from the global weights."""
        if step == 0 or self._turns[step] != self._turns[step - 1]:
            _copy(self._start, self._averaged)
            for optimizer in self._fresh:
                optimizer.state.clear()

    def after(self, step: int) -> None:
        """Add what came out of a client's turn to the average."""
        if step == len(self._turns) - 1 or self._turns[step] != self._turns[step + 1]:
            weight = float(self._weights[self._turns[step]])
            for total, t in zip(self._sum, self._averaged, strict=True):
                total.add_(t.detach(), alpha=weight)

    def end_round(self) -> None:
        """Let the average be the global weights."""
        for total, start in zip(self._sum, self._start, strict=True):
            start.copy_(total if start.is_floating_point() else total.round())
            total.zero_()
        _copy(self._start, self._averaged)

    def seconds(self, schedule: Schedule) -> tuple[FloatArray | None, float | None]:
        """Return the slowest client's time: one exchange, all its examples."""
        delays = self.task.delays
        if delays is None:
            return None, None
        examples = np.bincount(schedule.plan.rows(), schedule.plan.quotas, len(delays))
        return None, float((delays.latency + delays.per_sample * examples)[examples > 0].max())


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=None if tensor.is_floating_point() else torch.float64)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
