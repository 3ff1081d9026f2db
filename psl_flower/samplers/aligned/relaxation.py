"""The linear relaxation behind `AlignedSampler`: how many steps of which duration make the shortest epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from psl_flower.linear_program import LinearProgram
from psl_flower.samplers.suppliers import Suppliers
from psl_flower.typing import FloatArray, IndexArray, IntArray

# Note [What a tilt costs]: exchanging examples takes no time, so without a small price the program would do it for no
# gain, and would take all from one class. What several classes give up together hardly shows in the other steps: whole
# numbers are off by about as much anyway (stratified, tilt 0.1, K = 64: deviation .043 instead of .053). So giving up
# much of one class has a higher price.
_TILT_COST = 1e-6

# Pairs of client and class that the program looks at; of more, similar clients are pooled.
_MOST_PAIRS = 640


@dataclass(frozen=True, eq=False)
class PooledSuppliers:
    """The suppliers as the program sees them: U units, each a client, or similar ones taken together.

    `counts` (U, C); `unit` (K,) is each client's; no client delivers more than `most` a step.
    """

    suppliers: Suppliers
    most: int
    unit: IndexArray
    counts: IntArray

    @classmethod
    def of(cls, suppliers: Suppliers, most: int) -> PooledSuppliers:
        """Pool as few clients as keep the program small."""
        num_clients, num_pairs = len(suppliers.sizes), len(suppliers.pairs[0])
        unit = np.empty(num_clients, dtype=np.intp)
        num_units = min(num_clients, max(1, num_clients * _MOST_PAIRS // num_pairs))
        # neighbours in this order are about equally slow
        order = np.lexsort((suppliers.sizes, suppliers.per_sample, suppliers.first_reply))
        unit[order] = np.arange(num_clients) * num_units // num_clients
        counts = np.zeros((num_units, suppliers.counts.shape[1]), dtype=np.int64)
        np.add.at(counts, unit, suppliers.counts)
        return cls(suppliers, most, unit, counts)

    def client_capacity(self, levels: FloatArray) -> IntArray:
        """Examples each client can deliver in a step of each level, (G, K)."""
        return np.minimum(self.suppliers.capacity(levels, self.most), self.suppliers.sizes)

    def capacity(self, levels: FloatArray) -> FloatArray:
        """Examples each unit can deliver in a step of each level, (G, U)."""
        result = np.zeros((len(levels), len(self.counts)))
        np.add.at(result.T, self.unit, self.client_capacity(levels).T)
        return result

    def work_of_clients(self, levels: FloatArray, work: FloatArray) -> FloatArray:
        """Share the (G, U, C) work of units among the (client, class) pairs that can do it, (G, P)."""
        clients, labels = self.suppliers.pairs
        units = self.unit[clients]
        shares = work[:, units, labels] * (self.suppliers.counts[clients, labels] / self.counts[units, labels])
        shares[self.client_capacity(levels)[:, clients] == 0] = 0
        return shares


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The program's answer, in fractions of steps and examples."""

    length: FloatArray  # (G,) steps
    share: FloatArray  # (S, G) of each step
    work: FloatArray  # (G, U, C)
    tilt: FloatArray  # (G, C)
    place_duals: FloatArray  # (G, C) dual values: of a place for an example,
    step_duals: FloatArray  # (G,) and of a step


