"""What steps cost on a virtual clock: the slowest participant decides, nobody sleeps."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.batch_plan import BatchPlan
from psl_flower.checks import check_float
from psl_flower.errors import ConfigError
from psl_flower.population import Delays
from psl_flower.typing import FloatArray


def step_times(
    plan: BatchPlan,
    delays: Delays | None = None,
    *,
    server_latency: float = 0.0,
    server_per_sample: float = 0.0,
) -> FloatArray:
    """Return how long every step of a plan takes (docs/method.md, 1).

    A step of b examples takes ``max_k(latency_k + per_sample_k * b_k)`` over its participants, plus the server's share
    ``server_latency + server_per_sample * b``.

    Parameters
    ----------
    plan : BatchPlan
        T steps; every step has at least one client.
    delays : Delays, optional
        Delays of ``plan.population``'s clients, in its order; by default the population's own.
    server_latency : float
        Seconds a step.
    server_per_sample : float
        Seconds an example of the global batch.

    Returns
    -------
    (T,) float64
        Seconds.

    Raises
    ------
    ConfigError
        If there are no delays, they are not the population's, or the server's share is negative.
    """
    server_latency = check_float(server_latency, "server_latency", least=0)
    server_per_sample = check_float(server_per_sample, "server_per_sample", least=0)
    delays = plan.population.delays if delays is None else delays
    if delays is None:
        raise ConfigError("step times need delays, the plan's population has none: pass `delays`")
    if len(delays) != len(plan.population):
        raise ConfigError(
            f"delays must name the {len(plan.population)} clients of the plan's population, got {len(delays)}"
        )
    if not len(plan):
        return np.zeros(0)
    rows = plan.rows()
    replies = delays.latency[rows] + delays.per_sample[rows] * plan.quotas
    slowest: FloatArray = np.maximum.reduceat(replies, plan.offsets[:-1])
    return slowest + server_latency + server_per_sample * plan.batch_sizes()


class VirtualClock:
    """Adds up what steps would have taken with these delays, without waiting for anything.

    Parameters
    ----------
    client_ids : (K,) int64
        Unique, in any order.
    delays : Delays
        Of these clients, in the same order.
    server_latency : float
        The server's own seconds a step.
    server_per_sample : float
        The server's own seconds an example of the global batch.
    elapsed : float
        Seconds already on the clock (a resumed run).

    Attributes
    ----------
    elapsed : float
        Simulated seconds so far.

    Raises
    ------
    ConfigError
        If ids repeat, delays do not match them, or a number is negative.
    """

    def __init__(
        self,
        client_ids: ArrayLike,
        delays: Delays,
        *,
        server_latency: float = 0.0,
        server_per_sample: float = 0.0,
        elapsed: float = 0.0,
    ) -> None:
        self.server_latency = check_float(server_latency, "server_latency", least=0)
        self.server_per_sample = check_float(server_per_sample, "server_per_sample", least=0)
        self.elapsed = check_float(elapsed, "elapsed", least=0)
        self.update(client_ids, delays)

    def update(self, client_ids: ArrayLike, delays: Delays) -> None:
        """Replace the clients and their delays (membership or speeds changed); time already elapsed stays."""
        ids = np.asarray(client_ids, dtype=np.int64)
        if ids.ndim != 1 or not ids.size:
            raise ConfigError(f"client_ids must be 1-D and name at least one client, got shape {ids.shape}")
        if len(ids) != len(delays):
            raise ConfigError(f"delays must name all {len(ids)} clients, got {len(delays)}")
        order = np.argsort(ids)
        ids = ids[order]
        repeated = ids[1:][ids[1:] == ids[:-1]]
        if repeated.size:
            raise ConfigError(f"client_ids must be unique, got {repeated[0]} more than once")
        self._ids, self._delays = ids, delays.take(order)

    def reply_times(self, clients: ArrayLike, quotas: ArrayLike) -> FloatArray:
        """Return how long each participant of a step takes, (A,) float64 seconds.

        Raises
        ------
        ConfigError
            If a client is unknown, or clients and quotas differ in length.
        """
        ids, counts = np.asarray(clients, dtype=np.int64), np.asarray(quotas, dtype=np.int64)
        if ids.ndim != 1 or ids.shape != counts.shape:
            raise ConfigError(f"clients and quotas must be 1-D and of one length, got {ids.shape} and {counts.shape}")
        rows = np.searchsorted(self._ids, ids)
        unknown = ids[(rows == len(self._ids)) | (self._ids[np.minimum(rows, len(self._ids) - 1)] != ids)]
        if unknown.size:
            raise ConfigError(f"the clock knows no delay of client {unknown[0]}: call update() when membership changes")
        times: FloatArray = self._delays.latency[rows] + self._delays.per_sample[rows] * counts
        return times

    def advance(self, clients: ArrayLike, quotas: ArrayLike) -> float:
        """Add one step to the clock and return its seconds.

        Parameters
        ----------
        clients : (A,) int64
            Ids of the participants, at least one.
        quotas : (A,) int64
            Examples each contributes.

        Raises
        ------
        ConfigError
            If there is no client, one is unknown, or clients and quotas differ in length.
        """
        replies = self.reply_times(clients, quotas)
        if not replies.size:
            raise ConfigError("a step needs at least one client, got none")
        examples = int(np.sum(quotas))
        seconds = float(replies.max()) + self.server_latency + self.server_per_sample * examples
        self.elapsed += seconds
        return seconds
