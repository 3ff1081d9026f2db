"""Delays measured in a run: robust running estimates from reply times ("measured")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.checks import as_int64, check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.population import Delays
from psl_flower.typing import FloatArray

# Note [Slope and prior]: seconds = latency + per_sample * quota is a line, fitted with Theil-Sen (the weighted median
# of the slopes between pairs of replies). Where quotas hardly vary, that slope is noise. It is therefore averaged with
# a prior slope, each weighted by its precision: the fit's is (quota spread)^2 * n / (reply noise)^2, the prior's
# 1 / (_PRIOR_SPREAD * typical seconds / typical quota)^2. The prior says that the same share of a reply's time goes to
# the examples as with the clients whose slope is known, or half where none is. Whatever the slope, latency is the
# median of what it leaves, so estimates are right at the quotas seen, and only further away does the prior matter.
_PRIOR_SHARE = 0.5
_PRIOR_SPREAD = 0.5
# A few replies that happen to lie on a line do not prove that there is no noise: as if this many replies with this
# relative noise had been seen besides.
_NOISE_REPLIES = 4
_NOISE_SHARE = 0.1


class DelayEstimator:
    """Estimates each client's latency and seconds an example from how long its replies took.

    The last `window` replies of each client are kept and a line is fitted to them by medians: single slow replies (a
    first one that loads data, a pause, a retry) do not move it, and a lasting change takes over after half a window.
    Clients not heard of yet get the medians of the others.

    Parameters
    ----------
    window : int
        Replies kept for each client, at least 2.
    latency, per_sample : float
        Seconds a step and seconds an example assumed of all clients before the first reply of any.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    def __init__(self, *, window: int = 32, latency: float = 1.0, per_sample: float = 0.0) -> None:
        self.window = check_int(window, "window", least=2)
        self.latency = check_float(latency, "latency", least=0)
        self.per_sample = check_float(per_sample, "per_sample", least=0)
        self._rows: dict[int, int] = {}
        self._seen = np.zeros(0, dtype=np.int64)  # replies of each client so far
        self._quotas = np.zeros((0, self.window))  # rings: reply i lies at i % window
        self._seconds = np.zeros((0, self.window))

    def observe(self, client_id: int, quota: int, seconds: float) -> None:
        """Take note of one reply.

        Parameters
        ----------
        client_id : int
            Who replied.
        quota : int
            Examples the reply is about, at least 1.
        seconds : float
            From sending the request to the reply, at least 0.

        Raises
        ------
        ConfigError
            If a value is out of range.
        """
        client_id = check_int(client_id, "client_id", least=0)
        quota, seconds = check_int(quota, "quota", least=1), check_float(seconds, "seconds", least=0)
        row = self._rows.setdefault(client_id, len(self._rows))
        if row == len(self._seen):
            self._grow()
        slot = self._seen[row] % self.window
        self._quotas[row, slot], self._seconds[row, slot] = quota, seconds
        self._seen[row] += 1

    def delays(self, client_ids: ArrayLike) -> Delays:
        """Return the current estimates for these clients, in their order.

        Parameters
        ----------
        client_ids : (K,) int64
            Ids, heard of or not.
        """
        ids = as_int64(client_ids, "client_ids")
        if not self._rows:
            return Delays(np.full(len(ids), self.latency), np.full(len(ids), self.per_sample))
        latency, per_sample = self._fit()
        # one row more, for clients not heard of
        latency = np.append(latency, np.median(latency))
        per_sample = np.append(per_sample, np.median(per_sample))
        rows = np.array([self._rows.get(int(client), len(self._rows)) for client in ids], dtype=np.intp)
        return Delays(latency[rows], per_sample[rows])

    def state_dict(self) -> dict[str, Any]:
        """Return the replies as plain numbers, strings, lists and dicts (for JSON); those of a client oldest first."""
        clients = {}
        for client, row in self._rows.items():
            seen = int(self._seen[row])
            slots = np.arange(max(0, seen - self.window), seen) % self.window
            clients[str(client)] = {
                "quotas": self._quotas[row, slots].astype(int).tolist(),
                "seconds": self._seconds[row, slots].tolist(),
            }
        return {"clients": clients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; as many replies are kept as this one's window holds.

        Raises
        ------
        ConfigError
            If the state lacks something or holds a value out of range; nothing is changed then.
        """
        loaded = DelayEstimator(window=self.window)
        try:
            for client, replies in state["clients"].items():
                for quota, seconds in zip(replies["quotas"], replies["seconds"], strict=True):
                    loaded.observe(int(client), quota, seconds)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ConfigError(f"this is not the state of a DelayEstimator: {exc!r}") from exc
        self._rows, self._seen = loaded._rows, loaded._seen
        self._quotas, self._seconds = loaded._quotas, loaded._seconds

    def _grow(self) -> None:
        extra = max(16, len(self._seen))
        self._seen = np.concatenate((self._seen, np.zeros(extra, dtype=np.int64)))
        self._quotas = np.concatenate((self._quotas, np.zeros((extra, self.window))))
        self._seconds = np.concatenate((self._seconds, np.zeros((extra, self.window))))

    def _fit(self) -> tuple[FloatArray, FloatArray]:
        """Return latency and per_sample of every client heard of, in row order; Note [Slope and prior] says how."""
        num_clients = len(self._rows)
        quotas, seconds = self._quotas[:num_clients], self._seconds[:num_clients]  # (K, window)
        replies = np.minimum(self._seen[:num_clients], self.window)
        known = (np.arange(self.window) < replies[:, None]).astype(np.float64)

        first, second = np.triu_indices(self.window, 1)
        run = quotas[:, second] - quotas[:, first]
        weights = np.abs(run) * known[:, first] * known[:, second]
        rise = seconds[:, second] - seconds[:, first]
        slopes = _weighted_median(np.divide(rise, run, out=np.zeros_like(run), where=run != 0), weights)

        typical_quota = _weighted_median(quotas, known)
        typical_seconds = _weighted_median(seconds, known)
        residuals = seconds - slopes[:, None] * quotas
        residuals -= _weighted_median(residuals, known)[:, None]
        noise = 1.4826 * _weighted_median(np.abs(residuals), known)  # standard deviation, were they normal
        noise2 = replies * noise**2 + _NOISE_REPLIES * (_NOISE_SHARE * typical_seconds) ** 2
        noise2 /= replies + _NOISE_REPLIES
        spread = _weighted_median(quotas, known, 0.75) - _weighted_median(quotas, known, 0.25)

        largest = typical_seconds / typical_quota  # were there no latency
        unit = np.where(largest > 0, largest, 1)
        fit_precision = replies * (spread / 1.349) ** 2 / np.where(noise2 > 0, noise2, 1) * unit**2
        prior_precision = _PRIOR_SPREAD**-2
        trust = fit_precision / (fit_precision + prior_precision)
        shares = np.clip(slopes / unit, 0, 1)
        sure = trust > 0.5
        prior_share = float(np.median(shares[sure])) if sure.any() else _PRIOR_SHARE
        per_sample = largest * (trust * shares + (1 - trust) * prior_share)
        latency = np.maximum(_weighted_median(seconds - per_sample[:, None] * quotas, known), 0)
        return latency, per_sample


def _weighted_median(values: FloatArray, weights: FloatArray, quantile: float = 0.5) -> FloatArray:
    """Return each row's weighted quantile, the median by default; entries of weight 0 do not count, (K, n) -> (K,)."""
    order = np.argsort(values, axis=1)
    reached = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    position = np.argmax(reached >= np.maximum(quantile * reached[:, -1:], np.finfo(np.float64).tiny), axis=1)
    result: FloatArray = np.take_along_axis(values, order[np.arange(len(order)), position][:, None], axis=1)[:, 0]
    return result
