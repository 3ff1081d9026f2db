"""Sequential split learning: one client at a time, the client half is handed on (Gupta & Raskar, arXiv 1810.06060)."""

from __future__ import annotations

from psl_flower.methods.parallel import ParallelSplit
from psl_flower.methods.turns import turns_of
from psl_flower.samplers.base import Sampler


class SequentialSplit(ParallelSplit):
    """The clients take turns in ascending id, each for all batches of its own; a step is one batch of one client.

    The head travels from client to client by way of the server, and what the optimizer remembers of it (momentum) goes
    with it: training equals centralised training on the same batches in the same order, which is the paper's claim.
    `batch_size` is that of a client's batch; a step takes as long as its client, an epoch the sum over all steps.
    """

    name = "sequential"

    def sampler(self, chosen: Sampler) -> Sampler:
        """Return the clients' turns."""
        return turns_of(self.name, chosen, "ascending")
