"""A round: an epoch of the pooled data, step by step, until every example that can be reached was used."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from psl_flower.errors import StepError
from psl_flower.records import RoundRecord, StepRecord
from psl_flower.samplers.base import Sampler
from psl_flower.stragglers import VirtualClock
from psl_flower.strategy.attempt import Attempt
from psl_flower.strategy.drawn import open_ledger
from psl_flower.strategy.epoch import Epoch
from psl_flower.strategy.ledger import EpochLedger, part, saved_population
from psl_flower.strategy.private import Spending
from psl_flower.strategy.run import Run
from psl_flower.strategy.saving import Saver
from psl_flower.strategy.secure import check_all_are_here
from psl_flower.strategy.stragglers import Stragglers
from psl_flower.strategy.tolerance import Retries

log = logging.getLogger("flwr.psl_flower")

# Steps in a row that may be left out because they are not finite.
_MOST_SKIPS = 10


class EpochLoop:
    """Makes the rounds of a run.

    Parameters
    ----------
    run : Run
    saver : Saver
    sampler : Sampler
    stragglers : Stragglers
    min_nodes : int
        Nodes to wait for at the start of every round.
    checkpoint_every : int
        Steps between two checkpoints within a round, 0 for none.
    metrics : dict
        The user's own.
    spending : Spending
        Told of each round, of what it gives away.
    """

    def __init__(
        self,
        run: Run,
        saver: Saver,
        sampler: Sampler,
        stragglers: Stragglers,
        *,
        min_nodes: int,
        checkpoint_every: int,
        metrics: Mapping[str, Any],
        spending: Spending,
    ) -> None:
        self._run, self._saver, self._sampler, self._stragglers = run, saver, sampler, stragglers
        self._min_nodes, self._checkpoint_every, self._metrics = min_nodes, checkpoint_every, metrics
        self._spending = spending

    def train(self, server_round: int) -> RoundRecord:
        """Use every example of every client once."""
        run = self._run
        ledger, epoch, over = self._open(server_round)
        self._spending.begin(int(ledger.population.sizes.sum()), ledger.steps_left())
        clock = self._stragglers.clock(ledger.population)
        retries, skips = Retries(), 0
        with epoch:
            if not over:
                with StepError.located(f"round {server_round}, before its first step", run.membership.name):
                    run.begin_round(ledger, epoch)
            while not over and len(run.unfinished(ledger)):
                self._look_for_clients(ledger, epoch, clock)
                begin = time.monotonic()
                with run.summary.spending("planning"):
                    step = ledger.step(run.membership.at_once(run.unfinished(ledger), run.runner.least))
                epoch.seconds_plan += time.monotonic() - begin
                orders = ledger.orders(len(epoch), step, run.membership.unreadable.rows)
                waits = self._stragglers.waits(clock, step)
                with StepError.located(f"round {server_round}, step {len(epoch)}", run.membership.name):
                    attempt = run.attempt(ledger, orders, waits)
                    nothing = attempt.record is None and not attempt.skipped
                    if attempt.given:
                        ledger.put_off(step)
                    if nothing and run.give_up(attempt, ledger, retries, committed=len(epoch) > 0):
                        break
                    skips = skips + 1 if attempt.skipped == "not finite" else 0
                    _check_skips(skips)
                if attempt.skipped and not attempt.given:
                    ledger.done(part(step, attempt.counts()), _labels(attempt), committed=attempt.noise)
                    if attempt.noise:
                        run.scheduler.on_step()
                elif attempt.record is not None:
                    step = part(step, attempt.counts())
                    ledger.done(step, _labels(attempt))
                    retries.succeeded()
                    self._stragglers.measure(attempt)
                    simulated = self._stragglers.pass_time(clock, step, attempt)
                    record = _step_record(server_round, len(epoch), attempt, time.monotonic() - begin, simulated)
                    with run.summary.spending("records"):
                        epoch.add(record, step, attempt.record.class_counts, attempt.record)
                    run.scheduler.on_step()
                    done, of = len(epoch), len(epoch) + ledger.steps_left()
                    if run.progress.step(server_round, done, of, record.loss, record.accuracy):
                        run.recorder.progress(record, run.summary.report())
                    if self._checkpoint_every and done % self._checkpoint_every == 0 and ledger.steps_left():
                        self._saver.save(run, server_round, ledger, epoch, self._stragglers.planned)
            if not over and not len(epoch) and run.runner.secure is not None:
                least = run.runner.least
                rule = f"sums are of at least {least} clients, and at the same weights each gives its examples once"
                raise StepError(f"round {server_round}: no step could be completed: {rule}", retries.failures)
            if not over:
                with StepError.located(f"round {server_round}, after its last step", run.membership.name):
                    run.end_round(ledger, epoch)
            self._saver.save(run, server_round, ledger, epoch, self._stragglers.planned)
            unseen, run.last = run.close_epoch(server_round, ledger), ledger
            record_of_round = epoch.summary(unseen)
        if not unseen:
            run.remember_pooled_counts(ledger.population, epoch.pooled())
        _log_round(record_of_round)
        return self._spending.told(record_of_round)

    def _open(self, server_round: int) -> tuple[EpochLedger, Epoch, bool]:
        """Return what there is to do in an epoch, its bookkeeping, and whether it is over: new, or to be resumed."""
        run = self._run
        least = run.runner.least
        with run.summary.spending("start"):
            run.membership.refresh(max(self._min_nodes, least), run.timeout)
        population, saved = run.membership.population(), run.take_saved()
        begin = time.monotonic()
        options: dict[str, Any] = {"by_class": run.runner.method.sends_labels(), "least": least}
        with run.summary.spending("planning"):
            if saved is None:
                population = self._stragglers.known_of(population)
                ledger = open_ledger(self._sampler, population, server_round - 1, before=run.last, **options)
            else:
                population = self._stragglers.known_of(saved_population(saved["ledger"], population))
                ledger = open_ledger(self._sampler, population, server_round - 1, saved["ledger"], **options)
                if run.runner.secure is not None:
                    check_all_are_here(population, run.membership.clients.members)
        seconds_plan = time.monotonic() - begin
        epoch = Epoch(
            run.recorder,
            server_round,
            ledger.population,
            pooled=run.pooled_counts(ledger.population),
            metrics=self._metrics,
            once=not self._sampler.clients_draw,
        )
        if saved is not None:
            epoch.load_state_dict(saved["epoch"])
        epoch.seconds_plan += seconds_plan
        return ledger, epoch, saved is not None and not run.runner.method.resumable_within_round

    def _look_for_clients(self, ledger: EpochLedger, epoch: Epoch, clock: VirtualClock | None) -> None:
        """Find clients that failed before on the nodes where they are now, and let new ones in if they may enter."""
        run = self._run
        at_once = run.policy.join == "step"
        failing = run.membership.failing() & set(
            run.membership.at_once(run.unfinished(ledger), run.runner.least).tolist()
        )
        if not run.policy.tolerate or not (at_once or failing):
            return
        with run.summary.spending("start"):
            joined = run.membership.look_again(run.policy.step_timeout or run.timeout)
        if not joined:
            return
        log.info("clients that joined%s: %s", "" if at_once else ", from the next round on", sorted(joined))
        if at_once:
            ledger.admit(self._stragglers.known_of(run.membership.population_with(ledger.population, joined)))
            epoch.population = ledger.population
            self._stragglers.admit(clock, ledger.population)


def _labels(attempt: Attempt) -> dict[int, Any]:
    """Return the labels of each client's examples, where the server knows them."""
    counts, labels = attempt.counts(), attempt.labels
    if not isinstance(labels, torch.Tensor):
        return {}
    return dict(zip(counts, (part.numpy() for part in torch.split(labels, list(counts.values()))), strict=True))


