"""U-shaped split learning: both ends of the model on the clients, and with them the labels (docs/method.md, 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from psl_flower import tree
from psl_flower.methods.base import CLIENT, ROWS, SERVER, SHARED, SUM, SplitMethod, stage
from psl_flower.methods.context import ClientContext, EvaluationContext, StepContext


class UShapedSplit(SplitMethod):
    """Head and tail on the clients, the body on the server; the loss is computed on the clients, labels stay there.

    With per-example layers in head and tail this equals centralised SGD on the examples of the step, parameter by
    parameter (three exchanges a step; arXiv 1812.00564, "U-shaped configuration").
    """

    name = "u-shaped"
    parts: ClassVar[Mapping[str, str]] = {"head": CLIENT, "body": SERVER, "tail": CLIENT}

    # --- on a client ------------------------------------------------------------------------------------------------
    @stage(outputs={"activations": ROWS})
    def head_forward(self, client: ClientContext, batch: Any) -> dict[str, Any]:
        """Run the head on a batch; what it hands to the tail past the server (skip connections) stays here."""
        client.kept["activations"], client.kept["skipped"] = client.head(batch.inputs)
        return {"activations": client.kept["activations"]}

    @stage(
        inputs={"outputs": ROWS, "rows": SHARED},
        outputs={"gradient": ROWS, "tail": SUM, "past": SUM, "loss": SUM, "counts": SUM, "score": SUM},
        gradients=("gradient",),
        counts=("counts",),
        after="head_forward",
    )
    def tail_loss(self, client: ClientContext, outputs: Any, rows: Any) -> dict[str, Any]:
        """Run the tail, take the loss, and back-propagate to the body's outputs and along what skips the body.

        Gradients are those of the sum of the losses, divided by `rows`, the examples of the step, unless the loss is a
        sum; "past" is the head's, of what skips the body. "loss" is the sum over what counts of what is told; "counts"
        are that, what counts in all, whether the loss is a sum, and whether it or its gradients are not finite (they
        are zeros then: whether the run goes on is the server's to decide). A client that is alone in a step tells no
        loss, for the sum would be its own; with DP-SGD of drawn batches it is not told the number, and tells it.
        """
        received, skipped = tree.map_leaves(_leaf, (outputs, client.kept["skipped"]))
        found = client.tail.loss(received + skipped, client.batch.target)
        alone = len(client.counts) == 1 and int(client.counts[0]) == rows.item()
        score = None
        if found.predictions is not None:
            score = torch.tensor((0, 0) if alone else found.predictions.score())
        gradient, tail, past = None, dict.fromkeys(client.tail.parameters), None
        finite = math.isfinite(found.sum)
        if client.training:
            share = 1.0 if found.summed else found.weight / rows.item()
            (gradient, skipping), tail = client.tail.backward(found, share, (received, skipped))
            if tree.leaves(skipped):
                past = client.head.gradients(client.kept["skipped"], skipping, again=True)
            finite = finite and all(bool(torch.isfinite(t).all()) for t in tree.leaves((gradient, tail, past)))
            if not finite:
                gradient, tail, past = tree.map_leaves(torch.zeros_like, (gradient, tail, past))
        told, of = (0.0, 0.0) if alone else (found.sum if finite else 0.0, found.weight)
        loss = torch.tensor([told], dtype=torch.float64)
        counts = torch.tensor([of, found.weight, found.summed, not finite], dtype=torch.float64)
        return {"gradient": gradient, "tail": tail, "past": past, "loss": loss, "counts": counts, "score": score}

    @stage(inputs={"gradient": ROWS}, outputs={"head": SUM}, after="head_forward")
    def head_backward(self, client: ClientContext, gradient: Any) -> dict[str, Any]:
        """Back-propagate the gradient of the activations through the head."""
        return {"head": client.head.gradients(client.kept["activations"], gradient)}

    @stage(
        inputs={"outputs": ROWS},
        outputs={"predicted": ROWS},
        after="head_forward",
        joint=False,
        exact=("predicted",),
        trains=False,
    )
    def tail_predict(self, client: ClientContext, outputs: Any) -> dict[str, Any]:
        """Run the tail, and give what the client's app makes of the model's outputs, if anything."""
        return {"predicted": client.predicted(client.tail(outputs + client.kept["skipped"]))}

    # --- on the server ----------------------------------------------------------------------------------------------
    def step(self, ctx: StepContext) -> Any:
        """Make one step of centralised SGD on the union of the clients' batches."""
        sent = ctx.call(self.head_forward)
        body = ctx.body.forward(sent.activations)
        found = ctx.call(self.tail_loss, outputs=body.outputs, rows=torch.tensor(ctx.divisor))
        outcome = ctx.outcome(torch.cat([found.loss, found.counts]), found.score)
        # clients know the examples of the step, but not yet how many of its targets count in the loss
        scaled = partial(_times, 1.0 if outcome.summed else ctx.orders.num_rows / found.counts[1].item())
        inner = body.backward(scaled(found.gradient))
        back = ctx.call(self.head_backward, gradient=inner.gradient)
        head = tree.add(scaled(found.past), back.head)
        ctx.commit(head=head, body=inner.parameter_gradients, tail=scaled(found.tail))
        return outcome

    def evaluate(self, ctx: EvaluationContext) -> Any:
        """Have the clients finish what the server's body made of their test examples."""
        sent = ctx.call(self.head_forward)
        body = ctx.body.forward(sent.activations)
        found = ctx.call(self.tail_loss, outputs=body.outputs, rows=torch.tensor(ctx.orders.num_rows))
        return ctx.outcome(torch.cat([found.loss, found.counts]), found.score)

    def predict(self, ctx: EvaluationContext) -> tuple[Any, None]:
        """Have the clients finish what the server's body made of their test examples; outputs are theirs to give."""
        sent = ctx.call(self.head_forward)
        body = ctx.body.forward(sent.activations)
        return ctx.call(self.tail_predict, outputs=body.outputs).predicted, None


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def _times(factor: float, gradients: Any) -> Any:
    return gradients if factor == 1 else tree.map_leaves(lambda t: t * factor, gradients)