def solve_relaxation(
    pool: PooledSuppliers,
    targets: FloatArray,
    scale: float,
    levels: FloatArray,
    tilt: float,
    *,
    shortest_tilts_freely: bool = False,
) -> Relaxation:
    """Find the shortest epoch in fractions of steps.

    With ``u_sg`` the share of step s in level g, ``w_g`` the number of steps of level g, ``y_gkc`` what unit k delivers
    of class c in them, ``d_gc`` by how much their classes exceed the targets ``m_sc`` (it may be negative)::

        minimise sum_g levels_g w_g      subject to
        sum_g u_sg = 1,  w_g = scale sum_s u_sg
        sum_g y_gkc = n_kc,  sum_c y_gkc <= capacity_gk w_g
        sum_k y_gkc = scale sum_s u_sg m_sc + d_gc
        sum_c d_gc = sum_g d_gc = 0,  sum_c |d_gc| <= 2 tilt w_g

    Parameters
    ----------
    pool : PooledSuppliers
        Units k; not all of them need fit into the shorter levels, but all into the longest.
    targets : (S, C) float64
        Examples of each class in each step; `scale` times their sum is what the units hold.
    scale : float
        How many steps of the epoch each of these stands for.
    levels : (G,) float64
        Durations, ascending, the last above 0.
    tilt : float
        How many examples a step may exchange for ones of other classes.
    shortest_tilts_freely : bool
        Whether there is no such limit for the first level.

    Raises
    ------
    RuntimeError
        If the solver finds no solution.
    """
    num_levels, (num_steps, num_classes) = len(levels), targets.shape
    capacity = pool.capacity(levels)
    units, labels = np.nonzero(pool.counts)
    groups, pairs = np.nonzero(capacity[:, units])  # y where there is any capacity

    program = LinearProgram()
    length = program.variables(num_levels, cost=levels / levels[-1])
    share = program.variables((num_steps, num_levels))
    work = program.variables(len(pairs))

    sizes = pool.counts.sum(axis=1)
    tight, tight_units = np.nonzero((capacity > 0) & (capacity < np.minimum(sizes, pool.most)))
    row_of = np.full(capacity.shape, -1)
    row_of[tight, tight_units] = rows = program.at_most.new(np.zeros(len(tight)))
    row = row_of[groups, units[pairs]]
    program.at_most.put(row[row >= 0], work[row >= 0], 1.0)
    program.at_most.put(rows, length[tight], -capacity[tight, tight_units])

    # a unit's capacity is no help to one of its clients that has more than the others
    pooled = np.flatnonzero((np.bincount(pool.unit) > 1)[pool.unit] & (pool.suppliers.per_sample > 0))
    rows = program.at_most.new(-pool.suppliers.sizes[pooled])
    program.at_most.put(rows[:, None], length, -pool.client_capacity(levels).T[pooled])

    rows = program.equal.new(pool.counts[units, labels])
    program.equal.put(rows[pairs], work, 1.0)
    rows = program.equal.new(np.ones(num_steps))
    program.equal.put(rows[:, None], share, 1.0)
    steps = program.equal.new(np.zeros(num_levels))
    program.equal.put(steps, length, 1.0)
    program.equal.put(steps, share, -scale)
    places = program.equal.new(np.zeros((num_levels, num_classes)))
    program.equal.put(places[groups, labels[pairs]], work, 1.0)
    step, label = np.nonzero(targets)
    program.equal.put(places.T[label], share[step], -scale * targets[step, label][:, None])

    signed: list[tuple[IndexArray, float]] = []
    if tilt:
        # d = more - less - much_less; see Note [What a tilt costs]
        costs = ((1.0, 1), (-1.0, 1), (-1.0, 10))
        signed = [(program.variables(places.shape, cost=cost * _TILT_COST), sign) for sign, cost in costs]
        some = program.at_most.new(np.zeros(places.shape))
        program.at_most.put(some, signed[1][0], 1.0)
        program.at_most.put(some, length[:, None], -1.5 * tilt / num_classes)
        bounded = slice(1, None) if shortest_tilts_freely else slice(None)
        rows = program.at_most.new(np.zeros(len(length[bounded])))
        program.at_most.put(rows, length[bounded], -2.0 * tilt)
        by_level, by_class = program.equal.new(np.zeros(num_levels)), program.equal.new(np.zeros(num_classes))
        for variables, sign in signed:
            program.equal.put(places, variables, -sign)
            program.equal.put(by_level[:, None], variables, sign)
            program.equal.put(by_class, variables, sign)
            program.at_most.put(rows[:, None], variables[bounded], 1.0)

    solution = program.solve()
    point = solution.point
    delivered = np.zeros((num_levels, *pool.counts.shape))
    delivered[groups, units[pairs], labels[pairs]] = point[work]
    return Relaxation(
        point[length],
        point[share],
        delivered,
        sum((sign * point[variables] for variables, sign in signed), start=np.zeros(places.shape)),
        solution.duals[places],
        solution.duals[steps],
    )
