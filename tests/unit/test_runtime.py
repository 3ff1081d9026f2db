"""A process's answers: the same for several clients at once as for each by itself, on whatever process."""

import re
import signal
import sys
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from support import CUT, client_data, client_sizes, load_partition, population, tiny_resnet
from torch import nn
from torch.utils.data import TensorDataset

from psl_flower import SplitClient, split_client_app, tree
from psl_flower.client import process, runtime
from psl_flower.client.context import BoundPart
from psl_flower.client.part import ClientPart
from psl_flower.client.process import RunState, forget_runs
from psl_flower.client.runtime import answer
from psl_flower.exchange.codec import decode_reply, encode_request
from psl_flower.exchange.records import content_to_frame, frame_to_content
from psl_flower.failures import Kind
from psl_flower.flower import become_server
from psl_flower.methods import ParallelSplit
from psl_flower.protocol import DESCRIBE, Leaf, Orders, Request, Weights
from psl_flower.protocol import Kind as LeafKind
from psl_flower.samplers import LatencyBudgetedSampler
from psl_flower.split import cut_model

HALF = cut_model(tiny_resnet(), CUT).client


def weights(half=HALF, version="v1", scale=1.0):
    return {"head": Weights({n: p.detach() * scale for n, p in half.named_parameters()}, {}, version, "c")}


def orders(counts=(4,), step=0, **more):
    size = len(counts)
    fields = {"clients": np.arange(size), "starts": np.zeros(size, int), "counts": np.array(counts), "seed": 3}
    return Orders(**{**fields, "step": step, **more})


def forward_request(nodes, some_orders, held=None, **more):
    return Request(stage="forward", nodes=nodes, orders=some_orders, weights=held or weights(), **more)


def backward_request(request, activations):
    """Return the request that follows a forward pass: the gradient of the activations' sum of squares."""
    gradient = tree.map_leaves(lambda t: 2 * t, activations)
    return replace(request, stage="backward", inputs={"gradient": Leaf(LeafKind.ROWS, gradient)})


@pytest.fixture
def forwards(monkeypatch):
    """Count the passes of steps through a client half, by how many rows they had."""
    rows, forward = [], BoundPart.__call__

    def counted(self, inputs):
        rows.append(len(inputs))
        return forward(self, inputs)

    monkeypatch.setattr(BoundPart, "__call__", counted)
    return rows


@pytest.fixture(autouse=True)
def _fresh_process():
    forget_runs()
    yield
    forget_runs()


# --- one client, by messages -----------------------------------------------------------------------------------------
CALLS = []


def model_fn():
    CALLS.append("model")
    return tiny_resnet()


def data_fn(context, config):
    CALLS.append(("data", context.node_config["partition-id"], dict(config)))
    return load_partition(context)


class Wire:
    """Sends requests to a ClientApp as Flower does."""

    def __init__(self, num_nodes=2, **options):
        become_server(1, 1)
        CALLS.clear()
        self.app = split_client_app(model_fn, cut=CUT, **{"data_fn": data_fn, **options})
        self.num_nodes = num_nodes

    def ask(self, request, partition=0, run_id=1, app=None):
        context = Context(
            run_id=run_id,
            node_id=100 + partition,
            node_config={"partition-id": partition, "num-partitions": self.num_nodes},
            state=RecordDict(),
            run_config={},
        )
        request = replace(request, nodes=(context.node_id,))
        content = frame_to_content(encode_request(request, 0, sent={})[0])
        reply = (app or self.app)(Message(content, context.node_id, request.message_type), context)
        return decode_reply(content_to_frame(reply.content), request)

    def forward(self, version="v1", scale=1.0, config=None, of=None, **where):
        request = forward_request((0,), of or orders(), weights(version=version, scale=scale), config=config or {})
        (part,) = self.ask(request, **where).parts
        return request, part

    def backward(self, sent, of=None, **where):
        request, part = sent
        request = backward_request(request, part.outputs["activations"].value)
        (reply,) = self.ask(replace(request, orders=of or request.orders), **where).parts
        return reply.outputs["head"].value


