"""Parallel split learning: all clients at once, one global batch, one shared server half (docs/method.md, 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from psl_flower.methods.base import CLIENT, ROWS, SERVER, SUM, SplitMethod, stage
from psl_flower.methods.context import ClientContext, EvaluationContext, StepContext


class ParallelSplit(SplitMethod):
    """The head on the clients, the body on the server; labels go to the server with the activations.

    With per-example layers in the head this equals centralised SGD on the examples of the step, parameter by parameter
    (arXiv 2407.15738, section III).
    """

    name = "parallel"
    parts: ClassVar[Mapping[str, str]] = {"head": CLIENT, "body": SERVER}

    # --- on a client ------------------------------------------------------------------------------------------------
    @stage(outputs={"activations": ROWS, "labels": ROWS}, exact=("labels",))
    def forward(self, client: ClientContext, batch: Any) -> dict[str, Any]:
        """Run the head on a batch."""
        client.kept["activations"] = activations = client.head(batch.inputs)
        return {"activations": activations, "labels": batch.target}

    @stage(inputs={"gradient": ROWS}, outputs={"head": SUM}, after="forward")
    def backward(self, client: ClientContext, gradient: Any) -> dict[str, Any]:
        """Back-propagate the gradient of the activations through the head."""
        return {"head": client.head.gradients(client.kept["activations"], gradient)}

    # --- on the server ----------------------------------------------------------------------------------------------
    def step(self, ctx: StepContext) -> Any:
        """Make one step of centralised SGD on the union of the clients' batches."""
        sent = ctx.call(self.forward)
        outcome = ctx.body.forward_backward(sent.activations, sent.labels)
        gradients = ctx.call(self.backward, gradient=outcome.gradient)
        ctx.commit(head=gradients.head, body=outcome.parameter_gradients)
        return outcome

    def evaluate(self, ctx: EvaluationContext) -> Any:
        """Finish what the clients' heads made of their test examples."""
        sent = ctx.call(self.forward)
        return ctx.body.evaluate(sent.activations, sent.labels)

    def predict(self, ctx: EvaluationContext) -> tuple[Any, Any]:
        """Return what the body makes of what the clients' heads made of their test examples, whatever their labels."""
        sent = ctx.call(self.forward)
        return ctx.body.forward(sent.activations).outputs, sent.labels
