"""What the server sends and receives, written down on its side of the carrier, byte for byte as it travels.

An audit attacks these records and nothing else. What the clients really drew is written down beside them, on the
clients' side: no attack is shown it, it is what results are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from psl_flower.client import SplitClient
from psl_flower.data import Batch
from psl_flower.exchange.codec import WeightStore, decode_reply, decode_request
from psl_flower.exchange.records import content_to_frame
from psl_flower.grid import InProcessGrid
from psl_flower.privacy import Cohort
from psl_flower.protocol import Leaf, Weights, WorkOrder


@dataclass(frozen=True, eq=False, kw_only=True)
class Exchange:
    """One request to one client, and its reply.

    Parameters
    ----------
    stage : str
        Of the method.
    order : WorkOrder
        Which examples of the client it is about; the server knows their numbers.
    weights : dict of str to Weights
        Of the parts on the clients, as they were sent.
    sent, received : dict of str to Leaf
        The stage's inputs and outputs.
    cohort : Cohort or None
        Who gave masked sums together.
    tag : int or None
        What the client gave for its batch, to tell whether it is the same when drawn again.
    """

    stage: str
    order: WorkOrder
    weights: Mapping[str, Weights]
    sent: Mapping[str, Leaf]
    received: Mapping[str, Leaf]
    cohort: Cohort | None = None
    tag: int | None = None

    @property
    def head(self) -> Weights:
        """The weights of the first part of the model."""
        return next(iter(self.weights.values()))


@dataclass(eq=False)
class Recording:
    """What crossed in the rounds that were recorded.

    Parameters
    ----------
    exchanges : list of Exchange
        In the order in which they happened; those of evaluation among them.
    truth : dict
        The batches that clients drew, by what `key` makes of their orders.
    first_epoch : int
        What comes before it is not kept.
    """

    exchanges: list[Exchange] = field(default_factory=list)
    truth: dict[tuple[Any, ...], Batch] = field(default_factory=dict)
    first_epoch: int = 0

    def holds(self, order: WorkOrder) -> bool:
        """Return whether an order is of a round that is recorded, or of evaluation."""
        return order.test or order.epoch >= self.first_epoch

    def inputs(self, order: WorkOrder) -> Tensor:
        """Return the inputs that a client really drew for an order."""
        found: Tensor = self.truth[key(order)].inputs
        return found

    def labels(self, order: WorkOrder) -> Tensor:
        """Return their labels, whatever the client has told of them."""
        found = self.truth[key(order)].target
        assert isinstance(found, Tensor)  # an audit reads no other data
        return found


def key(order: WorkOrder) -> tuple[Any, ...]:
    """Return what tells a batch of a run from all others."""
    return (order.client, order.test, order.epoch, order.step, order.start)


class RecordingGrid(InProcessGrid):
    """An `InProcessGrid` that keeps what the message carrier sends and receives.

    Each client answers for itself, as it does where each is a machine of its own: so sums are a client's, unless they
    are masked.

    Parameters
    ----------
    client_app : ClientApp
    num_nodes : int
    recording : Recording
        Written to.
    """

    def __init__(self, client_app: ClientApp, num_nodes: int, recording: Recording) -> None:
        super().__init__(client_app, num_nodes)
        self._recording = recording
        self._store = WeightStore()  # frozen weights are sent once
        self._weights: dict[tuple[str, str], Weights] = {}  # by part and version: many requests carry the same

    def _answer(self, message: Message, context: Context) -> Message:
        frame = content_to_frame(message.content)
        _, _, request = decode_request(frame, self._store)
        reply, orders = super()._answer(message, context), request.orders
        if orders is None or reply.has_error():
            return reply
        (order,) = orders.each()
        if not self._recording.holds(order):
            return reply
        answer = decode_reply(content_to_frame(reply.content), request)
        weights = {p: self._weights.setdefault((p, w.version), w) for p, w in request.weights.items()}
        for part in answer.parts:
            self._recording.exchanges.append(
                Exchange(
                    stage=request.stage,
                    order=order,
                    weights=weights,
                    sent=request.inputs,
                    received=part.outputs,
                    cohort=request.cohort,
                    tag=None if part.checksums is None else int(part.checksums[0]),
                )
            )
        return reply


def witness(recording: Recording) -> type[SplitClient]:
    """Return a class of clients that write down what they draw."""

    class Witness(SplitClient):
        def draw_batch(self, order: WorkOrder) -> Batch:
            batch = super().draw_batch(order)
            if recording.holds(order):
                recording.truth[key(order)] = batch
            return batch

    return Witness
