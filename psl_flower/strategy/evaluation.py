"""Split evaluation: clients send the activations of their test data, the server finishes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from flwr.app import MetricRecord

from psl_flower.errors import StepError
from psl_flower.exchange import Clients
from psl_flower.exchange.door import Door
from psl_flower.protocol import Config, EvaluateRequest
from psl_flower.strategy.server_step import SplitTrainer
from psl_flower.strategy.summary import RunSummary

log = logging.getLogger("flwr.psl_flower")


def split_evaluate(
    clients: Clients,
    trainer: SplitTrainer,
    door: Door,
    *,
    batch_size: int,
    timeout: float,
    config: Config,
    evaluate_config: Config,
    summary: RunSummary,
    tolerate: bool = False,
) -> MetricRecord | None:
    """Evaluate the model on the test data of all clients, without the data leaving them.

    Parameters
    ----------
    batch_size : int
        Examples an exchange, over all clients.
    timeout : float
        Seconds an exchange.
    summary : RunSummary
        Told what went wrong.
    tolerate : bool
        Whether to go on without clients that fail, as long as there are others.

    Returns
    -------
    MetricRecord or None
        `loss` and `accuracy` (classification only), means over all examples, and `num_examples`; None if no client
        has test data.

    Raises
    ------
    StepError
        If a client fails and that is not tolerated, or all fail.
    """
    left = {c: m.description.num_test_examples for c, m in clients.members.items() if m.description.num_test_examples}
    if not left:
        return None
    done = dict.fromkeys(left, 0)
    loss, correct, predictions, examples = 0.0, 0, 0, 0
    scored = True
    while left:
        share = max(1, batch_size // len(left))
        counts = {client: min(share, n) for client, n in left.items()}
        weights = trainer.weights()
        requests = {c: EvaluateRequest(done[c], n, weights, config, evaluate_config) for c, n in counts.items()}
        accepted, failures = door.activations(clients.exchange(requests, timeout), counts)
        results = {}
        for client, part in accepted.items():
            try:
                results[client] = trainer.evaluate(part, client)
            except StepError as error:
                if client not in error.failures:
                    raise
                failures |= error.failures
        summary.refuse_in_evaluation(failures)
        if failures and (not tolerate or not (results or examples)):
            raise StepError(f"{len(failures)} of {len(counts)} clients failed", failures)
        for client, why in failures.items():
            log.warning("evaluation goes on without client %d: %s", client, why)
            del left[client], counts[client]
        for part_loss, part_correct, part_predictions in results.values():
            loss += part_loss
            scored &= part_correct is not None
            correct += part_correct or 0
            predictions += part_predictions
        for client, n in counts.items():
            done[client] += n
        examples += sum(counts.values())
        left = _less(left, counts)
    metrics: dict[str, int | float] = {"loss": loss / examples, "num_examples": examples}
    if scored:
        metrics["accuracy"] = correct / predictions
    return MetricRecord(metrics)  # type: ignore[arg-type]  # its value type is invariant


def _less(left: Mapping[int, int], taken: Mapping[int, int]) -> dict[int, int]:
    return {client: n - taken[client] for client, n in left.items() if n > taken[client]}
