"""What lives as long as one call of `start`: the parts of a run, and which clients it goes on with."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import Result

from psl_flower.errors import StepError
from psl_flower.exchange import Clients
from psl_flower.exchange.door import Door
from psl_flower.faults import FaultPolicy
from psl_flower.population import Population
from psl_flower.protocol import Config, WorkOrder
from psl_flower.strategy.ledger import EpochLedger
from psl_flower.strategy.progress import Progress
from psl_flower.strategy.recorder import RunRecorder
from psl_flower.strategy.server_step import SplitTrainer
from psl_flower.strategy.step import Attempt, StepRunner
from psl_flower.strategy.summary import RunSummary
from psl_flower.strategy.tolerance import Backoff, Retries
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")


@dataclass
class Run:
    """What lives as long as one call of `start`."""

    trainer: SplitTrainer
    clients: Clients
    runner: StepRunner
    recorder: RunRecorder
    progress: Progress
    summary: RunSummary
    policy: FaultPolicy
    saved: dict[str, Any] | None
    state: dict[str, torch.Tensor]  # of the whole model
    result: Result
    timeout: float
    train_config: Config
    evaluate_config: Config

    def __post_init__(self) -> None:
        self.evaluation_door = Door()
        self.backoff = Backoff()
        self.given_up: set[int] = set()  # clients that owed examples at the end of the last epoch they were in
        self.missing: set[int] = set()  # those of them that gave nothing at all
        self.committed = False  # a step, in this process
        self.answered = False  # some client, of a step that nothing came of: so not all have the same bug
        self._pooled: tuple[Population, IntArray] | None = None

    def current_state(self) -> dict[str, torch.Tensor]:
        """Return the whole model's state dict as it is now."""
        self.state |= self.trainer.state()
        return self.state

    def take_saved(self) -> dict[str, Any] | None:
        """Return the checkpoint to resume from, once."""
        saved, self.saved = self.saved, None
        return saved

    # --- clients that fail -------------------------------------------------------------------------------------------
    def available(self, unfinished: IntArray) -> IntArray:
        """Return the clients to go on with: those that owe and are not left out; all, if there are none."""
        kept = np.array([client for client in unfinished if client not in self.backoff.left_out()], dtype=np.int64)
        return kept if len(kept) else unfinished

    def attempt(self, orders: list[WorkOrder], waits: Mapping[int, float]) -> Attempt:
        """Try a step, and remember who failed."""
        self.backoff.next_attempt()
        attempt = self.runner.attempt(orders, waits)
        self.backoff.failed(attempt.lost)
        self.backoff.succeeded(attempt.batch)
        self.given_up -= attempt.batch.keys()
        summary, examples = self.summary, {order.client: order.count for order in orders}
        nothing = attempt.outcome is None and not attempt.skipped
        what = "is redone, for want of" if nothing else "goes on without"
        for client, why in attempt.lost.items():
            log.warning("step %d %s client %d: %s", orders[0].step, what, client, why)
        if attempt.skipped:
            summary.steps_skipped += 1
            summary.examples_skipped += sum(examples[client] for client in attempt.batch)
        elif attempt.outcome is None:
            summary.steps_redone += 1
            summary.examples_redone += sum(examples.values())
        else:
            self.committed = True
            summary.steps_committed += 1
            summary.steps_short += bool(attempt.lost)
            summary.examples_redone += sum(examples[client] for client in attempt.lost)
        return attempt

    def give_up(self, attempt: Attempt, ledger: EpochLedger, retries: Retries, *, committed: bool) -> bool:
        """Return whether to give up the rest of an epoch after an attempt that nothing came of; else wait a little.

        Parameters
        ----------
        attempt : Attempt
        ledger : EpochLedger
            The epoch's.
        retries : Retries
            The epoch's; told of the attempt.
        committed : bool
            Whether the epoch has a step.

        Raises
        ------
        StepError
            If nothing can be done: nobody has ever completed a step, the epoch has none, or all its clients fail.
        """
        all_failed = attempt.lost.keys() == attempt.answers.keys()
        self.answered |= not all_failed
        if all_failed and not (self.committed or self.answered):
            everyone = len(attempt.lost) == len(self.clients.members)
            alike = len(attempt.lost) > 1 and len(set(attempt.lost.values())) == 1  # a bug, in others too
            if everyone or alike:
                raise StepError(f"all {len(attempt.lost)} clients failed, before any step was completed", attempt.lost)
        # no waiting for those again for whom an earlier epoch has waited in vain
        known = set(ledger.unfinished().tolist()) <= self.given_up
        patience = 0.0 if known else self.policy.patience
        retries.failures = attempt.lost | retries.failures  # what began it says more than what followed
        if retries.exhausted(patience):
            population = ledger.population
            if not committed or self.backoff.failing().issuperset(population.client_ids[population.sizes > 0].tolist()):
                raise StepError("no step could be completed, all clients fail", retries.failures)
            return True
        if all_failed:
            pause = retries.pause(patience)
            self.summary.seconds_waiting += pause
            time.sleep(pause)
        return False

    def close_epoch(self, server_round: int, ledger: EpochLedger) -> int:
        """Report and return the examples that the epoch went without."""
        owed = dict(zip(ledger.population.client_ids.tolist(), ledger.remaining.tolist(), strict=True))
        unseen = {client: n for client, n in owed.items() if n}
        self.summary.replans += ledger.replans
        self.summary.examples_unseen.update(unseen)
        self.given_up |= unseen.keys()
        held = dict(zip(ledger.population.client_ids.tolist(), ledger.population.sizes.tolist(), strict=True))
        self.missing = {client for client, n in unseen.items() if n == held[client]}
        for client, n in unseen.items():
            log.warning("round %d went without %d examples of client %d", server_round, n, client)
        return sum(unseen.values())

    def with_members(self, population: Population, joined: list[int]) -> Population:
        """Return a population with clients added that have joined."""
        everyone = self.clients.population()
        rows = np.flatnonzero(np.isin(everyone.client_ids, joined))
        ids = np.concatenate((population.client_ids, everyone.client_ids[rows]))
        sizes = np.concatenate((population.sizes, everyone.sizes[rows]))
        counts = None
        if population.label_counts is not None and everyone.label_counts is not None:
            parts = (population.label_counts, everyone.label_counts[rows])
            width = max(table.shape[1] for table in parts)
            counts = np.concatenate([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in parts])
        return Population(ids, sizes, counts)

    # --- class counts ------------------------------------------------------------------------------------------------
    def pooled_counts(self, population: Population) -> IntArray | None:
        """Return the class counts of all data, (C,), if they are known for this population."""
        if population.label_counts is not None:
            return np.asarray(population.label_counts.sum(axis=0))
        if self._pooled is None or not population.same_data(self._pooled[0]):
            return None
        return self._pooled[1]

    def remember_pooled_counts(self, population: Population, counts: IntArray | None) -> None:
        """Keep the class counts an epoch has shown."""
        self._pooled = None if counts is None else (population, counts)

    def saved_pooled(self) -> dict[str, Any] | None:
        """Return them for a checkpoint."""
        if self._pooled is None:
            return None
        population, counts = self._pooled
        return {"clients": population.client_ids, "sizes": population.sizes, "counts": counts}

    def restore_pooled(self, saved: Mapping[str, Any] | None) -> None:
        """Go on with what `saved_pooled` returned."""
        if saved is not None:
            self._pooled = (Population(saved["clients"], saved["sizes"]), saved["counts"])
