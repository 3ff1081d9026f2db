"""What lives as long as one call of `start`: the parts of a run, and which clients it goes on with."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import Result

from psl_flower.errors import StepError
from psl_flower.exchange import Clients
from psl_flower.failures import Failure, Kind
from psl_flower.faults import FaultPolicy
from psl_flower.population import Population
from psl_flower.protocol import Orders
from psl_flower.server import LocalBackend, Scheduler
from psl_flower.strategy.context import Attempt, RoundContext
from psl_flower.strategy.epoch import Epoch
from psl_flower.strategy.evaluation import Evaluator
from psl_flower.strategy.ledger import EpochLedger
from psl_flower.strategy.progress import Progress
from psl_flower.strategy.recorder import RunRecorder
from psl_flower.strategy.step import StepRunner
from psl_flower.strategy.summary import RunSummary
from psl_flower.strategy.tolerance import Backoff, Retries
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")


@dataclass
class Run:
    """What lives as long as one call of `start`."""

    backend: LocalBackend
    clients: Clients
    runner: StepRunner
    evaluator: Evaluator
    scheduler: Scheduler
    recorder: RunRecorder
    progress: Progress
    summary: RunSummary
    policy: FaultPolicy
    saved: dict[str, Any] | None
    state: dict[str, torch.Tensor]  # of the whole model
    result: Result
    timeout: float

    def __post_init__(self) -> None:
        self.backoff = Backoff()
        self.given_up: set[int] = set()  # clients that owed examples at the end of the last epoch they were in
        self.missing: set[int] = set()  # those of them that gave nothing at all
        self.last: EpochLedger | None = None  # of the epoch before
        self.out: set[int] = set()  # of the round: clients that have lost what they keep for it
        self.committed = False  # a step, in this process
        self.answered = False  # some client, of a step that nothing came of: so not all have the same bug
        self._pooled: tuple[Population, IntArray] | None = None

    def current_state(self) -> dict[str, torch.Tensor]:
        """Return the whole model's state dict as it is now."""
        self.state |= self.backend.state()
        return self.state

    def take_saved(self) -> dict[str, Any] | None:
        """Return the checkpoint to resume from, once."""
        saved, self.saved = self.saved, None
        return saved

    # --- clients that fail -------------------------------------------------------------------------------------------
    def available(self, unfinished: IntArray) -> IntArray:
        """Return the clients to go on with: those that owe and are not left out; all, if there are none."""
        absent = self.backoff.left_out()
        kept = np.array([client for client in unfinished if client not in absent], dtype=np.int64)
        return kept if len(kept) else unfinished

    def unfinished(self, ledger: EpochLedger) -> IntArray:
        """Return the clients that owe examples and are not excluded or out of the round."""
        return self._taking_part(ledger.unfinished())

    def _taking_part(self, clients: IntArray) -> IntArray:
        absent = list(self.clients.excluded | self.out)
        return clients[~np.isin(clients, absent)] if absent else clients

    def begin_round(self, ledger: EpochLedger, epoch: Epoch) -> None:
        """Let the method do what comes before the first step; clients that fail in it are out of the round."""
        self.out = set()
        orders = ledger.round_orders(len(epoch), self.unfinished(ledger), over=False)
        self._around(self.runner.method.begin_round, orders, epoch)

    def end_round(self, ledger: EpochLedger, epoch: Epoch) -> None:
        """Let the method do what comes after the last step, with the clients that have contributed."""
        orders = ledger.round_orders(len(epoch), self._taking_part(ledger.contributors()), over=True)
        self._around(self.runner.method.end_round, orders, epoch)

    def _around(self, hook: Callable[[RoundContext], None], orders: Orders, epoch: Epoch) -> None:
        attempt = self.runner.around(hook, orders)
        epoch.bytes_around[0] += attempt.bytes_sent
        epoch.bytes_around[1] += attempt.bytes_received
        self._exclude({client: f for client, f in attempt.lost.items() if f.kind.is_mistake})
        for client, why in attempt.lost.items():
            self._leave_out_of_round(client, why)

    def _leave_out_of_round(self, client: int, why: Failure) -> None:
        self.out.add(client)
        log.warning("%s is out of the round: %s", self.clients.name(client), why)

    def attempt(self, ledger: EpochLedger, orders: Orders, waits: Mapping[int, float]) -> Attempt:
        """Try a step, and remember who failed."""
        self.backoff.next_attempt()
        attempt = self.runner.attempt(orders, waits)
        nothing = attempt.record is None and not attempt.skipped
        self._leave_out_rows(ledger, attempt, nothing=nothing)
        self._exclude({client: f for client, f in attempt.lost.items() if f.kind.is_mistake})
        self.backoff.failed(c for c, f in attempt.lost.items() if f.kind is not Kind.UNREADABLE)
        self.backoff.succeeded(attempt.clients)
        self.given_up.difference_update(attempt.clients)
        for client, why in attempt.lost.items():
            if why.kind is Kind.LEFT_OUT:
                self._leave_out_of_round(client, why)
        if others := [client for client, why in attempt.lost.items() if why.kind is Kind.KEY]:
            self.clients.describe_again(others, self.policy.step_timeout or self.timeout)
        summary = self.summary
        examples = dict(zip(orders.clients.tolist(), orders.counts.tolist(), strict=True))
        what = "is redone, for want of" if nothing else "goes on without"
        for client, why in attempt.lost.items():
            log.warning("step %d %s %s: %s", orders.step, what, self.clients.name(client), why)
        if attempt.skipped:
            summary.steps_skipped += 1
            summary.examples_skipped += sum(examples[client] for client in attempt.clients)
        elif nothing:
            summary.steps_redone += 1
            summary.examples_redone += sum(examples.values())
        else:
            self.committed = True
            summary.steps_committed += 1
            summary.steps_short += bool(attempt.lost)
            summary.examples_redone += sum(examples[client] for client in attempt.lost)
        return attempt

    def _leave_out_rows(self, ledger: EpochLedger, attempt: Attempt, *, nothing: bool) -> None:
        """Leave examples out for good that clients cannot read: all others are still drawn."""
        for client, failure in attempt.lost.items():
            if failure.kind is not Kind.UNREADABLE:
                continue
            new = self.clients.leave_out(client, failure)
            if not new:
                attempt.lost[client] = Failure(Kind.RAISED, f"it names no example that is its own: {failure.detail}")
                continue
            labels = [failure.labels[row] for row in new if row in failure.labels]
            ledger.leave_out(client, labels, len(new), lost=not nothing)

    def _exclude(self, mistakes: Mapping[int, Failure]) -> None:
        """Leave clients out for the rest of the run, where the policy says so.

        Raises
        ------
        StepError
            If nobody is left.
        """
        if self.policy.mistakes != "exclude" or not mistakes:
            return
        self.clients.excluded |= mistakes.keys()
        self.summary.excluded.update({client: str(failure) for client, failure in mistakes.items()})
        for client, failure in mistakes.items():
            log.warning("%s is left out for the rest of the run, for a mistake: %s", self.clients.name(client), failure)
        members = self.clients.members.items()
        if self.clients.excluded.issuperset(client for client, m in members if m.description.num_examples):
            raise StepError("every client made a mistake, nobody is left to train with", mistakes)

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
        all_failed = len(attempt.lost) == len(attempt.orders)
        self.answered |= not all_failed
        unreadable = any(failure.kind is Kind.UNREADABLE for failure in attempt.lost.values())
        if unreadable:
            return False  # what is left of those examples is asked for next
        mistaken = all_failed and all(failure.kind.is_mistake for failure in attempt.lost.values())
        if mistaken and not (self.committed or self.answered):  # silence may end by itself, a bug does not
            everyone = len(attempt.lost) == len(self.clients.members)
            details = {failure.detail for failure in attempt.lost.values()}
            alike = len(attempt.lost) > 1 and len(details) == 1  # a bug, in others too
            if everyone or (alike and self.policy.mistakes != "exclude"):
                raise StepError(f"all {len(attempt.lost)} clients failed, before any step was completed", attempt.lost)
        # no waiting for those again for whom an earlier epoch has waited in vain
        known = set(self.unfinished(ledger).tolist()) <= self.given_up
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
            log.warning("round %d went without %d examples of %s", server_round, n, self.clients.name(client))
        here = {client: len(rows) for client, rows in self.clients.left_out.items() if client in held}
        for client, n in here.items():
            log.warning(
                "round %d went without %d examples that %s cannot read", server_round, n, self.clients.name(client)
            )
        self.summary.examples_unseen.update(here)
        return int(sum(unseen.values()) + sum(here.values()))

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
