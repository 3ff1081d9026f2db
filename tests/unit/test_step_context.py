"""What a method is given on the server: what its clients sent as one batch, whoever answered with whom."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from psl_flower.errors import ConfigError, LabelError, StepError
from psl_flower.exchange.validation import Validator
from psl_flower.failures import Failure, Kind
from psl_flower.methods import EACH, ROWS, SUM, SplitMethod, stage
from psl_flower.protocol import Leaf, Orders, Part, Reply, Weights
from psl_flower.strategy.attempt import Attempt, LostClientsError, TooFewError
from psl_flower.strategy.context import (
    Asking,
    EvaluationContext,
    StepContext,
)
from psl_flower.strategy.gathering import by_client, gather


class Method(SplitMethod):
    """Its stages are answered by the tests."""

    name = "test"
    parts = {"head": "client", "body": "server"}  # noqa: RUF012

    @stage(outputs={"x": ROWS, "labels": ROWS})
    def forward(self, client, batch):
        pass

    @stage(inputs={"g": ROWS}, outputs={"head": SUM}, after="forward")
    def backward(self, client, g):
        pass

    @stage(outputs={"own": EACH})
    def personal(self, client, batch):
        pass

    step = evaluate = None


def orders(*counts, **more):
    """Return the orders of clients 0, 10, 20, ..."""
    clients = 10 * np.arange(len(counts))
    return Orders(clients=clients, starts=clients * 0, counts=np.array(counts), step=4, **more)


def rows_of(some):
    """Return rows that name client and place: 20, 21, ... for client 20."""
    return torch.cat([torch.arange(n) + c for c, n in zip(some.clients.tolist(), some.counts.tolist(), strict=True)])


class Clients:
    """Answer in groups; `wrong` says which clients fail in which exchange (0-based)."""

    def __init__(self, groups, wrong=None):
        self.groups, self.wrong, self.asked = groups, wrong or {}, []

    def exchange(self, request):
        failing = self.wrong.get(len(self.asked), set()) & set(request.nodes)
        self.asked.append((request.stage, request.nodes))
        reply = Reply(failures={node: Failure(Kind.RAISED, "no") for node in failing})
        for group in self.groups:
            here = [i for i, node in enumerate(request.nodes) if node in group and node not in failing]
            if not here:
                continue
            part = request.take(sorted(here, key=lambda i: group.index(request.nodes[i])))
            rows = rows_of(part.orders)
            if request.stage == "forward":
                outputs = {"x": Leaf(ROWS, rows.double()), "labels": Leaf(ROWS, rows)}
            elif request.stage == "backward":
                outputs = {"head": Leaf(SUM, {"w": part.inputs["g"].value.sum()[None], "u": None})}
            else:
                outputs = {"own": Leaf(EACH, [torch.tensor([node]) for node in part.nodes])}
            reply.parts.append(Part(part.nodes, outputs, 4, np.array(part.nodes) + 1))
        return reply


GROUPS = [(30, 0), (20,), (10,)]


def context(clients, *counts, enough=1, kind=StepContext, refused=None, separate=False):
    backend = SimpleNamespace(
        precision="full",
        weights=lambda: {
            "head": Weights({"w": torch.zeros(1, dtype=torch.float64), "u": torch.zeros(2)}, {}, "v", "c")
        },
    )
    asking = Asking(
        exchange=clients.exchange,
        validator=Validator(),
        separate=separate,
        refuse=lambda failures, of, stage: (refused if refused is not None else []).append((set(failures), of, stage)),
    )
    chosen = orders(*counts, test=kind is EvaluationContext)
    more = {"enough": enough, "attempt": Attempt(chosen)} if kind is StepContext else {}
    return kind(Method(), backend, asking, chosen, seed=0, **more)


# --- one batch -------------------------------------------------------------------------------------------------------
def test_rows_come_in_ascending_client_whoever_answered_with_whom():
    ctx = context(Clients(GROUPS), 2, 1, 3, 2)
    sent = ctx.call(Method.forward)
    assert sent.labels.tolist() == [0, 1, 10, 20, 21, 22, 30, 31]
    assert sent.x.tolist() == sent.labels.tolist()


def test_rows_go_back_to_whom_they_came_from_and_sums_add_up():
    clients = Clients(GROUPS)
    ctx = context(clients, 2, 1, 3, 2)
    x = ctx.call(Method.forward).x
    assert ctx.call(Method.backward, g=x).head["w"].item() == x.sum()
    assert clients.asked == [("forward", (0, 10, 20, 30)), ("backward", (0, 10, 20, 30))]


def test_what_is_each_clients_comes_in_ascending_client():
    assert torch.cat(context(Clients(GROUPS), 2, 1, 3, 2).call(Method.personal).own).tolist() == [0, 10, 20, 30]


def test_a_sum_without_anything_is_none():
    parts = [Part((0,), {"head": Leaf(SUM, None)}), Part((10,), {"head": Leaf(SUM, None)})]
    assert gather(Method.backward.stage, parts, orders(1, 1), orders(1, 1), None).head is None


def test_what_a_stage_takes_is_looked_at():
    ctx = context(Clients(GROUPS), 2, 1)
    with pytest.raises(ConfigError, match="stage 'backward' takes g, got h"):
        ctx.call(Method.backward, h=None)
    with pytest.raises(AttributeError, match="no part 'head' on the server"):
        _ = ctx.head


# --- clients that fail -----------------------------------------------------------------------------------------------
def test_who_fails_first_is_not_in_the_step():
    refused = []
    ctx = context(Clients(GROUPS, {0: {0, 10}}), 2, 1, 3, 2, refused=refused)
    assert ctx.call(Method.forward).labels.tolist() == [20, 21, 22, 30, 31]
    assert ctx.clients == [20, 30]
    assert refused == [({0, 10}, 4, "forward")]
    assert ctx._attempt.lost.keys() == {0, 10}


def test_too_few_examples_are_no_step():
    with pytest.raises(TooFewError):
        context(Clients(GROUPS, {0: {0, 20}}), 2, 1, 3, 2, enough=4).call(Method.forward)
    with pytest.raises(TooFewError):
        context(Clients(GROUPS, {0: {0, 10, 20, 30}}), 2, 1, 3, 2, enough=0).call(Method.forward)


def test_who_fails_later_is_asked_once_more():
    clients, refused = Clients(GROUPS, {1: {10, 20}}), []
    ctx = context(clients, 2, 1, 3, 2, refused=refused)
    x = ctx.call(Method.forward).x
    assert ctx.call(Method.backward, g=x).head["w"].item() == x.sum()
    assert clients.asked[1:] == [("backward", (0, 10, 20, 30)), ("backward", (10, 20))]
    assert refused[0] == ({10, 20}, 4, "backward")


def test_a_step_is_made_again_without_those_that_are_lost_from_it():
    clients = Clients(GROUPS, {1: {20}, 2: {20}})
    ctx = context(clients, 2, 1, 3, 2)
    x = ctx.call(Method.forward).x
    with pytest.raises(LostClientsError) as lost:
        ctx.call(Method.backward, g=x)
    assert lost.value.failures.keys() == {20}
    ctx.without(lost.value.failures)
    x = ctx.call(Method.forward).x  # nobody is asked again for what was sent already
    assert x.tolist() == [0, 1, 10, 30, 31]
    assert ctx.call(Method.backward, g=x).head["w"].item() == x.sum()
    assert [stage for stage, _ in clients.asked] == ["forward", "backward", "backward", "backward"]


def test_the_batches_of_a_step_must_be_the_same_from_its_first_request_on():
    clients, seen = Clients(GROUPS), []
    ctx = context(clients, 2, 1, 3, 2)
    x = ctx.call(Method.forward).x
    answer = clients.exchange
    ctx._asking = Asking(
        exchange=lambda request: (seen.append(request.orders.checksums.tolist()), answer(request))[1],
        validator=Validator(),
        refuse=lambda *_: None,
    )
    ctx.call(Method.backward, g=x)
    assert seen == [[1, 11, 21, 31]]


def test_evaluation_goes_on_without_those_that_fail():
    ctx = context(Clients(GROUPS, {0: {0, 30}}), 2, 1, 3, 2, kind=EvaluationContext)
    assert ctx.call(Method.forward).labels.tolist() == [10, 20, 21, 22]
    assert ctx.lost.keys() == {0, 30}
    with pytest.raises(TooFewError):
        context(Clients(GROUPS, {0: {0, 10}}), 2, 1, kind=EvaluationContext).call(Method.forward)


# --- wrong labels ----------------------------------------------------------------------------------------------------
def test_wrong_rows_are_those_of_their_clients():
    failures = by_client(LabelError("labels must be so", [0, 2, 5, 4]), orders(2, 1, 3, 2))
    assert failures == dict.fromkeys((0, 10, 20), Failure(Kind.LABELS, "labels must be so"))


def test_wrong_labels_that_are_nobodys_end_the_step():
    with pytest.raises(StepError, match="labels must be so"):
        by_client(LabelError("labels must be so"), orders(2, 1))
