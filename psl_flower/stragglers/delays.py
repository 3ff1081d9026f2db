"""Models of how slow each client is: seeded ones for simulation, and a file."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.checks import as_int64, check_choice, check_float, check_int, check_options
from psl_flower.errors import ConfigError
from psl_flower.extras import check_extra
from psl_flower.population import Delays
from psl_flower.stragglers.estimate import DelayEstimator
from psl_flower.typing import FloatArray, IntArray

# what a client's random number is for; different ones are independent
_WHO_IS_SLOW, _LATENCY, _PER_SAMPLE = range(3)


class DelayModel(Protocol):
    """Anything that says how slow clients are."""

    def delays(self, client_ids: ArrayLike) -> Delays:
        """Return the delays of these clients, in their order.

        Parameters
        ----------
        client_ids : (K,) int64
            Unique ids, in any order.
        """
        ...


@dataclass(frozen=True)
class NoDelays:
    """No client takes any time ("none")."""

    def delays(self, client_ids: ArrayLike) -> Delays:
        """Return zeros."""
        zeros = np.zeros(len(_checked_ids(client_ids)))
        return Delays(zeros, zeros)


@dataclass(frozen=True, kw_only=True)
class SlowFractionDelays:
    """All clients are equally fast, but for a fraction that is slower by a factor ("slow-fraction").

    Who is slow depends on the seed and the set of client ids alone: it stays the same between epochs, and clients that
    come or go change it as little as the fraction allows. The defaults are the paper's "latency 10 % x10"; its
    "per-sample 10 % x10" is ``latency=0, per_sample=1``.

    Parameters
    ----------
    fraction : float
        Share of slow clients, in [0, 1]. Rounded to whole clients; above 0, at least one.
    latency, per_sample : float
        Seconds a step and seconds an example of a fast client.
    latency_factor, per_sample_factor : float
        How many times as much a slow client takes; 1 leaves it as it is.
    seed : int
        Chooses the slow clients.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    fraction: float = 0.1
    latency: float = 1.0
    per_sample: float = 0.0
    latency_factor: float = 10.0
    per_sample_factor: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("fraction", "latency", "per_sample", "latency_factor", "per_sample_factor"):
            check_float(getattr(self, name), name, least=0)
        if self.fraction > 1:
            raise ConfigError(f"fraction must be at most 1, got {self.fraction}")
        check_int(self.seed, "seed", least=0)

    def delays(self, client_ids: ArrayLike) -> Delays:
        """Return the delays of these clients, in their order; who is slow is decided among exactly these."""
        ids = _checked_ids(client_ids)
        num_slow = int(np.floor(self.fraction * len(ids) + 0.5)) or int(self.fraction > 0)
        slow = np.zeros(len(ids), dtype=np.bool_)
        slow[np.argsort(_uniforms(self.seed, ids, _WHO_IS_SLOW))[:num_slow]] = True
        return Delays(
            self.latency * np.where(slow, self.latency_factor, 1),
            self.per_sample * np.where(slow, self.per_sample_factor, 1),
        )


