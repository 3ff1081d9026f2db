"""A process's answers to the requests of a stream: for all its clients of a step at once where that is the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from psl_flower.client.client import SplitClient
from psl_flower.client.joint import CannotJoinError, joint_evaluate, joint_forward
from psl_flower.client.process import RunState
from psl_flower.client.serving import answer
from psl_flower.client.worker import Graph
from psl_flower.exchange.streams.groups import Group, GroupReply, Part
from psl_flower.protocol import BACKWARD, EVALUATE, FORWARD, Activations, Config, Gradients, Reply

log = logging.getLogger("flwr.psl_flower")

T = TypeVar("T")

MakeClient = Callable[[int, Config], SplitClient]


class GroupServer:
    """Answers groups of requests; one for each stream.

    Parameters
    ----------
    state : RunState
        The process's.
    make_client : callable
        Takes a node id and the configuration; returns the client, the same one each time.
    """

    def __init__(self, state: RunState, make_client: MakeClient) -> None:
        self._state, self._make_client = state, make_client
        self._verified: set[str] = set()
        self._one_at_a_time = False
        self._step: Hashable = None
        self._graphs: dict[Hashable, Graph] = {}  # of joint passes of one step, whose backward pass is still to come

    def answer(self, group: Group) -> GroupReply:
        """Return the reply to a group; what goes wrong for a client is its own failure, never raised."""
        if any(group.delays):
            time.sleep(max(group.delays))  # simulated stragglers wait side by side
        begin = time.monotonic()
        clients, failures = self._clients(group)
        if not clients:
            return GroupReply([], failures)
        group = _without(group, failures)
        parts = self._joint(group, clients)
        if parts is None:
            parts, more = self._singly(group, clients)
            failures |= more
        return GroupReply(parts, failures, _shares(group, time.monotonic() - begin))

    def _clients(self, group: Group) -> tuple[dict[int, SplitClient], dict[int, str]]:
        clients, failures = {}, {}
        for node in group.nodes:
            try:
                clients[node] = self._make_client(node, group.config)
            except Exception as exc:  # the user's code: the server learns what happened
                failures[node] = _told(exc)
        return clients, failures

    # --- all at once -------------------------------------------------------------------------------------------------
    def _joint(self, group: Group, clients: Mapping[int, SplitClient]) -> list[Part] | None:
        """Return one part for all clients, or None if they must be served one at a time."""
        if self._one_at_a_time or len(group.nodes) < 2 or group.what not in (FORWARD, BACKWARD, EVALUATE):
            return None
        try:
            return [Part(group.nodes, self._joint_reply(group, [clients[node] for node in group.nodes]))]
        except CannotJoinError as reason:
            if reason.lasting:
                self._one_at_a_time = True
                log.info("Clients of this process run one at a time: %s.", reason)
        except Exception as exc:  # one client's fault: serving each by itself tells whose
            log.debug("A joint pass failed: %s", _told(exc))
        return None

    def _joint_reply(self, group: Group, clients: Sequence[SplitClient]) -> Reply:
        if group.what == EVALUATE:
            graph = self._evaluate(group, clients)
            return Activations(graph.activations, graph.labels)
        key = _work(group)
        if group.what == FORWARD:
            graph = self._forward(group, clients)
            order = group.orders[0]
            step = (group.need_weights().version, order.seed, order.epoch, order.step)
            if step != self._step:
                self._step, self._graphs = step, {}
            self._graphs[key] = graph
            return Activations(graph.activations, graph.labels, order.step)
        if group.separate:
            raise CannotJoinError("each client's gradients are asked for", lasting=False)
        # absent if the forward pass ran in another process, which is gone, or for another set of clients
        graph = self._graphs.pop(key) if key in self._graphs else self._forward(group, clients)
        gradients, unused = graph.backward(group.joined_gradients())
        if not all(bool(torch.isfinite(g.sum())) for g in gradients.values()):
            raise CannotJoinError("the sum is not finite: the server shall see whose it is", lasting=False)
        return Gradients(gradients, unused, group.orders[0].step)

    def _forward(self, group: Group, clients: Sequence[SplitClient]) -> Graph:
        return self._verify(
            "training", lambda verify: joint_forward(clients, group.orders, group.need_weights(), verify=verify)
        )

    def _evaluate(self, group: Group, clients: Sequence[SplitClient]) -> Graph:
        for client, (start, count) in zip(clients, group.slices, strict=True):
            if client.test is None or not 0 <= start < start + count <= len(client.test):
                raise CannotJoinError("a client does not have the test data asked for", lasting=False)
        rows = [np.arange(start, start + count) for start, count in group.slices]
        return self._verify(
            "evaluation", lambda verify: joint_evaluate(clients, rows, group.need_weights(), verify=verify)
        )

    def _verify(self, mode: str, run: Callable[[bool], Graph]) -> Graph:
        graph = run(mode not in self._verified)
        self._verified.add(mode)
        return graph

    # --- one at a time -----------------------------------------------------------------------------------------------
    def _singly(self, group: Group, clients: Mapping[int, SplitClient]) -> tuple[list[Part], dict[int, str]]:
        parts, failures = [], {}
        for node, request in zip(group.nodes, group.requests(), strict=True):
            try:
                parts.append(Part((node,), answer(clients[node], self._state, node, request)))
            except Exception as exc:  # the user's code: the server learns what happened
                failures[node] = _told(exc)
        if group.what == BACKWARD and not group.separate and len(parts) > 1:
            return _summed(parts), failures
        return parts, failures


def _work(group: Group) -> Hashable:
    """Return what tells a joint pass from every other."""
    orders = [
        (o.client, o.start, o.count, None if o.class_counts is None else o.class_counts.tobytes()) for o in group.orders
    ]
    first = group.orders[0]
    return (group.need_weights().version, first.seed, first.epoch, first.step, group.nodes, tuple(orders))


def _summed(parts: list[Part]) -> list[Part]:
    """Return clients' gradients as their sum, or as they are if it is not finite: the server shall see whose it is."""
    total: dict[str, Tensor] = {}
    replies = [part.reply for part in parts if isinstance(part.reply, Gradients)]
    for reply in replies:
        for name, gradient in reply.tensors.items():
            total[name] = total[name] + gradient if name in total else gradient
    if not all(bool(torch.isfinite(gradient.sum())) for gradient in total.values()):
        return parts
    unused = tuple(name for name in replies[0].unused if name not in total)
    return [Part(tuple(node for part in parts for node in part.nodes), Gradients(total, unused, replies[0].step))]


