"""``split_client_app``: a Flower ClientApp whose handlers route messages to a ``SplitClient``."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from psl_flower.client.client import SplitClient
from psl_flower.client.process import RunState, run_state
from psl_flower.devices import pick_device
from psl_flower.errors import ConfigError
from psl_flower.exchange.codec import decode_request, encode_reply
from psl_flower.protocol import (
    BACKWARD,
    DESCRIBE,
    EVALUATE,
    FORWARD,
    Activations,
    BackwardRequest,
    Config,
    DescribeRequest,
    EvaluateRequest,
    ForwardRequest,
    Gradients,
    Reply,
)
from psl_flower.split import check_client_half, cut_model


@dataclass(frozen=True)
class ClientRecipe:
    """All that is needed to build a client in any process."""

    model_fn: Callable[..., Any]
    cut: str | Callable[..., str] | None
    data_fn: Callable[..., Any]
    device: str
    client_class: Callable[..., SplitClient]


def split_client_app(
    model_fn: Callable[..., Any],
    *,
    cut: str | Callable[..., str] | None = None,
    data_fn: Callable[..., Any],
    device: str = "auto",
    client_class: Callable[..., SplitClient] = SplitClient,
    mods: list[Any] | None = None,
) -> ClientApp:
    """Make the ClientApp of a split-learning run.

    Parameters
    ----------
    model_fn : callable
        ``model_fn()`` or ``model_fn(context)`` returns the model the server trains, an ``nn.Module`` or a `SplitModel`.
        Its initial weights do not matter. It is given `context` if it has a parameter without a default.
    cut : str or callable, optional
        Qualified name of the first server-side submodule, the server's; ``cut(context)``, if it is callable. None for a
        `SplitModel`.
    data_fn : callable
        ``data_fn(context)`` or ``data_fn(context, config)`` returns the client's training data, a map-style dataset of
        (input, label), or a pair (training data, test data). `config` is the strategy's `train_config`. Called once a
        client and process, not once a message.
    device : str
        "auto" (the first GPU if there is one) or a torch device.
    client_class : callable
        A subclass of `SplitClient`, to make batches or run the forward pass another way.
    mods : list, optional
        Flower mods around every handler.

    Returns
    -------
    ClientApp
        With handlers for ``query.describe``, ``train.forward``, ``train.backward`` and ``evaluate.forward``.
    """
    for function, name in ((model_fn, "model_fn"), (data_fn, "data_fn"), (client_class, "client_class")):
        if not callable(function):
            raise ConfigError(f"{name} must be callable, got {function!r:.80}")
    recipe = ClientRecipe(model_fn, cut, data_fn, str(device), client_class)
    app = ClientApp()

    # The decorators take the action; the closures hold nothing but the recipe (see Note [Process state] in process.py).
    @app.query(_action(DESCRIBE), mods=mods)
    def describe(message: Message, context: Context) -> Message:
        return serve(recipe, message, context)

    @app.train(_action(FORWARD), mods=mods)
    def forward(message: Message, context: Context) -> Message:
        return serve(recipe, message, context)

    @app.train(_action(BACKWARD), mods=mods)
    def backward(message: Message, context: Context) -> Message:
        return serve(recipe, message, context)

    @app.evaluate(_action(EVALUATE), mods=mods)
    def evaluate(message: Message, context: Context) -> Message:
        return serve(recipe, message, context)

    return app


def serve(recipe: ClientRecipe, message: Message, context: Context) -> Message:
    """Answer one message of the server."""
    begin = time.monotonic()
    request = decode_request(message.metadata.message_type, message.content)
    if isinstance(request, ForwardRequest) and request.delay:
        time.sleep(request.delay)  # a simulated straggler
    state = run_state(context.run_id)
    client = _client(recipe, state, context, request.config)
    reply: Reply
    if isinstance(request, DescribeRequest):
        reply = client.describe(request)
    elif isinstance(request, EvaluateRequest):
        reply = client.evaluate(request)
    else:
        reply = _train(client, state, context.node_id, request)
    return Message(encode_reply(reply, time.monotonic() - begin), reply_to=message)


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


def _client(recipe: ClientRecipe, state: RunState, context: Context, config: Config) -> SplitClient:
    key = (context.node_id, tuple(sorted((name, str(value)) for name, value in config.items())))
    if key not in state.clients:
        if state.half is None:
            cut = _call(recipe.cut, context) if callable(recipe.cut) else recipe.cut
            state.half = cut_model(_call(recipe.model_fn, context), cut).client
            check_client_half(state.half)
        data = _call(recipe.data_fn, context, config)
        train, test = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
        partition = context.node_config.get("partition-id")
        if partition is not None and type(partition) is not int:
            raise ConfigError(f"partition-id must be a whole number, got {partition!r}")
        state.clients[key] = recipe.client_class(
            state.half, train, test, partition_id=partition, config=config, device=pick_device(recipe.device)
        )
    return state.clients[key]


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` with as many of `arguments` as it requires; parameters with a default keep it."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some callables written in C do not tell
        return function()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(p.kind in positional and p.default is p.empty for p in parameters)
    return function(*arguments[:required])


def _action(message_type: str) -> str:
    return message_type.split(".")[1]