@dataclass(frozen=True, kw_only=True)
class LognormalDelays:
    """Latency and per-example time are lognormal and independent ("lognormal"): a crowd near the median, a long tail.

    A client's delays depend on the seed and its own id alone.

    Parameters
    ----------
    latency, per_sample : float
        Medians: seconds a step, seconds an example.
    latency_sigma, per_sample_sigma : float
        Standard deviation of the logarithm; 0 makes all clients equal, with 1 the slowest tenth takes 3.6 times the
        median or more.
    seed : int
        Source of the draw.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    latency: float = 1.0
    per_sample: float = 0.03
    latency_sigma: float = 1.0
    per_sample_sigma: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_extra("scipy", "samplers", "the delays 'lognormal'")
        for name in ("latency", "per_sample", "latency_sigma", "per_sample_sigma"):
            check_float(getattr(self, name), name, least=0)
        check_int(self.seed, "seed", least=0)

    def delays(self, client_ids: ArrayLike) -> Delays:
        """Return the delays of these clients, in their order."""
        from scipy.special import ndtri  # here: see linear_program.py

        ids = _checked_ids(client_ids)
        return Delays(
            self.latency * np.exp(self.latency_sigma * ndtri(_uniforms(self.seed, ids, _LATENCY))),
            self.per_sample * np.exp(self.per_sample_sigma * ndtri(_uniforms(self.seed, ids, _PER_SAMPLE))),
        )


@dataclass(frozen=True)
class CsvDelays:
    """Delays from a CSV file with the columns client_id, latency and per_sample, in seconds ("csv").

    Parameters
    ----------
    path : str or Path
        Read once, at construction. Other columns are ignored.

    Raises
    ------
    ConfigError
        If the file cannot be read, lacks a column, names a client twice, or holds something that is not a number.
    """

    path: str | Path
    _table: dict[int, tuple[float, float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_table", _read_delays(Path(self.path)))

    def delays(self, client_ids: ArrayLike) -> Delays:
        """Return the delays of these clients, in their order.

        Raises
        ------
        ConfigError
            If the file does not name one of them.
        """
        ids = _checked_ids(client_ids)
        missing = [int(client) for client in ids if int(client) not in self._table]
        if missing:
            raise ConfigError(f"{self.path} names no delays of client {missing[0]} ({len(missing)} missing in all)")
        values = np.array([self._table[int(client)] for client in ids]).reshape(len(ids), 2)
        return Delays(values[:, 0], values[:, 1])


DELAY_MODELS: dict[str, type[DelayModel]] = {
    "none": NoDelays,
    "slow-fraction": SlowFractionDelays,
    "lognormal": LognormalDelays,
    "csv": CsvDelays,
    "measured": DelayEstimator,
}


def delay_model(name: str, **options: Any) -> DelayModel:
    """Make a delay model by name.

    Parameters
    ----------
    name : str
        "none", "slow-fraction", "lognormal", "csv" or "measured".
    **options
        Keyword arguments of the model's class, e.g. ``fraction=0.2`` for "slow-fraction", ``path="delays.csv"`` for
        "csv".

    Raises
    ------
    ConfigError
        If the name or an option is unknown, a needed one is missing, or a value is out of range.

    Examples
    --------
    >>> delay_model("slow-fraction", fraction=0.5, latency=0.1).delays([0, 1]).latency.tolist()
    [0.1, 1.0]
    """
    model = DELAY_MODELS[check_choice(name, "delays", DELAY_MODELS)]
    check_options(options, model, f"delays {name!r}")
    return model(**options)


def _checked_ids(client_ids: ArrayLike) -> IntArray:
    ids = as_int64(client_ids, "client_ids")
    if ids.ndim != 1 or len(np.unique(ids)) != len(ids):
        raise ConfigError(f"client_ids must be 1-D and unique, got {ids}")
    return ids


def _uniforms(seed: int, client_ids: IntArray, stream: int) -> FloatArray:
    """Return a number in (0, 1) for each client that depends on (seed, id, stream) alone, without a generator for each.

    The ids step through a Weyl sequence from a start that the seed decides, and the finaliser of SplitMix64 (Steele et
    al. 2014) mixes each.
    """
    start, odd = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint64)
    mixed = start + (odd | np.uint64(1)) * client_ids.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    uniforms: FloatArray = ((mixed >> np.uint64(12)) + 0.5) * 2.0**-52
    return uniforms


def _read_delays(path: Path) -> dict[int, tuple[float, float]]:
    columns = ("client_id", "latency", "per_sample")
    table: dict[int, tuple[float, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            lacking = [column for column in columns if column not in (reader.fieldnames or ())]
            if lacking:
                raise ConfigError(f"{path} must have the columns {', '.join(columns)}, it lacks {', '.join(lacking)}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                try:
                    client = int(row["client_id"])
                    latency, per_sample = float(row["latency"]), float(row["per_sample"])
                except (TypeError, ValueError) as exc:
                    raise ConfigError(
                        f"{where}: a client id and two numbers are needed, got {list(row.values())}"
                    ) from exc
                check_float(latency, f"{where}: latency", least=0)
                check_float(per_sample, f"{where}: per_sample", least=0)
                if client in table:
                    raise ConfigError(f"{where}: client {client} is named twice")
                table[client] = latency, per_sample
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"the delays in {path} cannot be read: {exc}") from exc
    return table
