"""SplitFed, versions 1 and 2: split learning whose clients work at the same time, and average.

Thapa et al. 2022 (AAAI, arXiv 2004.12088) can be read in two ways. Their algorithm 1 has the main server update its
half once for every exchange, with the average of all clients' gradients weighted by n_k / n. Their section on variants
has the server-side models of version 1 run separately and averaged at each global epoch, as their published code does:
a copy for every client, updated with each of its batches. This is the second reading. The weights of both averages are
n_k / n, as the paper says; the code leaves them out, for its clients hold equally much.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from psl_flower.app.task import cut_of
from psl_flower.experiments.algorithms.base import Algorithm
from psl_flower.experiments.algorithms.fedavg import FedAvg
from psl_flower.experiments.data import Data
from psl_flower.experiments.schedule import Schedule
from psl_flower.experiments.setting import Setting
from psl_flower.split import split_module
from psl_flower.typing import FloatArray

# keeps the order of clients apart from every other use of the seed, see Note [Sampler streams] in samplers/base.py
_ORDER_STREAM = 5


class SplitFedV1(FedAvg):
    """SplitFed version 1: every client has a copy of both halves, all are averaged at the end of a round.

    With a server-side copy a client, nothing of a turn depends on other clients: the weights are those of `FedAvg` with
    the same batches. What differs is who computes what and how long it takes. A step is one local update of one client,
    an exchange with the server each: a round takes ``max_k sum_j (latency_k + per_sample_k * b_kj)``.
    """

    def seconds(self, schedule: Schedule) -> tuple[FloatArray | None, float | None]:
        """Return the slowest client's time: the sum of its steps."""
        delays, plan = self.delays, schedule.plan
        if delays is None:
            return None, None
        rows = plan.rows()
        return None, float(np.bincount(rows, delays.latency[rows] + delays.per_sample[rows] * plan.quotas).max())


class SplitFedV2(FedAvg):
    """SplitFed version 2: one server half for all, trained on client after client; only client halves are averaged.

    Every round the clients take turns in a random order, each for all its batches, as in the authors' code (the text
    could also mean a new order for every exchange). Each trains a copy of the client half with the one server half; the
    copies are averaged at the end, and the server half stays as the last turn left it. The server half's optimizer
    remembers across turns and rounds, a client half's starts afresh with each turn.

    A step is one batch of one client. As the server half goes from turn to turn, so does the time: a round takes the
    sum over all steps, as in sequential split learning.
    """

    def __init__(self, setting: Setting, data: Data, model: nn.Module) -> None:
        super().__init__(setting, data, model)
        half = split_module(model, cut_of(setting.config))[0].state_dict()
        parts = [[p for n, p in model.named_parameters() if (n in half) == client] for client in (True, False)]
        self.optimizers = [self.make_optimizer(part) for part in parts]
        self._fresh = self.optimizers[:1]
        self._share({name: t for name, t in model.state_dict().items() if name in half})

    def _order(self, epoch: int) -> list[int]:
        seed = np.random.SeedSequence([self.setting.config.seed, epoch], spawn_key=(_ORDER_STREAM,))
        return list(np.random.default_rng(seed).permutation(self.population.client_ids).tolist())

    def seconds(self, schedule: Schedule) -> tuple[FloatArray | None, float | None]:
        """Return every step's time, and their sum."""
        return Algorithm.seconds(self, schedule)