@pytest.fixture
def wire():
    return Wire()


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_the_backward_pass_goes_on_from_the_forward_pass(wire, forwards):
    wire.backward(wire.forward())
    assert forwards == [4]


def test_another_process_does_the_forward_pass_again_and_gets_the_same(wire, forwards):
    sent = wire.forward()
    here = wire.backward(sent)
    forget_runs()
    there = wire.backward(sent)
    assert len(forwards) == 2
    assert same(here, there)
    again = wire.backward(sent)  # a repeated message: what was kept is used up
    assert len(forwards) == 3
    assert same(here, again)


def test_a_pass_with_other_weights_is_never_gone_on_from(wire, forwards):
    request, part = wire.forward("v1")
    sent = (replace(request, weights=weights(version="v2", scale=2.0)), part)
    fresh = wire.backward(sent)
    assert len(forwards) == 2
    forget_runs()
    assert same(fresh, wire.backward(sent))


def test_a_pass_of_other_work_is_never_gone_on_from(wire, forwards):
    wire.forward()
    wire.backward(wire.forward(), of=orders())
    assert len(forwards) == 2
    wire.backward(wire.forward(), of=orders(step=1))
    assert len(forwards) == 4


def test_nodes_keep_their_passes_apart(wire, forwards):
    both = [wire.forward(partition=k) for k in range(2)]
    first, second = (part.outputs["activations"].value[0] for _, part in both)
    assert not torch.equal(first, second)
    replies = [wire.backward(both[k], partition=k) for k in range(2)]
    assert len(forwards) == 2
    assert not same(*replies)


def test_evaluation_between_the_passes_changes_nothing(wire):
    def load(context):
        return load_partition(context), load_partition(context)

    wire = Wire(data_fn=load)
    expected = wire.backward(wire.forward())
    sent = wire.forward()
    (part,) = wire.ask(forward_request((0,), orders(test=True))).parts
    assert not part.outputs["activations"].value[0].requires_grad
    assert same(wire.backward(sent), expected)


def test_a_full_cache_costs_time_not_results(wire, forwards, monkeypatch):
    expected = wire.backward(wire.forward())
    forget_runs()
    monkeypatch.setattr(process, "MAX_GRAPH_BYTES", 10)
    assert same(wire.backward(wire.forward()), expected)
    assert len(forwards) == 3


def test_model_and_data_are_made_once_a_client_and_process(wire):
    for _ in range(2):
        for k in range(2):
            wire.backward(wire.forward(partition=k), partition=k)
    assert CALLS.count("model") == 1  # one half for all clients of the process
    assert CALLS[1:] == [("data", 0, {}), ("data", 1, {})]


def test_another_config_makes_other_data(wire):
    for augment in (False, True, False):
        wire.forward(config={"augment": augment})
    assert [config for _, _, config in CALLS[1:]] == [{"augment": False}, {"augment": True}]


def test_runs_do_not_share_clients(wire):
    wire.forward(run_id=1)
    wire.forward(run_id=2)
    assert CALLS.count("model") == 2


def test_an_unpickled_app_finds_the_state_of_the_process(wire, forwards):
    """What the simulation does with every message: the ClientApp arrives as a copy."""
    sent = wire.forward(app=cloudpickle.loads(cloudpickle.dumps(wire.app)))
    wire.backward(sent, app=cloudpickle.loads(cloudpickle.dumps(wire.app)))
    assert forwards == [4]


def test_describe_answers_for_the_partition(wire):
    for k in range(2):
        reply = wire.ask(Request(stage=DESCRIBE, nodes=(0,), label_counts=True), partition=k)
        (description,) = reply.descriptions.values()
        assert (description.partition_id, description.num_examples) == (k, client_sizes(2)[k])
        assert description.method == "parallel"
        counts = population(2, LatencyBudgetedSampler).label_counts[k]
        assert dict(zip(description.labels, description.counts, strict=True)) == {
            c: n for c, n in enumerate(counts) if n
        }


