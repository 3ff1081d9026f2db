"""SplitFed, versions 1 and 2 (Thapa et al. 2022, arXiv 2004.12088): every client trains a head of its own for a round.

The paper can be read in two ways: its algorithm 1 updates the server's half with the average of all clients' gradients;
its section on variants, and its published code, have the server-side models of version 1 run separately and averaged at
each global epoch. This is the second reading. The averages are weighted by n_k / n, as the paper says; n_k counts the
examples that a client has used in the round.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from psl_flower import tree
from psl_flower.methods.base import CLIENT, ROWS, SERVER, SHARED, SUM, SplitMethod, stage
from psl_flower.methods.context import ClientContext, EvaluationContext, RoundContext, StepContext
from psl_flower.methods.turns import turns_of
from psl_flower.samplers.base import Sampler


class SplitFed(SplitMethod):
    """What both versions do with the heads: given out before a round, trained by the clients, averaged after it.

    A client trains its head with an optimizer that it makes itself, afresh every round, and whose learning rate follows
    the server's schedule. Whoever loses its head within a round is out of it, and left out of the average.
    """

    parts: ClassVar[Mapping[str, str]] = {"head": CLIENT, "body": SERVER}
    resumable_within_round = False

    # --- on a client ------------------------------------------------------------------------------------------------
    @stage(batch=False, joint=False)
    def begin(self, client: ClientContext) -> dict[str, Any]:
        """Take the master's head as one's own."""
        client.begin("head")
        return {}

    @stage(outputs={"activations": ROWS, "labels": ROWS}, exact=("labels",), own=True)
    def local_forward(self, client: ClientContext, batch: Any) -> dict[str, Any]:
        """Run the client's own head on a batch."""
        client.kept["activations"] = activations = client.own("head")(batch.inputs)
        return {"activations": activations, "labels": batch.target}

    @stage(inputs={"gradient": ROWS, "rate": SHARED}, after="local_forward", own=True)
    def local_backward(self, client: ClientContext, gradient: Any, rate: Any) -> dict[str, Any]:
        """Step the client's own head."""
        head = client.own("head")
        head.step(head.gradients(client.kept["activations"], gradient), float(rate))
        return {}

    @stage(outputs={"head": SUM}, batch=False, own=True)
    def collect(self, client: ClientContext) -> dict[str, Any]:
        """Give the own head times the examples it was trained on."""
        count = int(client.counts.sum())
        return {"head": {name: count * t.detach().cpu() for name, t in client.own("head").parameters.items()}}

    @stage(outputs={"activations": ROWS, "labels": ROWS}, exact=("labels",))
    def forward(self, client: ClientContext, batch: Any) -> dict[str, Any]:
        """Run the master's head on a batch, to evaluate it."""
        return {"activations": client.head(batch.inputs), "labels": batch.target}

    # --- on the server ----------------------------------------------------------------------------------------------
    def begin_round(self, ctx: RoundContext) -> None:
        """Give the head out."""
        ctx.call(self.begin)

    @abstractmethod
    def step(self, ctx: StepContext) -> Any:
        """Make one local step of every client in it; what the server's half does is the version's."""

    def end_round(self, ctx: RoundContext) -> None:
        """Average the heads."""
        ctx.assign(head=self.average_head(ctx))

    def average_head(self, ctx: RoundContext) -> dict[str, Any]:
        """Return the average of the heads, by examples."""
        heads = ctx.call(self.collect).head
        return {name: t / ctx.orders.num_rows for name, t in heads.items()}

    def evaluate(self, ctx: EvaluationContext) -> Any:
        """Finish what the master's head made of the clients' test examples."""
        sent = ctx.call(self.forward)
        return ctx.body.evaluate(sent.activations, sent.labels)

    def predict(self, ctx: EvaluationContext) -> tuple[Any, Any]:
        """Return what the body makes of what the clients' heads made of their test examples, whatever their labels."""
        sent = ctx.call(self.forward)
        return ctx.body.forward(sent.activations).outputs, sent.labels


class SplitFedV1(SplitFed):
    """Version 1: the server has a copy of the body for every client, and averages them like the heads.

    Nothing of a client's training depends on the others: the weights are those of federated averaging with the same
    batches. Step t has the t-th batch of every client that has so many, side by side; it takes as long as the slowest.
    A copy's optimizer begins afresh every round.
    """

    name = "splitfed-v1"

    def sampler(self, chosen: Sampler) -> Sampler:
        """Return the clients' batches, side by side."""
        return turns_of(self.name, chosen, "side by side")

    def step(self, ctx: StepContext) -> Any:
        """Step each client's head and its copy of the body with its own batch."""
        sent, outcomes = ctx.call(self.local_forward), []
        bodies = [ctx.copy("body", client) for client in ctx.clients]
        counts = ctx.orders.counts.tolist()
        rows = zip(tree.split(sent.activations, counts, "rows"), tree.split(sent.labels, counts, "rows"), strict=True)
        for body, (activations, labels) in zip(bodies, rows, strict=True):
            outcomes.append(body.forward_backward(activations, labels))
        gradient = tree.join([outcome.gradient for outcome in outcomes], "gradients")
        ctx.call(self.local_backward, gradient=gradient, rate=ctx.rate)
        for body in bodies:
            body.step()
        ctx.commit()
        return outcomes[0].join(outcomes[1:])

    def end_round(self, ctx: RoundContext) -> None:
        """Average heads and bodies, of the same clients."""
        head = self.average_head(ctx)  # first: it says whose heads have been lost
        ctx.assign(head=head, body=ctx.average_copies("body"))


class SplitFedV2(SplitFed):
    """Version 2: one body for all, trained on client after client.

    The clients take turns in a random order, another one every round, each for all its batches, as in the authors' code
    (the text could also mean a new order for every exchange). The body stays as the last turn left it; its optimizer
    remembers across turns and rounds. A step is one batch of one client, an epoch takes the sum over all steps.
    """

    name = "splitfed-v2"

    def sampler(self, chosen: Sampler) -> Sampler:
        """Return the clients' turns."""
        return turns_of(self.name, chosen, "random")

    def step(self, ctx: StepContext) -> Any:
        """Step the body, and the own heads of the clients."""
        sent = ctx.call(self.local_forward)
        outcome = ctx.body.forward_backward(sent.activations, sent.labels)
        ctx.call(self.local_backward, gradient=outcome.gradient, rate=ctx.rate)
        ctx.commit(body=outcome.parameter_gradients)
        return outcome
