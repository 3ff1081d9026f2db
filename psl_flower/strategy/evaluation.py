"""Split evaluation: the clients' test data stays with them, the server finishes what they send."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from flwr.app import MetricRecord

from psl_flower.errors import LabelError, StepError
from psl_flower.exchange.validation import Validator
from psl_flower.failures import Failure, Kind, failure_lines, mistakes_of
from psl_flower.faults import FaultPolicy
from psl_flower.methods.base import SplitMethod
from psl_flower.protocol import Config, Orders
from psl_flower.server import LocalBackend, Scores
from psl_flower.strategy.attempt import LostClientsError, TooFewError
from psl_flower.strategy.context import Asking, EvaluationContext
from psl_flower.strategy.gathering import by_client
from psl_flower.strategy.kept import KeptRows
from psl_flower.strategy.membership import Membership
from psl_flower.strategy.secure import SecureSums
from psl_flower.strategy.summary import RunSummary
from psl_flower.tree import Tree

log = logging.getLogger("flwr.psl_flower")


class Evaluator:
    """Evaluates the model on the test data of all clients, without the data leaving them.

    Parameters
    ----------
    method : SplitMethod
    backend : LocalBackend
    membership : Membership
    batch_size : int
        Examples an exchange, over all clients.
    timeout : float
        Seconds an exchange.
    config, evaluate_config : dict
        Sent to the clients.
    summary : RunSummary
        Told what went wrong.
    policy : FaultPolicy
        Whether to go on without clients that fail, as long as there are others.
    metrics : dict, optional
        The user's own, see `psl_flower.server.Scores`.
    secure : SecureSums, optional
        Where clients mask their sums. A batch that loses a client is not evaluated then.
    kept : KeptRows, optional
        What clients are asked for once.
    """

    def __init__(
        self,
        method: SplitMethod,
        backend: LocalBackend,
        membership: Membership,
        *,
        batch_size: int,
        timeout: float,
        config: Config,
        evaluate_config: Config,
        summary: RunSummary,
        policy: FaultPolicy,
        metrics: Mapping[str, Any] | None = None,
        secure: SecureSums | None = None,
        kept: KeptRows | None = None,
    ) -> None:
        self._method, self._backend, self._membership, self._secure = method, backend, membership, secure
        self._batch_size, self._summary, self._policy, self._metrics = batch_size, summary, policy, metrics
        self._asking = Asking(
            exchange=lambda request: membership.clients.exchange(request, timeout),
            validator=Validator(longest=backend.longest),
            config=config,
            evaluate_config=evaluate_config,
            refuse=lambda failures, of, stage: None,
            secure=secure,
            keys=membership.clients.keys,
            texts=backend.longest > 0,
            kept=kept,
        )

    def evaluate(self) -> MetricRecord | None:
        """Return the metrics over all examples; None if no client has test data.

        Returns
        -------
        MetricRecord or None
            `loss`, `accuracy` (classification only) and the user's own, over all examples, and `num_examples`.

        Raises
        ------
        StepError
            If a client fails and that is not tolerated, or all fail.
        """
        with self._summary.spending("evaluation"):
            return self._evaluate()

    def predict(self) -> Iterator[tuple[Orders, Tree, Tree]]:
        """Yield, batch by batch, the examples of clients, and the model's outputs and the labels for them, row by row.

        None stands for what stays with the clients. Errors are those of `evaluate`.
        """
        for orders, (outputs, labels) in self._batches(self._method.predict):
            yield orders, outputs, labels

    def _evaluate(self) -> MetricRecord | None:
        scores, examples, withheld = Scores(self._metrics, one_model=True), 0, 0
        for orders, outcome in self._batches(self._method.evaluate):
            if outcome is None:
                withheld += orders.num_rows
                continue
            outcome.add_to(scores)
            examples += orders.num_rows
        if withheld:
            log.warning("evaluation went without %d examples, of batches that no sum may be told of", withheld)
        if not examples:
            return None
        result = scores.result()
        metrics: dict[str, int | float] = {"loss": result.pop("loss"), "num_examples": examples, **result}
        return MetricRecord(metrics)  # type: ignore[arg-type]  # its value type is invariant

    def _batches(self, what: Callable[[EvaluationContext], Any]) -> Iterator[tuple[Orders, Any]]:
        """Yield the test examples of all clients, some of each at a time, and what a method makes of them.

        None is made of those that no sum may be told of.
        """
        left, found = self._membership.test_sizes(), False
        done = dict.fromkeys(left, 0)
        while left:
            counts = self._shares(left)
            orders, outcome, failures = self._batch(what, done, counts)
            for client in [client for client, failure in failures.items() if failure.kind is Kind.UNREADABLE]:
                if new := self._membership.leave_out_rows(client, failures[client], test=True):
                    left[client] -= len(new)
                    del failures[client], counts[client]
                    if left[client] <= 0:
                        del left[client]
            self._summary.refuse_in_evaluation(failures)
            mistakes = mistakes_of(failures)
            if mistakes and self._policy.mistakes == "stop":
                raise StepError(f"{len(mistakes)} of {len(counts)} clients failed", mistakes)
            if mistakes and self._policy.mistakes == "exclude":
                self._membership.exclude(mistakes)
                self._summary.excluded.update({client: str(failure) for client, failure in mistakes.items()})
            found = found or outcome is not None
            if failures and (not self._policy.tolerate or not (found or self._secure)):
                raise StepError(f"{len(failures)} of {len(counts)} clients failed", failures)
            for line in failure_lines(failures, self._membership.name):
                log.warning("evaluation goes on without %s", line)
            for client in failures:
                del left[client], counts[client]
            if counts:
                yield orders, outcome
            for client, n in counts.items():
                done[client] += n
            # whoever has just found rows that cannot be read is asked for the others next
            left = {client: n - counts.get(client, 0) for client, n in left.items() if n > counts.get(client, 0)}

    def _shares(self, left: Mapping[int, int]) -> dict[int, int]:
        """Return how many examples of each client come next."""
        if self._secure is None and self._method.sends_labels():
            share = max(1, self._batch_size // len(left))
            return {client: min(share, n) for client, n in islice(left.items(), self._batch_size)}
        # all come to their end together: the last batches are of many clients, too
        batches = -(-sum(left.values()) // self._batch_size)
        return {client: -(-n // batches) for client, n in left.items()}

    def _batch(
        self, what: Callable[[EvaluationContext], Any], done: Mapping[int, int], counts: Mapping[int, int]
    ) -> tuple[Orders, Any, dict[int, Failure]]:
        """Try some examples of each client; return those it came to, what of, and why clients failed."""
        clients, unreadable = np.array(sorted(counts), dtype=np.int64), self._membership.unreadable_tests.rows
        orders = Orders(
            clients=clients,
            starts=np.array([done[int(c)] for c in clients], dtype=np.int64),
            counts=np.array([counts[int(c)] for c in clients], dtype=np.int64),
            left_out={int(c): unreadable[int(c)] for c in clients if int(c) in unreadable},
            test=True,
        )
        failures: dict[int, Failure] = {}
        while len(orders):
            ctx = EvaluationContext(self._method, self._backend, self._asking, orders, seed=0)
            try:
                outcome = what(ctx)
                return ctx.orders, outcome, failures | ctx.lost
            except (LostClientsError, TooFewError):
                failures |= ctx.lost
                if not ctx.lost:
                    break  # too few for a sum
            except LabelError as error:
                failures |= ctx.lost | by_client(error, ctx.orders)
            orders = orders.without(failures)
            if ctx.given:
                break  # the others have given their sums, and do so once
        return orders, None, failures