# --- batches that are drawn again ------------------------------------------------------------------------------------
class Forgetful(TensorDataset):
    """Draws noise from a generator of its own: another at each fetch."""

    noise = np.random.default_rng(0)

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + self.noise.normal(), label

    def get_batch(self, indices):
        images, labels = zip(*(self[i] for i in indices), strict=True)
        return torch.stack(images).float(), torch.stack(labels)


def test_a_batch_that_is_another_when_it_is_drawn_again_is_refused():
    wire = Wire(data_fn=lambda context: Forgetful(*load_partition(context).tensors))
    request, part = wire.forward()
    (checksum,) = part.checksums.tolist()
    sent = (replace(request, orders=orders(checksums=np.array([checksum]))), part)
    wire.backward(sent)  # goes on from the forward pass: nothing is drawn again
    request = backward_request(sent[0], part.outputs["activations"].value)
    (failure,) = wire.ask(request).failures.values()
    assert failure.kind is Kind.RAISED
    assert "drawing the same examples of the training data twice gave different data" in failure.detail


def test_a_batch_that_is_the_same_when_it_is_drawn_again_passes(wire, forwards):
    request, part = wire.forward()
    sent = (replace(request, orders=orders(checksums=part.checksums)), part)
    expected = wire.backward(sent)
    assert same(wire.backward(sent), expected)
    assert len(forwards) == 2


def test_a_process_that_takes_a_client_over_cannot_tell_and_goes_on(wire, forwards):
    request, part = wire.forward()
    sent = (replace(request, orders=orders(checksums=part.checksums)), part)
    expected = wire.backward(sent)
    forget_runs()
    assert same(wire.backward(sent), expected)


# --- several clients at once -----------------------------------------------------------------------------------------
NODES, COUNTS = (30, 10, 20), (4, 1, 3)


class Process:
    """A process with three clients, and what they answer."""

    def __init__(self, client_class=SplitClient, half=HALF, data=lambda i: client_data(i, 3), refuse=()):
        self.state, self.half, self.refuse = RunState(), half, refuse
        self.state.parts = {"head": ClientPart("head", half, torch.device("cpu"))}
        self.clients = {node: client_class(data(i), data(i), partition_id=i) for i, node in enumerate(NODES)}

    def make_client(self, node, config):
        if node in self.refuse:
            raise FileNotFoundError("no data here")
        return self.clients[node]

    def ask(self, request):
        reply = answer(ParallelSplit(), self.state, self.make_client, request)
        assert reply.answered() == set(request.nodes)
        return reply

    def forward(self, **more):
        request = forward_request(NODES, orders(COUNTS), weights(self.half), **more)
        return request, self.ask(request)

    def backward(self, request, reply):
        """Have the clients that answered go on."""
        nodes = [node for part in reply.parts for node in part.nodes]
        values = [part.outputs["activations"].value for part in reply.parts]
        request = request.take([NODES.index(node) for node in nodes])
        return self.ask(backward_request(request, tree.join(values, "activations")))


def nodes_of(reply):
    return [part.nodes for part in reply.parts]


def singly(process, name):
    """Return what each client answers by itself, forward or backward."""
    values = []
    for i in range(3):
        request = forward_request(NODES, orders(COUNTS), weights(process.half)).take([i])
        reply = process.ask(request)
        if name == "head":
            (part,) = reply.parts
            reply = process.ask(backward_request(request, part.outputs["activations"].value))
        values.append(reply.parts[0].outputs[name].value)
    return values


def assert_sum(found, parts):
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in parts), rtol=1e-5, atol=1e-4)


def test_clients_of_a_process_are_served_in_one_pass(forwards):
    process = Process()
    request, reply = process.forward()
    sums = process.backward(request, reply)
    assert forwards == [sum(COUNTS)]
    assert nodes_of(reply) == nodes_of(sums) == [NODES]
    assert (reply.parts[0].step, reply.parts[0].outputs["labels"].exact) == (0, True)
    alone = Process()
    expected = tree.join(singly(alone, "activations"), "activations")
    torch.testing.assert_close(reply.parts[0].outputs["activations"].value, expected)
    assert torch.equal(reply.parts[0].outputs["labels"].value, torch.cat(singly(alone, "labels")))
    assert_sum(sums.parts[0].outputs["head"].value, singly(alone, "head"))


