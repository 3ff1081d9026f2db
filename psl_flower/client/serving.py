"""One request to one client, answered; both carriers end here."""

from __future__ import annotations

from psl_flower.client.client import SplitClient
from psl_flower.client.process import RunState
from psl_flower.protocol import (
    Activations,
    BackwardRequest,
    DescribeRequest,
    EvaluateRequest,
    ForwardRequest,
    Gradients,
    Reply,
    Request,
)


def answer(client: SplitClient, state: RunState, node_id: int, request: Request) -> Reply:
    """Return a client's reply."""
    if isinstance(request, DescribeRequest):
        return client.describe(request)
    if isinstance(request, EvaluateRequest):
        return client.evaluate(request)
    return _train(client, state, node_id, request)


def _train(
    client: SplitClient, state: RunState, node_id: int, request: ForwardRequest | BackwardRequest
) -> Activations | Gradients:
    order = request.order
    classes = None if order.class_counts is None else order.class_counts.tobytes()
    # with the weights' version: a process may hold a graph whose backward pass went to another process
    work = (request.weights.version, order.seed, order.epoch, order.step, order.start, order.count, classes)
    if isinstance(request, BackwardRequest):
        graph = state.graphs.pop(node_id, work)
        if graph is None:  # another process ran the forward pass, or its graph had to make room
            graph = client.run_forward(ForwardRequest(order, request.weights, request.config))
        return client.run_backward(request, graph)
    graph = client.run_forward(request)
    state.graphs.put(node_id, work, graph)
    return Activations(graph.activations, graph.labels, order.step)
