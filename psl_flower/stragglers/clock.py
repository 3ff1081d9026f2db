"""What steps cost on a virtual clock: the slowest participant decides, nobody sleeps."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.batch_plan import BatchPlan
from psl_flower.errors import ConfigError
from psl_flower.population import Delays
from psl_flower.typing import FloatArray


def step_times(plan: BatchPlan, delays: Delays | None = None) -> FloatArray:
    """Return how long every step of a plan takes (docs/method.md, 1).

    A step takes ``max_k(latency_k + per_sample_k * b_k)`` over its participants.

    Parameters
    ----------
    plan : BatchPlan
        T steps; every step has at least one client.
    delays : Delays, optional
        Delays of ``plan.population``'s clients, in its order; by default the population's own.

    Returns
    -------
    (T,) float64
        Seconds.

    Raises
    ------
    ConfigError
        If there are no delays, or they are not the population's.
    """
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
    times: FloatArray = np.maximum.reduceat(replies, plan.offsets[:-1])
    return times


class VirtualClock:
    """Adds up what steps would have taken with these delays, without waiting for anything.

    Parameters
    ----------
    client_ids : (K,) int64
        Unique, in any order.
    delays : Delays
        Of these clients, in the same order.

    Attributes
    ----------
    elapsed : float
        Simulated seconds so far.

    Raises
    ------
    ConfigError
        If ids repeat, or delays do not match them.
    """

    def __init__(self, client_ids: ArrayLike, delays: Delays) -> None:
        self.elapsed = 0.0
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
        seconds = float(replies.max())
        self.elapsed += seconds
        return seconds
