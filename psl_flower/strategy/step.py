"""One step, as a transaction around a method: it commits, or nothing happened."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from psl_flower import tree
from psl_flower.errors import ConfigError, DivergenceError, LabelError, StepError
from psl_flower.exchange import Clients
from psl_flower.exchange.validation import Validator
from psl_flower.failures import Failure, Kind, mistakes_of
from psl_flower.faults import FaultPolicy
from psl_flower.methods.base import SplitMethod
from psl_flower.protocol import Config, Leaf, Orders, Part, Reply, Request, step_seed
from psl_flower.server import LocalBackend, NothingCountsError
from psl_flower.strategy.attempt import Attempt, LostClientsError, TooFewError
from psl_flower.strategy.context import Asking, RoundContext, StepContext
from psl_flower.strategy.gathering import by_client
from psl_flower.strategy.kept import KeptRows
from psl_flower.strategy.private import check_usable
from psl_flower.strategy.secure import SecureSums
from psl_flower.strategy.summary import RunSummary

log = logging.getLogger("flwr.psl_flower")


class StepRunner:
    """Makes steps; decides with whom they go on.

    Parameters
    ----------
    method : SplitMethod
    backend : LocalBackend
    clients : Clients
    policy : FaultPolicy
    timeout : float
        Seconds for one exchange.
    separate : bool
        Whether sums are wanted client by client.
    config : dict
        Sent to the clients.
    summary : RunSummary
        Told what went wrong and what took how long.
    secure : SecureSums, optional
        Where clients mask their sums.
    kept : KeptRows, optional
        What clients are asked for once.
    """

    def __init__(
        self,
        method: SplitMethod,
        backend: LocalBackend,
        clients: Clients,
        *,
        policy: FaultPolicy,
        timeout: float,
        separate: bool = False,
        config: Config,
        summary: RunSummary,
        secure: SecureSums | None = None,
        kept: KeptRows | None = None,
    ) -> None:
        self.method, self.backend, self.clients, self.secure = method, backend, clients, secure
        self._policy, self._timeout, self._summary = policy, timeout, summary
        self._attempt: Attempt | None = None
        self.validator = Validator(policy.outlier_bound, longest=backend.longest)
        self._asking = Asking(
            exchange=self._exchange,
            validator=self.validator,
            separate=separate or (policy.max_gradient_norm is not None and secure is None),
            config=config,
            refuse=self._refuse,
            secure=secure,
            keys=clients.keys,
            texts=backend.longest > 0,
            kept=kept,
        )
        self._committed = False  # a step, in this process

    @property
    def least(self) -> int:
        """Clients that a step must have."""
        return 1 if self.secure is None else self.secure.options.least

    def attempt(self, orders: Orders, waits: Mapping[int, float]) -> Attempt:
        """Try a step: with all its clients, else with those that do not fail, if they bring enough.

        Raises
        ------
        StepError
            If the server's part fails, or a client does and that is not tolerated.
        """
        attempt, summary = Attempt(orders), self._summary
        self._attempt = attempt
        if not len(orders):
            attempt.skipped, attempt.noise = "empty", self.backend.commit_nothing()
            log.info("step %d is empty: no example was drawn", orders.step)
            return attempt
        if len(orders) < self.least:
            attempt.clients, attempt.skipped = tuple(orders.clients.tolist()), "too few clients"
            text = "step %d is left out: %d clients in it, sums are of %d at least"
            log.warning(text, orders.step, len(orders), self.least)
            return attempt
        before = summary.spent()
        ctx = StepContext(
            self.method,
            self.backend,
            self._asking,
            orders,
            seed=step_seed(orders.seed, orders.epoch, orders.step),
            delays=waits,
            enough=self._policy.min_batch_fraction * orders.num_rows,
            attempt=attempt,
        )
        if self._policy.max_gradient_norm is not None and self.secure is None:
            ctx.clip = self._clipped
        try:
            with summary.spending("server"):
                while not self._try(ctx, attempt):
                    summary.steps_recomputed += 1
        except TooFewError:
            summary.in_vain(before)
        attempt.given = ctx.given and attempt.record is None
        if self.secure is not None:
            summary.clipped += self.secure.take_scaled()
        return attempt

    def around(self, hook: Callable[[RoundContext], None], orders: Orders) -> Attempt:
        """Do what a method does before or after the steps of a round; return whom it lost and what it sent.

        Parameters
        ----------
        hook : callable
            Of the method.
        orders : Orders
            See `RoundContext`.

        Raises
        ------
        StepError
            If nobody is left, or a client fails and that is not tolerated.
        """
        attempt = self._attempt = Attempt(orders)
        seed = step_seed(orders.seed, orders.epoch, orders.step)
        ctx = RoundContext(self.method, self.backend, self._asking, orders, seed=seed)
        with self._summary.spending("server"):
            hook(ctx)
        attempt.lost = ctx.lost
        return attempt

    def _try(self, ctx: StepContext, attempt: Attempt) -> bool:
        """Have the method make the step; return whether that is over, or to be done again without some clients."""
        try:
            with self.backend.transaction():
                attempt.record = self.method.step(ctx)
                if not ctx.committed:
                    raise ConfigError(f"{type(self.method).__name__}.step must end in ctx.commit(...)")
            attempt.clients, self._committed = tuple(ctx.clients), True
        except LostClientsError as error:
            ctx.without(error.failures)
            return False
        except LabelError as error:
            failures = by_client(error, ctx.orders)
            self._refuse(failures, len(ctx.clients), "forward")
            ctx.without(failures)
            return False
        except NothingCountsError as error:
            log.warning("step %d changes nothing: %s", ctx.orders.step, error)
            attempt.clients, attempt.skipped = tuple(ctx.clients), "nothing counts"
        except DivergenceError as error:
            if self._policy.non_finite_loss == "stop":
                raise
            log.warning("step %d is left out: %s", ctx.orders.step, error)
            attempt.clients, attempt.skipped = tuple(ctx.clients), "not finite"
        except StepError as error:
            if error.failures or self._committed or len(ctx.clients) != 1:
                raise
            # one client's word for what crosses the cut: it may be the client that is wrong, not the server's part
            self._asking.validator.forget(ctx.clients)
            failures = {ctx.clients[0]: Failure(Kind.SHAPE, str(error))}
            self._refuse(failures, 1, "forward")
            ctx.without(failures)
            return False
        return True

    def _exchange(self, request: Request) -> Reply:
        begin = time.monotonic()
        with self._summary.spending("wire"):
            reply = self.clients.exchange(request, self._timeout)
        counts = dict(zip(request.nodes, request.counts(), strict=True))
        self._summary.exchanged(reply, time.monotonic() - begin, counts)
        if self._attempt is not None:
            for client, seconds in reply.seconds.items():
                if client not in reply.failures:
                    self._attempt.seconds.setdefault(client, []).append(seconds)
            self._attempt.bytes_sent += reply.bytes_sent
            self._attempt.bytes_received += reply.bytes_received
        return reply

    def _refuse(self, failures: Mapping[int, Failure], of: int, stage: str) -> None:
        """Count failures, and end the run if they are not tolerated."""
        self._summary.refuse(failures)
        check_usable(self.backend.bound, failures)
        if failures and not self._policy.tolerate:
            raise StepError(f"{len(failures)} of {of} clients failed in {stage}", dict(failures))
        if self._policy.mistakes == "stop" and (mistakes := mistakes_of(failures)):
            raise StepError(self._mistakes(mistakes, of, stage), mistakes)

    def _mistakes(self, mistakes: Mapping[int, Failure], of: int, stage: str) -> str:
        """Return what a run that ends for a mistake says first."""
        who = self.clients.name(min(mistakes)) if len(mistakes) == 1 else f"{len(mistakes)} of {of} clients"
        return (
            f"a mistake of {who} in {stage}, which would happen again (to go on without whoever makes one: "
            "FaultPolicy(mistakes='exclude'))"
        )

    def _clipped(self, parts: list[Part], output: str) -> list[Part]:
        """Return each client's part of a sum, within the policy's norm."""
        most, attempt = self._policy.max_gradient_norm, self._attempt
        if most is None or attempt is None or output not in self.backend.weights():
            return parts
        counts = attempt.orders.examples()
        total = sum(counts[node] for part in parts for node in part.nodes)
        result = []
        for part in parts:
            value = part.outputs[output].value
            # a client's part of the batch's mean is its own mean times its share
            norm = tree.norm(value) * total / sum(counts[node] for node in part.nodes)
            if norm > most:
                self._summary.clipped += 1
                who = self.clients.name(part.nodes[0])
                log.warning("%s: gradient of norm %.3g scaled down to %.3g", who, norm, most)
                factor = most / norm
                value = tree.map_leaves(lambda t, factor=factor: t * factor, value)
                part = replace(part, outputs={**part.outputs, output: Leaf(part.outputs[output].kind, value)})
            result.append(part)
        return result
