"""Sparse linear programs, written a block of variables and a block of rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from psl_flower.typing import FloatArray, IndexArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array


class Rows:
    """Rows of one kind (equalities, or upper bounds), filled in any order.

    Attributes
    ----------
    num_rows : int
        How many there are so far.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self._limits: list[FloatArray] = []
        self._parts: list[tuple[NDArray[np.generic], ...]] = []

    def new(self, limits: ArrayLike) -> IndexArray:
        """Add a row for each number of `limits` (its right-hand side) and return their indices, of the same shape."""
        values = np.asarray(limits, dtype=np.float64)
        first, self.num_rows = self.num_rows, self.num_rows + values.size
        self._limits.append(values.ravel())
        return np.arange(first, self.num_rows).reshape(values.shape)

    def put(self, rows: ArrayLike, variables: ArrayLike, coefficients: ArrayLike) -> None:
        """Add `coefficients` at (rows, variables); all three are broadcast, and what meets in one place adds up."""
        self._parts.append(tuple(part.ravel() for part in np.broadcast_arrays(rows, variables, coefficients)))

    def limits(self) -> FloatArray:
        """Return the right-hand sides, (num_rows,) float64."""
        return np.concatenate([np.empty(0), *self._limits])

    def matrix(self, num_variables: int) -> csr_array:
        """Return the coefficients, (num_rows, num_variables)."""
        from scipy.sparse import csr_array

        rows, columns, values = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        return csr_array((values.astype(np.float64), (rows, columns)), shape=(self.num_rows, num_variables))


class Solution:
    """Where a linear program has its least value.

    Parameters
    ----------
    value : float
        The least value.
    point : (n,) float64
        The variables.
    duals : (m,) float64
        What the value gains when an equality's right-hand side does, a unit.
    """

    def __init__(self, value: float, point: FloatArray, duals: FloatArray) -> None:
        self.value, self.point, self.duals = value, point, duals


class LinearProgram:
    """Minimise ``cost @ x`` over ``x >= 0`` such that ``equal`` rows equal and ``at_most`` rows do not exceed theirs.

    Attributes
    ----------
    equal, at_most : Rows
        The constraints.
    """

    def __init__(self) -> None:
        self.equal, self.at_most = Rows(), Rows()
        self._costs: list[FloatArray] = []
        self._num_variables = 0

    def variables(self, shape: int | tuple[int, ...], cost: ArrayLike = 0.0) -> IndexArray:
        """Add variables and return their indices, of the given shape; `cost` is broadcast to it."""
        costs = np.broadcast_to(np.asarray(cost, dtype=np.float64), shape)
        first, self._num_variables = self._num_variables, self._num_variables + costs.size
        self._costs.append(costs.ravel())
        return np.arange(first, self._num_variables).reshape(costs.shape)

    def solve(self) -> Solution:
        """Solve by HiGHS.

        Raises
        ------
        RuntimeError
            If it is infeasible or unbounded, or the solver gives up.
        """
        # not above: every client's process imports the samplers, few need scipy, and it takes half as long as torch
        from scipy.optimize import linprog

        bounds: dict[str, object] = {}
        if self.at_most.num_rows:
            bounds = {"A_ub": self.at_most.matrix(self._num_variables), "b_ub": self.at_most.limits()}
        # The interior point method without presolve is the quickest for schedules, by a factor of 2 to 5; in the rare
        # case that it fails, HiGHS chooses.
        for method, options in (("highs-ipm", {"presolve": False}), ("highs", {})):
            result = linprog(
                np.concatenate(self._costs),
                A_eq=self.equal.matrix(self._num_variables),
                b_eq=self.equal.limits(),
                method=method,
                options=options,
                **bounds,
            )
            if result.status == 0:
                return Solution(float(result.fun), result.x, result.eqlin.marginals)
        raise RuntimeError(f"the linear program has no solution: {result.message}")
