"""Federated averaging, and the part of it that SplitFed shares: clients that start a round from the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from psl_flower.experiments.algorithms.base import Algorithm
from psl_flower.experiments.data import Data
from psl_flower.experiments.schedule import Schedule
from psl_flower.experiments.setting import Setting
from psl_flower.typing import FloatArray


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

    def __init__(self, setting: Setting, data: Data, model: nn.Module) -> None:
        super().__init__(setting, data, model)
        self._fresh = self.optimizers  # of each client
        self._share(model.state_dict())

    def _share(self, state: Mapping[str, Tensor]) -> None:
        """Have every client train a copy of this part of the state."""
        self._averaged = list(state.values())
        self._start = [t.clone() for t in self._averaged]
        self._sum = [torch.zeros_like(t, dtype=None if t.is_floating_point() else torch.float64) for t in self._start]

    def _order(self, epoch: int) -> list[int]:
        """Return the order in which the clients are gone through; here it makes no difference."""
        return list(self.population.client_ids.tolist())

    def schedule(self, epoch: int) -> Schedule:
        """Return the clients' batches, client by client."""
        schedule = self.turns(epoch, self._order(epoch))
        self._clients = schedule.plan.clients  # one a step
        return schedule

    def before(self, step: int) -> None:
        """Start a client's turn from the global weights."""
        if step == 0 or self._clients[step] != self._clients[step - 1]:
            _copy(self._start, self._averaged)
            for optimizer in self._fresh:
                optimizer.state.clear()

    def after(self, step: int) -> None:
        """Add what came out of a client's turn to the average."""
        client = self._clients[step]
        if step == len(self._clients) - 1 or client != self._clients[step + 1]:
            weight = float(self.population.sizes[client] / self.population.num_examples)
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
        delays = self.delays
        if delays is None:
            return None, None
        examples = np.bincount(schedule.plan.rows(), schedule.plan.quotas, len(delays))
        return None, float((delays.latency + delays.per_sample * examples)[examples > 0].max())


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
