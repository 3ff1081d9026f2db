"""Sequential split learning."""

from __future__ import annotations

from psl_flower.experiments.algorithms.base import Algorithm
from psl_flower.experiments.schedule import Schedule


class SequentialSplit(Algorithm):
    """Split learning with one client at a time (Gupta & Raskar 2018, arXiv 1810.06060, peer-to-peer mode).

    In every round the clients take turns in ascending id. The one whose turn it is trains both halves on batches of its
    own data, then hands the client half on to the next. What the optimizer remembers of the client half (momentum) goes
    with the weights, so that the run equals centralised training on the same batches in the same order, which is the
    paper's claim. A step is one batch of one client; it is what the next one waits for: the simulated time of a round
    is the sum over all clients' steps, ``sum_k sum_j (latency_k + per_sample_k * b_kj)``. Handing on counts nothing.
    """

    def schedule(self, epoch: int) -> Schedule:
        """Return the clients' batches, client by client."""
        return self.turns(epoch, self.population.client_ids.tolist())