def _shares(group: Group, seconds: float) -> dict[int, float]:
    """Return how long each client worked: its simulated delay, and its share by examples of what all took together."""
    counts = group.counts() or [1] * len(group.nodes)
    delays = group.delays or [0.0] * len(counts)
    total = sum(counts) or 1
    return {
        node: delay + seconds * count / total for node, count, delay in zip(group.nodes, counts, delays, strict=True)
    }


def _without(group: Group, failures: Mapping[int, str]) -> Group:
    """Return the group without some nodes."""
    if not failures:
        return group
    kept = [i for i, node in enumerate(group.nodes) if node not in failures]

    def some(values: Sequence[T]) -> tuple[T, ...]:
        return tuple(values[i] for i in kept) if values else ()

    gradients: tuple[tuple[Tensor, ...] | None, ...] = ()
    if group.gradients:
        gradients = tuple(
            None if whole is None else some(torch.split(whole, group.counts())) for whole in group.joined_gradients()
        )
    return Group(
        what=group.what,
        nodes=some(group.nodes),
        config=group.config,
        evaluate_config=group.evaluate_config,
        weights=group.weights,
        orders=some(group.orders),
        delays=some(group.delays),
        gradients=gradients,
        slices=some(group.slices),
        label_counts=group.label_counts,
        separate=group.separate,
    )


def _told(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"