def test_each_clients_sum_comes_by_itself_on_request(forwards):
    process = Process()
    request, reply = process.forward(separate=True)
    sums = process.backward(request, reply)
    assert nodes_of(sums) == [(node,) for node in NODES]
    for part, expected in zip(sums.parts, singly(Process(), "head"), strict=True):
        for name, gradient in part.outputs["head"].value.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-4)


def test_a_backward_pass_of_fewer_clients_does_the_forward_pass_again(forwards):
    process = Process()
    request, _ = process.forward()
    fewer = request.take([0, 2])
    alone = singly(Process(), "activations")
    forwards.clear()
    reply = process.ask(backward_request(fewer, tree.join([alone[0], alone[2]], "activations")))
    assert forwards == [7]
    assert nodes_of(reply) == [(30, 20)]
    first, _, third = singly(Process(), "head")
    assert_sum(reply.parts[0].outputs["head"].value, [first, third])


class OwnForward(SplitClient):
    def forward(self, half, inputs):
        return [2 * t for t in super().forward(half, inputs)]  # a list is as good as a tuple


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 10)

    def forward(self, x):
        return nn.functional.dropout(self.linear(x.flatten(1)), 0.5, self.training)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"client_class": OwnForward}, "OwnForward has a forward pass of its own"),
        ({"half": Dropping()}, "draws random numbers"),
    ],
    ids=["own forward", "random"],
)
def test_some_are_served_one_at_a_time_from_then_on(options, why, caplog):
    caplog.set_level("INFO", "flwr.psl_flower")
    process = Process(**options)
    for _ in range(2):
        request, reply = process.forward()
        sums = process.backward(request, reply)
        assert nodes_of(reply) == [(node,) for node in NODES]
        assert nodes_of(sums) == [NODES]
        alone = Process(**options)
        for part, expected in zip(reply.parts, singly(alone, "activations"), strict=True):
            assert torch.equal(tree.leaves(part.outputs["activations"].value)[0], tree.leaves(expected)[0])
        assert_sum(sums.parts[0].outputs["head"].value, singly(alone, "head"))
    assert caplog.text.count("run one at a time") == caplog.text.count(why) == 1


class Fails(SplitClient):
    """Client 1 has trouble of the kind named."""

    kind = ""

    def batch(self, dataset, indices):
        batch = super().batch(dataset, indices)
        images, labels = batch.inputs, batch.target
        if self.partition_id != 1:
            return images, labels
        if self.kind == "raises":
            raise OSError("disk on fire")
        if self.kind == "is told to end":
            signal.raise_signal(signal.SIGTERM)
        return {"narrow": images[:, :, :5], "not finite": images * float("nan")}[self.kind], labels


def test_one_clients_failure_is_its_own(monkeypatch):
    monkeypatch.setattr(Fails, "kind", "raises")
    process = Process(Fails)
    request, reply = process.forward()
    assert nodes_of(reply) == [(30,), (20,)]
    assert reply.failures[10].kind is Kind.RAISED
    assert re.fullmatch(r"test_runtime\.py:\d+ in batch: OSError: disk on fire", reply.failures[10].detail)
    first, _, third = singly(Process(), "head")
    sums = process.backward(request, reply)
    assert nodes_of(sums) == [(30, 20)]
    assert_sum(sums.parts[0].outputs["head"].value, [first, third])
    monkeypatch.setattr(Fails, "kind", "narrow")  # and not lasting
    assert nodes_of(Process().forward()[1]) == [NODES]


