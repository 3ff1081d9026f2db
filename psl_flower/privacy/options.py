"""What people decide about secure aggregation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from psl_flower.checks import check_int
from psl_flower.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SecureAggregation:
    """Clients give sums only: each masks its own part, and the masks cancel in the sum (Bonawitz et al. 2017).

    Server and clients need the same. The server is taken to follow the protocol, and to be curious.

    Parameters
    ----------
    least : int
        Clients that a sum must be of; a client gives nothing to a smaller one.
    neighbours : int or "auto"
        How many others each client shares masks with. "auto": 2 log2 A of the A clients of a step, in a graph that is
        drawn anew for each (Bell et al. 2020); all others where there are few.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    least: int = 3
    neighbours: int | str = "auto"

    def __post_init__(self) -> None:
        check_int(self.least, "least", least=2)
        if self.neighbours != "auto":
            check_int(self.neighbours, "neighbours", least=2)

    def degree(self, clients: int) -> int:
        """Return how many neighbours each of so many clients has: an even number, or all others."""
        wanted = 2 * math.ceil(math.log2(max(clients, 2))) if self.neighbours == "auto" else int(self.neighbours)
        even = wanted + wanted % 2
        return even if even < clients - 1 else clients - 1


def secure_options(value: SecureAggregation | bool | None) -> SecureAggregation | None:
    """Return the options that people give as True, False, None, or themselves.

    Raises
    ------
    ConfigError
        If it is something else.
    """
    if value is None or isinstance(value, bool):
        return SecureAggregation() if value else None
    if not isinstance(value, SecureAggregation):
        raise ConfigError(f"secure_aggregation must be True, False or a SecureAggregation, got {value!r:.80}")
    return value
