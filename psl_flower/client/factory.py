"""How a client is built, in any process: from the factory the ClientApp holds and a node's context."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.app import Context

from psl_flower.client.client import SplitClient
from psl_flower.client.defending import (
    changes_labels,
    check_defences,
    check_private,
    introduce,
    told_labels,
    warn_of_sums,
)
from psl_flower.client.part import ClientPart, LossFn
from psl_flower.client.process import RunState
from psl_flower.data import open_data
from psl_flower.devices import generators, pick_device
from psl_flower.errors import ConfigError, PSLError
from psl_flower.methods import SplitMethod, make_method
from psl_flower.origin import RAISED, let_signals_end, where
from psl_flower.privacy import DPSGD, LabelNoise, SecureAggregation, secure_options
from psl_flower.privacy.defences import Defence
from psl_flower.protocol import Config
from psl_flower.split import check_client_half, cut_model, signature

_NODE_CONFIG = 'start it with --node-config "partition-id=0 num-partitions=2", each node with a partition of its own'


@dataclass(frozen=True)
class ClientFactory:
    """All that is needed to build a client in any process."""

    model_fn: Callable[..., Any]
    cut: str | Callable[..., str] | None
    tail: str | Callable[..., str | None] | None
    data_fn: Callable[..., Any]
    device: str
    client_class: Callable[..., SplitClient]
    method: SplitMethod | Callable[..., str]
    target: str
    collate_fn: Callable[[list[Any]], Any] | None
    loss: LossFn
    optimizer: Callable[..., Any] | None = None
    label_noise: LabelNoise | Callable[..., LabelNoise | None] | None = None
    secure: SecureAggregation | Callable[..., SecureAggregation | bool] | None = None
    defences: Sequence[Defence] | Callable[..., Sequence[Defence]] = ()
    private: DPSGD | Callable[..., DPSGD | None] | None = None
    on_predict: Callable[..., Any] | None = None


def method_of(factory: ClientFactory, state: RunState, context: Context) -> SplitMethod:
    """Return the way of splitting in a run."""
    if isinstance(factory.method, SplitMethod):
        return factory.method
    if state.method is None:
        state.method = make_method(_call(factory.method, context=context))
    return state.method


class NotBuiltError(PSLError):
    """A client could not be built; the reason is its cause."""

    def __init__(self, partition_id: Any) -> None:
        super().__init__("the client could not be built")
        self.partition_id = partition_id if type(partition_id) is int else None


def make_client(factory: ClientFactory, state: RunState, context: Context, config: Config) -> SplitClient:
    """Return the client of a node, built at its first request and kept.

    Raises
    ------
    NotBuiltError
        If the user's code, or what it returns, does not allow it.
    """
    key = (context.node_id, tuple(sorted((name, str(value)) for name, value in config.items())))
    if key not in state.clients:
        # a server that sends another configuration every time shall not fill the memory
        for old in [other for other in state.clients if other[0] == context.node_id][:-1]:
            del state.clients[old]
        try:
            state.clients[key] = _build(factory, state, context, config)
        except RAISED as error:
            let_signals_end(error)
            raise NotBuiltError(context.node_config.get("partition-id")) from _explained(error, context)
    return state.clients[key]


def _explained(error: BaseException, context: Context) -> BaseException:
    """Return an error with the remedy, where a deployment's nodes lack what the simulation gives them."""
    if not isinstance(error, KeyError) or error.args not in (("partition-id",), ("num-partitions",)):
        return error
    explained = ConfigError(f"{where(error)} is not in the configuration of this node: {_NODE_CONFIG}")
    explained.__cause__ = error
    return explained


def _build(factory: ClientFactory, state: RunState, context: Context, config: Config) -> SplitClient:
    if state.parts is None:
        cut = _call(factory.cut, context=context) if callable(factory.cut) else factory.cut
        tail = _call(factory.tail, context=context) if callable(factory.tail) else factory.tail
        halves = cut_model(_built(factory.model_fn, context), cut, tail)
        method = method_of(factory, state, context)
        parts = method.assign(halves.parts)
        mine = {name: parts[name] for name in method.client_parts()}
        for part in mine.values():
            check_client_half(part)
        device = pick_device(factory.device)
        noise = factory.label_noise
        state.label_noise = _call(noise, context=context) if callable(noise) else noise
        secure = _call(factory.secure, context=context) if callable(factory.secure) else factory.secure
        state.secure = secure_options(secure)
        defences = _call(factory.defences, context=context) if callable(factory.defences) else factory.defences
        state.defences = check_defences(defences, method)
        if state.secure is None:
            warn_of_sums(state.defences)
        state.private = _call(factory.private, context=context) if callable(factory.private) else factory.private
        check_private(state.private, method, state.defences, state.secure)
        state.signature, state.loss = json.dumps(signature(halves)), factory.loss
        state.parts = {name: ClientPart(name, part, device) for name, part in mine.items()}
    if factory.optimizer is not None:
        state.own.make_optimizer[context.node_id] = _with_context(factory.optimizer, context)
    data = _call(factory.data_fn, context=context, config=config)
    train, test = open_data(data, target=factory.target, collate_fn=factory.collate_fn)
    partition = context.node_config.get("partition-id")
    if partition is not None and type(partition) is not int:
        raise ConfigError(f"partition-id must be a whole number, got {partition!r}: {_NODE_CONFIG}")
    client = factory.client_class(train, test, partition_id=partition, config=config)
    client.secret = partial(state.secret, context.node_id)
    if (on_predict := factory.on_predict) is not None:
        client.on_predict = lambda outputs, rows: on_predict(outputs, rows, context)
    introduce(state.defences, client, state.secret(context.node_id))
    if any(map(changes_labels, state.defences)):
        client.told_labels = lambda labels, examples: told_labels(
            state.defences, state.secret(context.node_id), labels, examples, test=False
        )
    return client


def _built(model_fn: Callable[..., Any], context: Context) -> Any:
    """Return the user's model. What it draws, or seeds, is not seen in the numbers that others of the process draw."""
    back = generators()
    try:
        return _call(model_fn, context=context)
    finally:
        back()


def _with_context(function: Callable[..., Any], context: Context) -> Callable[..., Any]:
    """Return a function of one argument less, if it wants the context."""
    return partial(function, context=context) if "context" in inspect.signature(function).parameters else function


def _call(function: Callable[..., Any], **offered: Any) -> Any:
    """Call `function` with what it asks for of `offered`.

    Parameters without a default get the offered values in order, whatever their names; one with a default gets the
    value of its name, or keeps its default. So a model class with options is as good a `model_fn` as a function of
    `context`.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some callables written in C do not tell
        return function()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(p.kind in positional and p.default is p.empty for p in parameters)
    given = dict(list(offered.items())[:required])
    optional = [p for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.default is not p.empty]
    named = {p.name: offered[p.name] for p in optional if p.name in offered and p.name not in given}
    return function(*given.values(), **named)