def _check_skips(in_a_row: int) -> None:
    if in_a_row >= _MOST_SKIPS:
        raise StepError(f"{in_a_row} steps in a row are not finite: training diverges, lower the learning rate")


def _step_record(
    server_round: int, index: int, attempt: Attempt, seconds: float, simulated: float | None
) -> StepRecord:
    outcome, counts = attempt.record, attempt.counts()
    return StepRecord(
        round=server_round,
        step=index,
        loss=outcome.loss,
        accuracy=outcome.accuracy,
        batch_size=sum(counts.values()),
        clients=len(counts),
        bytes_sent=attempt.bytes_sent,
        bytes_received=attempt.bytes_received,
        seconds_real=seconds,
        seconds_simulated=simulated,
    )


def _log_round(record: RoundRecord) -> None:
    if not record.num_steps:
        log.warning("round %d  no step with examples was made, so there is no loss", record.round)
        return
    deviation = "" if record.deviation_mean is None else f", batch deviation {record.deviation_mean:.3f}"
    accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.3f}"
    simulated = "" if record.seconds_simulated is None else f", {record.seconds_simulated:.1f} simulated seconds"
    log.info(
        "round %d  %d steps, loss %.4f%s%s, %.1f of %d clients a step%s",
        *(record.round, record.num_steps, record.loss, accuracy, deviation),
        *(record.clients_per_step, record.num_clients, simulated),
    )
