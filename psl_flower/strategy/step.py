"""One step, as a transaction: forward on the clients, both on the server, backward on the clients, one update."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from psl_flower.errors import DivergenceError, StepError
from psl_flower.exchange import Answer, Clients
from psl_flower.exchange.door import Door, distinct
from psl_flower.faults import FaultPolicy
from psl_flower.protocol import (
    Activations,
    BackwardRequest,
    Config,
    ForwardRequest,
    Gradients,
    Request,
    Weights,
    WorkOrder,
    step_seed,
)
from psl_flower.strategy.server_step import SplitTrainer, StepOutcome
from psl_flower.strategy.summary import RunSummary

log = logging.getLogger("flwr.psl_flower")


@dataclass(eq=False)
class Attempt:
    """What came of an attempt at a step.

    Parameters
    ----------
    outcome : StepOutcome or None
        None: nothing was applied, too little arrived.
    batch : dict of int to Activations
        By client id: what was applied.
    skipped : bool
        Whether `batch` was not applied after all, because its loss or gradients are not finite.
    lost : dict of int to str
        Clients that are not in it, and why.
    answers : dict of int to list of Answer
        All answers of each client.
    """

    outcome: StepOutcome | None = None
    batch: dict[int, Activations] = field(default_factory=dict)
    skipped: bool = False
    lost: dict[int, str] = field(default_factory=dict)
    answers: dict[int, list[Answer]] = field(default_factory=dict)


class StepRunner:
    """Makes steps; decides with whom they go on.

    Parameters
    ----------
    trainer : SplitTrainer
    clients : Clients
    policy : FaultPolicy
    timeout : float
        Seconds for one exchange.
    config : dict
        Sent to the clients.
    summary : RunSummary
        Told what went wrong and what took how long.
    """

    def __init__(
        self,
        trainer: SplitTrainer,
        clients: Clients,
        *,
        policy: FaultPolicy,
        timeout: float,
        config: Config,
        summary: RunSummary,
    ) -> None:
        self.trainer, self.clients = trainer, clients
        self._policy, self._timeout, self._config, self._summary = policy, timeout, config, summary
        self._door = Door()
        self._committed = False  # a step, in this process

    def attempt(self, orders: list[WorkOrder], waits: Mapping[int, float]) -> Attempt:
        """Try a step: with all its clients, else with those that do not fail, if they bring enough.

        Raises
        ------
        StepError
            If the server half fails, or a client does and that is not tolerated.
        """
        attempt, summary = Attempt(), self._summary
        before = (time.monotonic(), summary.seconds_compute, summary.seconds_clients, summary.seconds_wire)
        weights, ordered = self.trainer.weights(), {order.client: order for order in orders}
        with self.trainer.transaction():
            batch = self._forward(ordered, weights, waits, attempt)
        enough = self._policy.min_batch_fraction * sum(order.count for order in orders)
        while batch and sum(ordered[client].count for client in batch) >= enough:
            try:
                with self.trainer.transaction():
                    outcome = self._on_server(batch, step_seed(orders[0].seed, orders[0].epoch, orders[0].step))
                    cut_gradients = outcome.cut_gradients
                    gradients = self._backward({c: ordered[c] for c in batch}, weights, cut_gradients, attempt)
                    with self._computing():
                        self.trainer.commit(self._clipped(gradients, ordered))
                attempt.outcome, attempt.batch, self._committed = outcome, batch, True
                return attempt
            except DivergenceError as error:
                if self._policy.non_finite_loss == "stop":
                    raise
                log.warning("step %d is left out: %s", orders[0].step, error)
                attempt.batch, attempt.skipped = batch, True
                return attempt
            except StepError as error:
                if not error.failures or not self._policy.tolerate:
                    raise
                attempt.lost |= error.failures
                batch = {client: part for client, part in batch.items() if client not in error.failures}
                summary.steps_recomputed += 1
        # nothing came of it: all its time was spent waiting
        begin, summary.seconds_compute, summary.seconds_clients, summary.seconds_wire = before
        summary.seconds_waiting += time.monotonic() - begin
        return attempt

    def _forward(
        self, orders: Mapping[int, WorkOrder], weights: Weights, waits: Mapping[int, float], attempt: Attempt
    ) -> dict[int, Activations]:
        requests: dict[int, Request] = {
            c: ForwardRequest(order, weights, self._config, waits.get(c, 0.0)) for c, order in orders.items()
        }
        answers = self._exchange(requests, orders, attempt)
        counts, step = {c: order.count for c, order in orders.items()}, next(iter(orders.values())).step
        accepted, failures = self._door.activations(answers, counts, step)
        self._refuse(failures, len(orders), "forward")
        attempt.lost |= failures
        return accepted

    def _on_server(self, batch: Mapping[int, Activations], seed: int) -> StepOutcome:
        try:
            with self._computing():
                return self.trainer.forward_backward(batch, seed)
        except StepError as error:
            if not error.failures and not self._committed and len(batch) == 1:
                # one client's word for what crosses the cut: it may be the client that is wrong, not the server half
                self._door.forget(batch)
                error.failures = dict.fromkeys(batch, str(error))
            self._summary.refuse(error.failures)  # or labels that are no classes
            raise

    def _backward(
        self,
        orders: Mapping[int, WorkOrder],
        weights: Weights,
        cut_gradients: Mapping[int, tuple[torch.Tensor | None, ...]],
        attempt: Attempt,
    ) -> dict[int, Gradients]:
        """Return the parameter gradients of all, or raise StepError naming those that fail twice."""
        requests: dict[int, Request] = {
            c: BackwardRequest(order, weights, cut_gradients[c], self._config) for c, order in orders.items()
        }
        step = next(iter(orders.values())).step
        answers = self._exchange(requests, orders, attempt)
        accepted, failures = self._door.gradients(answers, weights.parameters, step)
        self._refuse(failures, len(orders), "backward")
        for again in _apart(failures, answers):  # once more
            answers = self._exchange({c: requests[c] for c in again}, orders, attempt)
            more, still = self._door.gradients(answers, weights.parameters, step)
            accepted |= more
            failures = {c: why for c, why in failures.items() if c not in more} | still
            self._summary.refuse(still)
        if failures:
            raise StepError(_failed(len(failures), len(orders), "backward"), failures)
        return dict(sorted(accepted.items()))

    def _exchange(
        self, requests: Mapping[int, Request], orders: Mapping[int, WorkOrder], attempt: Attempt
    ) -> dict[int, Answer]:
        begin = time.monotonic()
        answers = self.clients.exchange(requests, self._timeout)
        self._summary.exchanged(answers, time.monotonic() - begin, {c: orders[c].count for c in requests})
        for client, answer in answers.items():
            attempt.answers.setdefault(client, []).append(answer)
        return answers

    def _refuse(self, failures: Mapping[int, str], of: int, exchange: str) -> None:
        """Count failures, and end the run if they are not tolerated."""
        self._summary.refuse(failures)
        if failures and not self._policy.tolerate:
            raise StepError(_failed(len(failures), of, exchange), dict(failures))

    def _clipped(self, gradients: Mapping[int, Gradients], orders: Mapping[int, WorkOrder]) -> list[Gradients]:
        """Return what is to be summed, every client's gradient within the policy's norm."""
        most = self._policy.max_gradient_norm
        if most is None:
            return distinct(gradients)
        total = sum(orders[client].count for client in gradients)
        result = []
        for client, each in gradients.items():
            # a client's part of the batch's mean is its own mean times its share
            norm = _norm(each) * total / orders[client].count
            if norm > most:
                self._summary.clipped += 1
                log.warning("client %d: gradient of norm %.3g scaled down to %.3g", client, norm, most)
                scaled = {name: t * (most / norm) for name, t in each.tensors.items()}
                each = Gradients(scaled, each.unused, each.step)
            result.append(each)
        return result

    @contextmanager
    def _computing(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self._summary.seconds_compute += time.monotonic() - begin


def _failed(failed: int, of: int, exchange: str) -> str:
    return f"{failed} of {of} clients failed in the {exchange} exchange"


def _norm(gradients: Gradients) -> float:
    tensors = gradients.tensors.values()
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm()) if tensors else 0.0


def _apart(failures: Mapping[int, str], answers: Mapping[int, Answer]) -> list[list[int]]:
    """Return the clients that failed, in groups to ask again.

    Where several sent one sum that was refused, each is asked by itself: only one of them may be at fault.
    """
    together: list[int] = []
    single: list[int] = []
    for client in failures:
        reply = answers[client].reply
        shared = reply is not None and sum(a.reply is reply for a in answers.values()) > 1
        (single if shared else together).append(client)
    return ([together] if together else []) + [[client] for client in single]
