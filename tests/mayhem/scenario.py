"""What goes wrong in a run, drawn from a seed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from mayhem.lies import lies_of
from mayhem.task import K
from psl_flower.methods import METHODS
from psl_flower.samplers.registry import SAMPLERS

KILL, DISK, METRICS = "server killed", "disk full at a checkpoint", "disk full at the metrics"


@dataclass
class Scenario:
    """A run, and what goes wrong in it."""

    seed: int
    epochs: int
    method: str
    transport: str
    sampler: str
    secure: bool
    mistakes: str
    share: float  # of messages that meet a fault
    lie: tuple[str, str] | None  # stage, and what is false
    liar: int
    often: float  # share of the steps that it lies in
    stop: tuple[str, int] | None  # what ends the process of the server, and when
    wall_clock: bool  # whether it jumps
    suspended: bool  # whether the machine is, now and then
    impostor: bool
    claims: bool
    found: Counter = field(default_factory=Counter)  # what happened, by kind

    @classmethod
    def draw(cls, seed, epochs=3):
        """Return the scenario of a seed."""
        rng = random.Random(seed)
        method = rng.choice(sorted(METHODS))
        secure = method in ("parallel", "u-shaped") and rng.random() < 0.35
        labels = METHODS[method].sends_labels()
        samplers = [name for name, each in SAMPLERS.items() if labels or not each.needs_label_counts]
        transport = rng.choice(["messages", "messages", "streams"])
        # where one process masks the sum of several clients, it is one party
        lies = rng.random() < 0.6 and not (secure and transport == "streams")
        turns = method == "sequential" or method.startswith("splitfed")
        mistakes, stops = rng.choice(["retry", "exclude"]), [KILL, DISK, METRICS]
        return cls(
            seed=seed,
            epochs=epochs,
            method=method,
            transport=transport,
            sampler="ugs" if turns else rng.choice(samplers),
            secure=secure,
            mistakes="exclude" if secure else mistakes,  # a client gives its sums once: none is asked again
            share=rng.choice([0.0, 0.02, 0.05]),
            lie=rng.choice(lies_of(method, transport, secure)) if lies else None,
            liar=rng.randrange(K),
            often=rng.choice([0.2, 1.0]),
            stop=(rng.choice(stops), rng.randrange(2, 12)) if rng.random() < 0.3 else None,
            wall_clock=rng.random() < 0.2,
            suspended=rng.random() < 0.1,
            impostor=rng.random() < 0.15,
            claims=rng.random() < 0.15,
        )

    @property
    def tail(self):
        return self.method == "u-shaped"

    @property
    def may_miss(self):
        """Whether an epoch may go without examples of honest clients, as long as it is told.

        Where patience ends as clocks have it, what rests at an epoch's end, and who has lost its own part for a round.
        """
        return self.suspended or self.secure or self.method.startswith("splitfed")

    @property
    def shown(self):
        return ", ".join(f"{k} {v}" for k, v in vars(self).items() if k != "found")

    def lies_in(self, stage, orders):
        """Return whether the liar lies: from the second epoch on, when it is known what is usual."""
        if self.lie is None or stage != self.lie[0] or orders is None or orders.test or not orders.epoch:
            return False
        dice = random.Random(f"{self.seed} {orders.epoch} {orders.step}")
        return self.liar in orders.clients and dice.random() < self.often
