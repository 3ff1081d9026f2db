"""What came of an attempt at a step, and what ends one without a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from psl_flower.errors import PSLError
from psl_flower.failures import Failure
from psl_flower.protocol import Orders
from psl_flower.tree import Tree


class LostClientsError(PSLError):
    """Clients were lost after they had contributed to a step: it is to be made again without them."""

    def __init__(self, failures: Mapping[int, Failure]) -> None:
        super().__init__(f"lost {len(failures)} clients")
        self.failures = dict(failures)


class TooFewError(PSLError):
    """Too little arrived for a step to be worth making."""


@dataclass(eq=False)
class Attempt:
    """What came of an attempt at a step.

    Parameters
    ----------
    orders : Orders
        Of all clients that were asked.
    record : Outcome or None
        What the method returned; None: nothing was applied.
    clients : tuple of int
        Whose examples were applied.
    labels : tree or None
        Theirs, in the same order, where the server knows them.
    skipped : str
        Why their examples were not applied after all: "not finite" (the loss or gradients), "nothing counts",
        "too few clients", "empty"; or "".
    noise : bool
        Whether a step was made all the same, of the noise of differential privacy.
    lost : dict of int to Failure
        Clients that are not in it, and why.
    given : bool
        Whether clients have given masked sums, which they do once: nothing came of it, the examples must rest.
    seconds : dict of int to list of float
        How long each client worked, request by request.
    bytes_sent, bytes_received : int
        Of tensors.
    """

    orders: Orders
    record: Any = None
    clients: tuple[int, ...] = ()
    labels: Tree = None
    skipped: str = ""
    noise: bool = False
    lost: dict[int, Failure] = field(default_factory=dict)
    given: bool = False
    seconds: dict[int, list[float]] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0

    def counts(self) -> dict[int, int]:
        """Return the examples of each client that were applied."""
        counts = self.orders.examples()
        return {client: counts[client] for client in self.clients}
