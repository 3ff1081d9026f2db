"""``split_client_app``: a Flower ClientApp whose handlers route messages to a ``SplitClient``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy

from psl_flower.client.client import SplitClient
from psl_flower.client.defending import check_defences, check_private
from psl_flower.client.factory import ClientFactory, make_client, method_of
from psl_flower.client.keeping import (
    keep,
    keep_own,
    keep_weights,
    restore,
    restore_weights,
    take_own,
    warn_of_processes,
)
from psl_flower.client.part import LossFn
from psl_flower.client.process import run_state
from psl_flower.client.runtime import answer
from psl_flower.client.stream import attach_stream
from psl_flower.data import check_data_fn
from psl_flower.data.telling import tell_once
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.exchange.codec import KEEP, ForgottenError, decode_request, encode_reply
from psl_flower.exchange.fields import nodes_of
from psl_flower.exchange.frames import Frame
from psl_flower.exchange.limits import MAX_TEXT
from psl_flower.exchange.records import content_to_frame, frame_to_content
from psl_flower.flower import ERROR_CLIENT_APP
from psl_flower.methods import METHODS, SplitMethod, make_method
from psl_flower.privacy import DPSGD, LabelNoise, SecureAggregation, secure_options
from psl_flower.privacy.defences import Defence
from psl_flower.protocol import ATTACH, DESCRIBE, REFUSED, Config, Reply, Request
from psl_flower.server import Loss, check_loss

log = logging.getLogger("flwr.psl_flower")


def split_client_app(
    model_fn: Callable[..., Any],
    *,
    cut: str | Callable[..., str] | None = None,
    tail: str | Callable[..., str | None] | None = None,
    data_fn: Callable[..., Any],
    target: str = "label",
    collate_fn: Callable[[list[Any]], Any] | None = None,
    device: str = "auto",
    client_class: Callable[..., SplitClient] = SplitClient,
    method: str | SplitMethod | Callable[..., str] | None = None,
    loss: Loss = cross_entropy,
    classification: bool = True,
    optimizer: Callable[..., Any] | None = None,
    secure_aggregation: SecureAggregation | bool | Callable[..., SecureAggregation | bool] = False,
    label_noise: LabelNoise | Callable[..., LabelNoise | None] | None = None,
    defences: Sequence[Defence] | Callable[..., Sequence[Defence]] = (),
    private: DPSGD | Callable[..., DPSGD | None] | None = None,
    on_predict: Callable[..., Any] | None = None,
    mods: list[Any] | None = None,
) -> ClientApp:
    """Make the ClientApp of a split-learning run.

    Parameters
    ----------
    model_fn : callable
        ``model_fn()`` or ``model_fn(context)`` returns the model the server trains, an ``nn.Module`` or a `SplitModel`.
        Its initial weights do not matter. It is given `context` if it has a parameter without a default, or of that
        name.
    cut : str or callable, optional
        Qualified name of the first server-side submodule, or a `Cut`, as on the server; ``cut(context)``, if it is
        callable. None for a `SplitModel`.
    tail : str or callable, optional
        Qualified name of the first submodule that is back on the client, the server's, for a U shape.
    data_fn : callable
        ``data_fn(context)`` or ``data_fn(context, config)`` returns the client's training data, or a pair (training
        data, test data): map-style datasets, tensors (x, y), or data loaders, whose dataset and collate_fn are used.
        `config` is the strategy's `train_config`. Called once a client and process, not once a message.
    target : str
        The name of the label in rows that are dicts (default: "label", then "labels"); "input": inputs are the target.
    collate_fn : callable, optional
        Makes a batch of a list of rows, as in a `DataLoader`.
    device : str
        "auto" (the first GPU if there is one) or a torch device.
    client_class : callable
        A subclass of `SplitClient`, to make batches or run the forward pass another way.
    method : str, SplitMethod or callable, optional
        The way of splitting, or ``method(context)``, which names it; the clients answer its stages and no others.
        Default: "parallel", or with a `tail` "u-shaped".
    loss, classification
        As in `ParallelSplitLearning`, for methods that leave labels and loss with the clients; others do not use them.
    optimizer : callable, optional
        ``optimizer(parameters)`` or ``optimizer(parameters, context)`` returns a torch optimizer: for methods whose
        clients train parts of their own (SplitFed), which begin each round with a new one. Its learning rate follows
        the schedule of the strategy's. Usually the same function as the strategy's `optimizer`.
    secure_aggregation : bool, SecureAggregation or callable
        Whether the client's sums (parameter gradients, and in a U shape loss and score) leave it masked only, so that
        the server sees those of all clients together; ``secure_aggregation(context)``, if it is callable. The strategy
        needs the same.
    label_noise : LabelNoise or callable, optional
        For methods that leave labels with the clients: how a client that is asked for the counts of its classes tells
        them; ``label_noise(context)``, if it is callable. None: it does not.
    defences : sequence of Defence or callable
        What the client does to what leaves it, one after the other: noise on activations, labels told with chance, ...,
        see `psl_flower.privacy.defences`; ``defences(context)``, if it is callable. The server need not know.
    private : DPSGD or callable, optional
        Differential privacy of the model, as in `ParallelSplitLearning`; ``private(context)``, if it is callable.
    on_predict : callable, optional
        ``on_predict(outputs, rows, context)``, for a U shape, where the model's outputs are the clients': told in
        `ParallelSplitLearning.predict` of the outputs for some test examples, and of their places there, (n,) int64.
        What it returns goes to the server, a row an example; None: nothing does. A batch may come twice.
    mods : list, optional
        Flower mods around every handler.

    Returns
    -------
    ClientApp
        With handlers for ``query.describe``, for each stage of the method (``train.forward``, ``evaluate.forward``,
        ...), and for ``train.attach``, which opens a stream that carries the same requests.
    """
    functions: dict[str, Any] = {"model_fn": model_fn, "data_fn": data_fn, "client_class": client_class}
    for name, function in functions.items():
        if not callable(function):
            raise ConfigError(f"{name} must be callable, got {function!r:.80}")
    check_loss(loss)
    check_data_fn(data_fn)
    if isinstance(method, SplitMethod) or not callable(method):
        method = make_method(method, None if callable(tail) else tail)
    if isinstance(method, SplitMethod) and method.trains_on_clients() and not callable(optimizer):
        raise ConfigError(
            f"with method {method.name!r} clients train a part of the model: pass split_client_app(..., optimizer="
            f"lambda parameters: torch.optim.SGD(parameters, lr=0.1)), got {optimizer!r:.80}"
        )
    if loss is not cross_entropy and tail is None and isinstance(method, SplitMethod) and method.sends_labels():
        tell_once(
            f"split_client_app is given a loss, which clients do not use with method {method.name!r}: the server's "
            "counts, ParallelSplitLearning(..., loss=...)"
        )
    if on_predict is not None and (
        not callable(on_predict) or (isinstance(method, SplitMethod) and method.sends_labels())
    ):
        raise ConfigError(
            "on_predict must be a function of (outputs, rows, context), for a model with a tail: without a tail the "
            f"server has the outputs, and ParallelSplitLearning.predict returns them; got {on_predict!r:.80}"
        )
    if not callable(defences):
        defences = check_defences(defences, method if isinstance(method, SplitMethod) else None)
    secure = secure_aggregation if callable(secure_aggregation) else secure_options(secure_aggregation)
    if not callable(private) and isinstance(method, SplitMethod):
        check_private(private, method, () if callable(defences) else defences, None if callable(secure) else secure)
    factory = ClientFactory(
        model_fn,
        cut,
        tail,
        data_fn,
        str(device),
        client_class,
        method,
        target,
        collate_fn,
        LossFn(loss, classification),
        optimizer,
        label_noise,
        secure,
        defences,
        private,
        on_predict,
    )
    app = ClientApp()

    # The handlers hold nothing but the factory (see Note [Process state] in process.py).
    app.query(DESCRIBE, mods=mods)(partial(serve, factory))
    # where the method is not known yet, its client refuses what is not its own
    methods = [method] if isinstance(method, SplitMethod) else METHODS.values()
    for stage in {name for each in methods for name in each.stages()}:
        app.train(stage, mods=mods)(partial(serve, factory))
        app.evaluate(stage, mods=mods)(partial(serve, factory))
    app.query(REFUSED, mods=mods)(hear_refusal)
    app.train(ATTACH.removeprefix("train."), mods=mods)(partial(attach_stream, factory))
    return app


def hear_refusal(message: Message, context: Context) -> Message:
    """Log why the server does not let this node in."""
    reason = message.content.config_records.get(REFUSED, ConfigRecord()).get("reason", "it gives no reason")
    log.warning("The server does not let node %d in: %s", context.node_id, str(reason)[:MAX_TEXT])
    return Message(RecordDict(), reply_to=message)


def serve(factory: ClientFactory, message: Message, context: Context) -> Message:
    """Answer one message of the server; with an error, if it is none."""
    state = run_state(context.run_id)
    try:
        frame = content_to_frame(message.content)
        try:
            number, wire_dtype, request = decode_request(frame, state.weights)
        except ForgottenError:  # that is what a process knows when it is new
            restore_weights(state, context)
            try:
                number, wire_dtype, request = decode_request(frame, state.weights)
            except ForgottenError as error:
                return _forgotten(message, frame, error)
        if len(request.nodes) != 1:
            raise ProtocolError(f"a message is for one client, this one names {len(request.nodes)}")
    except ProtocolError as error:
        state.refusals.add(f"node {context.node_id}", error)
        return Message(Error(ERROR_CLIENT_APP, f"refused: {error}"), reply_to=message)

    method = method_of(factory, state, context)

    def client(node: int, config: Config) -> SplitClient:
        made = make_client(factory, state, context, config)
        if method.trains_on_clients():
            take_own(state, context)
        return made

    restore(state, context)
    if frame.header.get(KEEP) is True:
        keep_weights(state, context)
    reply = answer(method, state, client, replace(request, nodes=(context.node_id,)))
    keep(state, context)
    warn_of_processes(state, context)
    stage = method.stages().get(request.stage)
    if stage is not None and (stage.own or not stage.batch):
        keep_own(state, context)
    reply = reply.renamed({context.node_id: request.nodes[0]})
    return Message(frame_to_content(encode_reply(number, reply, request, wire_dtype)), reply_to=message)


def _forgotten(message: Message, frame: Frame, error: ForgottenError) -> Message:
    """Say that the weights which a request names are not here."""
    nodes = nodes_of(frame.header)
    reply = Reply(failures=dict.fromkeys(nodes, error.failure()))
    return Message(frame_to_content(encode_reply(0, reply, Request(stage="", nodes=nodes))), reply_to=message)
