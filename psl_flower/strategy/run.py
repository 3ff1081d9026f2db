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
from psl_flower.failures import Failure, Kind, alike, failure_lines, mistakes_of
from psl_flower.faults import FaultPolicy
from psl_flower.population import Population
from psl_flower.protocol import Orders
from psl_flower.server import LocalBackend, Scheduler
from psl_flower.strategy.attempt import Attempt
from psl_flower.strategy.context import RoundContext
from psl_flower.strategy.epoch import Epoch
from psl_flower.strategy.evaluate_fn import shown
from psl_flower.strategy.evaluation import Evaluator
from psl_flower.strategy.ledger import EpochLedger
from psl_flower.strategy.membership import MOST_OUTLIERS, Membership
from psl_flower.strategy.progress import Progress
from psl_flower.strategy.recorder import RunRecorder
from psl_flower.strategy.step import StepRunner
from psl_flower.strategy.summary import RunSummary
from psl_flower.strategy.tolerance import Retries
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")


@dataclass
class Run:
    """What lives as long as one call of `start`."""

    backend: LocalBackend
    membership: Membership
    runner: StepRunner
    evaluator: Evaluator
    scheduler: Scheduler
    recorder: RunRecorder
    progress: Progress
    summary: RunSummary
    policy: FaultPolicy
    saved: dict[str, Any] | None
    state: dict[str, torch.Tensor]  # of the whole model, or of what trains
    result: Result
    timeout: float

    def __post_init__(self) -> None:
        self.last: EpochLedger | None = None  # of the epoch before
        self.committed = False  # a step, in this process
        self.answered = False  # some client, of a step that nothing came of: so not all have the same bug
        self._pooled: tuple[Population, IntArray] | None = None

    def current_state(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict as it is now, as far as the run keeps it."""
        self.state |= self.backend.state(self.state)
        return self.state

    def evaluate_in_clients(self, server_round: int) -> dict[str, Any]:
        """Return the metrics on the clients' test data, and note them as the round's; empty if there is none."""
        with StepError.located(f"round {server_round}, evaluation", self.membership.name):
            metrics = self.evaluator.evaluate()
        if metrics is None:
            return {}
        self.result.evaluate_metrics_clientapp[server_round] = metrics
        log.info("round %d  clients' test data: %s", server_round, shown(metrics))
        return dict(metrics)

    def take_saved(self) -> dict[str, Any] | None:
        """Return the checkpoint to resume from, once."""
        saved, self.saved = self.saved, None
        return saved

    # --- clients that fail -------------------------------------------------------------------------------------------
    def unfinished(self, ledger: EpochLedger) -> IntArray:
        """Return the clients that owe examples and are not excluded or out of the round."""
        return self.membership.taking_part(ledger.unfinished())

    def begin_round(self, ledger: EpochLedger, epoch: Epoch) -> None:
        """Let the method do what comes before the first step; clients that fail in it are out of the round."""
        self.membership.begin_round()
        orders = ledger.round_orders(len(epoch), self.unfinished(ledger), over=False)
        self._around(self.runner.method.begin_round, orders, epoch)

    def end_round(self, ledger: EpochLedger, epoch: Epoch) -> None:
        """Let the method do what comes after the last step, with the clients that have contributed."""
        orders = ledger.round_orders(len(epoch), self.membership.taking_part(ledger.contributors()), over=True)
        self._around(self.runner.method.end_round, orders, epoch)

    def _around(self, hook: Callable[[RoundContext], None], orders: Orders, epoch: Epoch) -> None:
        attempt = self.runner.around(hook, orders)
        epoch.bytes_around[0] += attempt.bytes_sent
        epoch.bytes_around[1] += attempt.bytes_received
        self._exclude(mistakes_of(attempt.lost))
        self.membership.leave_out_of_round(attempt.lost)

    def attempt(self, ledger: EpochLedger, orders: Orders, waits: Mapping[int, float]) -> Attempt:
        """Try a step, and remember who failed."""
        self.membership.next_attempt()
        attempt = self.runner.attempt(orders, waits)
        nothing = attempt.record is None and not attempt.skipped
        self._leave_out_rows(ledger, attempt, nothing=nothing)
        self._exclude(mistakes_of(attempt.lost))
        self._exclude_outliers({client: f for client, f in attempt.lost.items() if f.kind is Kind.OUTLIER})
        self.membership.attempted(attempt.lost, attempt.clients)
        if others := [client for client, why in attempt.lost.items() if why.kind is Kind.KEY]:
            self.membership.clients.describe_again(others, self.policy.step_timeout or self.timeout)
        summary, examples = self.summary, orders.examples()
        what = "is redone without" if nothing else "goes on without"
        for line in failure_lines(
            {c: f for c, f in attempt.lost.items() if not self._was_told(f)}, self.membership.name
        ):
            log.warning("step %d %s %s", orders.step, what, line)
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

    def _was_told(self, failure: Failure) -> bool:
        """Return whether a failure was told with its consequence: rows, or a client, that are left out for good."""
        return failure.kind is Kind.UNREADABLE or (self.policy.mistakes == "exclude" and failure.kind.is_mistake)

    def _leave_out_rows(self, ledger: EpochLedger, attempt: Attempt, *, nothing: bool) -> None:
        """Leave examples out for good that clients cannot read: all others are still drawn."""
        for client, failure in attempt.lost.items():
            if failure.kind is not Kind.UNREADABLE:
                continue
            new = self.membership.leave_out_rows(client, failure)
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
        if self.policy.mistakes == "exclude" and mistakes:
            self._leave_out(mistakes, "for a mistake")

    def _exclude_outliers(self, failures: Mapping[int, Failure]) -> None:
        """Leave clients out that sent what is far out of bounds, again and again."""
        if repeated := self.membership.repeated(failures):
            self._leave_out(repeated, f"far out of bounds {MOST_OUTLIERS} times")

    def _leave_out(self, failures: Mapping[int, Failure], reason: str) -> None:
        self.membership.exclude(failures, reason)
        self.summary.excluded.update({client: str(failure) for client, failure in failures.items()})
        if not self.membership.nobody_left():
            return
        if all(failure.kind is Kind.OUTLIER for failure in failures.values()):
            raise StepError(
                "every client was left out, nobody is left to train with: if training diverges, lower the learning "
                "rate, else give FaultPolicy(outlier_bound=None)",
                failures,
            )
        raise StepError("every client made a mistake, nobody is left to train with", failures)

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
            everyone = len(attempt.lost) == len(self.membership.clients.members)
            shared = len(attempt.lost) > 1 and alike(attempt.lost.values())  # a bug, in others too
            if everyone or (shared and self.policy.mistakes != "exclude"):
                raise StepError(f"all {len(attempt.lost)} clients failed, before any step was completed", attempt.lost)
        # no waiting for those again for whom an earlier epoch has waited in vain
        patience = 0.0 if self.membership.hopeless(self.unfinished(ledger)) else self.policy.patience
        retries.failures = attempt.lost | retries.failures  # what began it says more than what followed
        if retries.exhausted(patience):
            population = ledger.population
            holders = population.client_ids[population.sizes > 0].tolist()
            if not committed or self.membership.failing().issuperset(holders):
                raise StepError("no step could be completed, all clients fail", retries.failures)
            return True
        if all_failed:
            pause = retries.pause(patience)
            with self.summary.spending("waiting"):
                time.sleep(pause)
        return False

    def close_epoch(self, server_round: int, ledger: EpochLedger) -> int:
        """Report and return the examples that the epoch went without."""
        owed = dict(zip(ledger.population.client_ids.tolist(), ledger.remaining.tolist(), strict=True))
        unseen = {client: n for client, n in owed.items() if n}
        self.summary.replans += ledger.replans
        self.summary.examples_unseen.update(unseen)
        held = dict(zip(ledger.population.client_ids.tolist(), ledger.population.sizes.tolist(), strict=True))
        self.membership.end_epoch(unseen, held)
        for client, n in unseen.items():
            log.warning("round %d went without %d examples of %s", server_round, n, self.membership.name(client))
        here = {client: len(rows) for client, rows in self.membership.unreadable.rows.items() if client in held}
        for client, n in here.items():
            log.warning(
                "round %d went without %d examples that %s cannot read", server_round, n, self.membership.name(client)
            )
        self.summary.examples_unseen.update(here)
        return int(sum(unseen.values()) + sum(here.values()))

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