@pytest.mark.parametrize("joint", [True, False])
def test_a_signal_while_clients_draw_ends_the_process(monkeypatch, joint):
    monkeypatch.setattr(Fails, "kind", "is told to end")
    process = Process(Fails)
    process.state.one_at_a_time = not joint
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    try:
        with pytest.raises(SystemExit):
            process.forward()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_batches_that_differ_are_not_joined(monkeypatch):
    monkeypatch.setattr(Fails, "kind", "narrow")
    _, reply = Process(Fails).forward()
    assert nodes_of(reply) == [(node,) for node in NODES]
    assert [part.outputs["activations"].value[0].shape[2] for part in reply.parts] == [6, 5, 6]


def test_sums_that_are_not_finite_come_client_by_client(monkeypatch):
    """So that the server sees whose fault it is."""
    monkeypatch.setattr(Fails, "kind", "not finite")
    process = Process(Fails)
    request, reply = process.forward()
    assert nodes_of(reply) == [NODES]  # of rows it can tell
    sums = process.backward(request, reply)
    assert nodes_of(sums) == [(node,) for node in NODES]
    finite = [all(bool(g.isfinite().all()) for g in part.outputs["head"].value.values()) for part in sums.parts]
    assert finite == [True, False, True]


def test_a_client_that_cannot_be_made_is_left_out():
    process = Process(refuse=(10,))
    _, reply = process.forward()
    assert nodes_of(reply) == [(30, 20)]
    assert reply.failures[10].kind is Kind.RAISED
    assert re.fullmatch(
        r"test_runtime\.py:\d+ in make_client: FileNotFoundError: no data here", reply.failures[10].detail
    )
    described = process.ask(Request(stage=DESCRIBE, nodes=NODES))
    assert (described.descriptions.keys(), described.failures.keys()) == ({30, 20}, {10})


def test_clients_are_described_one_by_one():
    class Undescribable(SplitClient):
        def describe(self, **asked):
            if self.partition_id == 1:
                raise OSError("disk on fire")
            return super().describe(**asked)

    reply = Process(Undescribable).ask(Request(stage=DESCRIBE, nodes=NODES))
    assert {node: d.partition_id for node, d in reply.descriptions.items()} == {30: 0, 20: 2}
    assert reply.failures[10].detail.endswith(" in describe: OSError: disk on fire")


class Mixing(nn.Module):
    """Its rows depend on each other, in the way named."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(36, 1), how

    def forward(self, x):
        h = self.linear(x.flatten(1))
        return h - h.mean(0) if self.how == "centred" else h.squeeze()


@pytest.mark.parametrize(("how", "what"), [("centred", "treat examples one by one"), ("squeezed", "flatten")])
def test_a_half_that_mixes_rows_is_refused(how, what):
    _, reply = Process(half=Mixing(how)).forward()
    assert reply.failures.keys() >= {30, 20}  # a single row cannot show it
    assert all(what in reply.failures[node].detail for node in (30, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "sideways"}, "was built for method 'parallel', which has no stage 'sideways'"),
        ({"stage": "backward"}, "stage 'backward' takes"),
        ({"inputs": {"x": Leaf(LeafKind.SHARED, None)}}, "stage 'forward' takes"),
        ({"weights": {}}, "stage 'forward' needs the weights of head"),
    ],
)
def test_requests_that_the_method_does_not_know_are_refused(changes, message):
    reply = Process().ask(replace(forward_request(NODES, orders(COUNTS)), **changes))
    assert reply.failures.keys() == set(NODES)
    assert all(message in failure.detail and failure.kind is Kind.MALFORMED for failure in reply.failures.values())


def test_simulated_stragglers_wait_side_by_side_and_share_the_work(monkeypatch):
    class Clock:
        now, sleeps = 0.0, ()

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.sleeps = (*self.sleeps, seconds)
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(runtime, "time", clock)

    class Slow(SplitClient):
        def draw_batch(self, order):
            clock.now += 8.0 / 3
            return super().draw_batch(order)

    _, reply = Process(Slow).forward(delays=(0.5, 2.0, 0.0))
    assert clock.sleeps == (2.0,)
    assert reply.seconds == pytest.approx({30: 0.5 + 4, 10: 2.0 + 1, 20: 3.0})
