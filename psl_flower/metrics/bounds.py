"""What no batch and no schedule can do better than: Serfling's bound on deviations, and a bound on epoch time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.checks import as_int64, check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.linear_program import LinearProgram
from psl_flower.population import Population
from psl_flower.samplers.suppliers import Suppliers
from psl_flower.samplers.tiers import merged_tiers


def serfling_bound(batch: int, population: int, confidence: float = 0.95) -> float:
    """Return how far a class's share of a random batch can be from its share of the population, with some confidence.

    Serfling (1974), for b examples drawn from N without replacement, and for each class::

        P(|p_batch - p| >= eps) <= 2 exp(-2 b eps^2 / (1 - (b - 1) / N))

    This is the eps that makes the right side ``1 - confidence``. It holds for the batches of `UniformGlobalSampler`,
    and it is loose: at 95 %, a class of a tenth of the data is off by less than half of it (docs/method.md, 4).

    Parameters
    ----------
    batch : int
        Examples drawn, b, from 1 to `population`.
    population : int
        Examples in all, N.
    confidence : float
        Above 0 and below 1.

    Raises
    ------
    ConfigError
        If an argument is out of range.

    Examples
    --------
    >>> round(serfling_bound(128, 50_000, 0.95), 4)
    0.1199
    """
    population = check_int(population, "population", least=1)
    batch = check_int(batch, "batch", least=1)
    if batch > population:
        raise ConfigError(f"batch must be at most the population of {population}, got {batch}")
    confidence = check_float(confidence, "confidence", above=0)
    if confidence >= 1:
        raise ConfigError(f"confidence must be below 1, got {confidence}: no finite bound is certain")
    return math.sqrt((1 - (batch - 1) / population) * math.log(2 / (1 - confidence)) / (2 * batch))


def schedule_lower_bound(population: Population, targets: ArrayLike, *, max_groups: int = 32) -> float:
    """Return seconds that no schedule with these class targets can beat, by a linear program (docs/method.md, 3).

    Steps are grouped by their slowest participant; group g has those whose slowest takes ``l_g`` seconds for a single
    example. ``u_tg`` is the share of step t in group g, ``w_g`` the group's number of steps, ``y_gkc`` what client k
    delivers of class c in it and ``z_g`` its seconds::

        minimise sum_g z_g      subject to
        z_g >= l_g w_g                                        somebody takes l_g in each of its steps
        z_g >= latency_k w_g + per_sample_k sum_c y_gkc       for every client k that may take part in group g
        sum_g y_gkc = n_kc,  y_gkc = 0 if latency_k + per_sample_k > l_g
        sum_k y_gkc = sum_t u_tg m_tc,  sum_g u_tg = 1,  w_g = sum_t u_tg,  0 <= u

    It leaves out that examples and steps are whole, and that loads differ between the steps of a group: with times per
    example that count, real schedules stay some percent above it.

    Parameters
    ----------
    population : Population
        K clients, with label counts and delays.
    targets : (T, C) int
        Examples of each class in each step's global batch, e.g. from `psl_flower.samplers.targets.class_targets` or
        summed from a plan's ``class_quotas``. Columns add up to the clients' examples.
    max_groups : int
        Where clients have more different speeds than this, neighbouring ones are merged and taken to be as fast as the
        fastest: quicker to solve (32: about a second at K = 64, T = 391), but a looser bound.

    Raises
    ------
    ConfigError
        If label counts or delays are missing, or the targets are negative or do not use every example once.
    """
    max_groups = check_int(max_groups, "max_groups", least=1)
    for field in ("label_counts", "delays"):
        if getattr(population, field) is None:
            raise ConfigError(f"a lower bound needs the population's {field}, which are not given")
    suppliers = Suppliers.of(population.with_data())
    table = as_int64(targets, "targets")
    if table.ndim != 2 or table.shape[1] != suppliers.counts.shape[1]:
        raise ConfigError(f"targets must have shape (steps, {suppliers.counts.shape[1]}), got {table.shape}")
    if table.size and table.min() < 0:
        raise ConfigError(f"targets must not be negative, got {table.min()}")
    wrong = np.flatnonzero(table.sum(axis=0) != suppliers.counts.sum(axis=0))
    if wrong.size:
        c = wrong[0]
        raise ConfigError(
            f"targets must use every example once: class {c} has {suppliers.counts[:, c].sum()} examples, "
            f"{table[:, c].sum()} are asked for"
        )

    scale = float(suppliers.first_reply.max())
    if scale == 0:
        return 0.0
    seconds, tier = merged_tiers(suppliers, len(table), max_groups, up=False)
    seconds = seconds / scale
    # clients as fast as their tier: its seconds for one example, the latency giving way before the time per example
    per_sample = np.minimum(suppliers.per_sample / scale, seconds[tier])
    latency = seconds[tier] - per_sample

    kinds, repeats = np.unique(table, axis=0, return_counts=True)  # equal steps are interchangeable
    num_groups, num_classes = len(seconds), table.shape[1]
    groups = np.arange(num_groups)
    clients, labels = suppliers.pairs
    pairs, pair_groups = np.nonzero(groups >= tier[clients][:, None])

    program = LinearProgram()
    time = program.variables(num_groups, cost=1.0)  # z
    length = program.variables(num_groups)  # w
    share = program.variables((len(kinds), num_groups))  # u, of all steps of a kind
    work = program.variables(len(pairs))  # y

    rows = program.at_most.new(np.zeros(num_groups))
    program.at_most.put(rows, length, seconds)
    program.at_most.put(rows, time, -1.0)
    timed, timed_groups = np.nonzero((groups >= tier[:, None]) & (per_sample > 0)[:, None])
    rows = program.at_most.new(np.zeros(len(timed)))
    program.at_most.put(rows, length[timed_groups], latency[timed])
    program.at_most.put(rows, time[timed_groups], -1.0)
    row_of = np.full((len(tier), num_groups), -1)
    row_of[timed, timed_groups] = rows
    row, slope = row_of[clients[pairs], pair_groups], per_sample[clients[pairs]]
    program.at_most.put(row[row >= 0], work[row >= 0], slope[row >= 0])

    rows = program.equal.new(suppliers.counts[clients, labels])
    program.equal.put(rows[pairs], work, 1.0)
    rows = program.equal.new(repeats)
    program.equal.put(rows[:, None], share, 1.0)
    rows = program.equal.new(np.zeros(num_groups))
    program.equal.put(rows, length, 1.0)
    program.equal.put(rows[None, :], share, -1.0)
    rows = program.equal.new(np.zeros((num_groups, num_classes)))
    program.equal.put(rows[pair_groups, labels[pairs]], work, 1.0)
    kind, label = np.nonzero(kinds)
    program.equal.put(rows.T[label], share[kind], -kinds[kind, label][:, None])
    return program.solve().value * scale
