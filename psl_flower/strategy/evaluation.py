"""Split evaluation: the clients' test data stays with them, the server finishes what they send."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
from flwr.app import MetricRecord

from psl_flower.errors import LabelError, StepError
from psl_flower.exchange import Clients
from psl_flower.exchange.validation import Validator
from psl_flower.failures import Failure, Kind
from psl_flower.methods.base import SplitMethod
from psl_flower.protocol import Config, Orders
from psl_flower.server import LocalBackend, Outcome, Scores
from psl_flower.strategy.context import Asking, EvaluationContext, LostClientsError, TooFewError, by_client
from psl_flower.strategy.summary import RunSummary

log = logging.getLogger("flwr.psl_flower")


class Evaluator:
    """Evaluates the model on the test data of all clients, without the data leaving them.

    Parameters
    ----------
    method : SplitMethod
    backend : LocalBackend
    clients : Clients
    batch_size : int
        Examples an exchange, over all clients.
    timeout : float
        Seconds an exchange.
    config, evaluate_config : dict
        Sent to the clients.
    summary : RunSummary
        Told what went wrong.
    tolerate : bool
        Whether to go on without clients that fail, as long as there are others.
    mistakes : str
        What to do about mistakes, see `FaultPolicy`.
    metrics : dict, optional
        The user's own, see `psl_flower.server.Scores`.
    """

    def __init__(
        self,
        method: SplitMethod,
        backend: LocalBackend,
        clients: Clients,
        *,
        batch_size: int,
        timeout: float,
        config: Config,
        evaluate_config: Config,
        summary: RunSummary,
        tolerate: bool = False,
        mistakes: str = "retry",
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        self._method, self._backend, self._clients = method, backend, clients
        self._batch_size, self._summary, self._tolerate = batch_size, summary, tolerate
        self._metrics, self._mistakes = metrics, mistakes
        self._left_out: dict[int, tuple[int, ...]] = {}  # test examples that a client cannot read
        self._asking = Asking(
            exchange=lambda request: clients.exchange(request, timeout),
            validator=Validator(),
            config=config,
            evaluate_config=evaluate_config,
            refuse=lambda failures, of, stage: None,
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

    def _evaluate(self) -> MetricRecord | None:
        members = self._clients.members.items()
        left = {c: m.description.num_test_examples - len(self._left_out.get(c, ())) for c, m in members}
        left = {client: n for client, n in left.items() if n > 0 and client not in self._clients.excluded}
        if not left:
            return None
        done = dict.fromkeys(left, 0)
        scores, examples = Scores(self._metrics), 0
        while left:
            share = max(1, self._batch_size // len(left))
            counts = {client: min(share, n) for client, n in islice(left.items(), self._batch_size)}
            outcome, failures = self._batch(done, counts)
            for client, found in self._unreadable(failures).items():
                left[client] -= found
                del failures[client], counts[client]
                if left[client] <= 0:
                    del left[client]
            self._summary.refuse_in_evaluation(failures)
            mistakes = {client: f for client, f in failures.items() if f.kind.is_mistake}
            if mistakes and self._mistakes == "stop":
                raise StepError(f"{len(mistakes)} of {len(counts)} clients failed", mistakes)
            if mistakes and self._mistakes == "exclude":
                self._clients.excluded |= mistakes.keys()
                self._summary.excluded.update({client: str(failure) for client, failure in mistakes.items()})
            if failures and (not self._tolerate or not (outcome or examples)):
                raise StepError(f"{len(failures)} of {len(counts)} clients failed", failures)
            for client, why in failures.items():
                log.warning("evaluation goes on without client %d: %s", client, why)
                del left[client], counts[client]
            if outcome is not None:
                outcome.add_to(scores)
            for client, n in counts.items():
                done[client] += n
            examples += sum(counts.values())
            rest = {client: n - counts.get(client, 0) for client, n in left.items()}
            left = {client: n for client, n in rest.items() if n}
        result = scores.result()
        metrics: dict[str, int | float] = {"loss": result.pop("loss"), "num_examples": examples, **result}
        return MetricRecord(metrics)  # type: ignore[arg-type]  # its value type is invariant

    def _unreadable(self, failures: Mapping[int, Failure]) -> dict[int, int]:
        """Leave test examples out that clients cannot read; return how many more, by client."""
        found = {}
        for client, failure in failures.items():
            before = set(self._left_out.get(client, ()))
            new = [row for row in failure.rows if row not in before]
            if failure.kind is Kind.UNREADABLE and new:
                self._left_out[client] = tuple(sorted(before.union(new)))
                found[client] = len(new)
                for row in new:
                    who = self._clients.name(client)
                    log.warning("%s: test example %d is left out: %s", who, row, failure.rows[row])
        return found

    def _batch(self, done: Mapping[int, int], counts: Mapping[int, int]) -> tuple[Outcome | None, dict[int, Failure]]:
        """Evaluate some examples of each client; return what is wrong with those that failed."""
        clients = np.array(sorted(counts), dtype=np.int64)
        orders = Orders(
            clients=clients,
            starts=np.array([done[int(c)] for c in clients], dtype=np.int64),
            counts=np.array([counts[int(c)] for c in clients], dtype=np.int64),
            left_out={int(c): self._left_out[int(c)] for c in clients if int(c) in self._left_out},
            test=True,
        )
        failures: dict[int, Failure] = {}
        while len(orders):
            ctx = EvaluationContext(self._method, self._backend, self._asking, orders, seed=0)
            try:
                outcome: Outcome = self._method.evaluate(ctx)
                return outcome, failures | ctx.lost
            except (LostClientsError, TooFewError):
                failures |= ctx.lost
            except LabelError as error:
                failures |= ctx.lost | by_client(error, ctx.orders)
            orders = orders.take(np.flatnonzero(~np.isin(orders.clients, list(failures))))
        return None, failures
