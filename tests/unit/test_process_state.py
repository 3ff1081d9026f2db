"""What a process keeps between messages: bounded, and never anything stale."""

import cloudpickle
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from psl_flower.client.worker import Graph
from support import CUT, client_sizes, load_partition, population, tiny_resnet

from psl_flower import split_client_app
from psl_flower.client import app as app_module
from psl_flower.client import process
from psl_flower.client.process import GraphCache, forget_runs, run_state
from psl_flower.exchange.codec import RequestEncoder, decode_reply
from psl_flower.flower import become_server
from psl_flower.protocol import BackwardRequest, DescribeRequest, ForwardRequest, Weights, WorkOrder
from psl_flower.samplers import LatencyBudgetedSampler
from psl_flower.split import cut_model


def graph(num_floats):
    return Graph((torch.zeros(num_floats),), torch.zeros(1), {})


# --- the cache of graphs ---------------------------------------------------------------------------------------------
WORK, OTHER_WORK = ("weights", 1), ("weights", 2)


def test_a_graph_is_found_once():
    cache, kept = GraphCache(1000), graph(10)
    cache.put("a", WORK, kept)
    assert cache.pop("a", WORK) is kept
    assert cache.pop("a", WORK) is None
    assert len(cache) == 0


def test_a_graph_of_other_work_is_never_used_and_forgotten():
    cache = GraphCache(1000)
    cache.put("a", WORK, graph(10))
    assert cache.pop("a", OTHER_WORK) is None
    assert cache.pop("a", WORK) is None


def test_each_client_keeps_its_own_last_graph():
    cache, graphs = GraphCache(10_000), [graph(10) for _ in range(3)]
    cache.put("a", WORK, graphs[0])
    cache.put("b", WORK, graphs[1])
    cache.put("a", OTHER_WORK, graphs[2])
    assert len(cache) == 2
    assert cache.pop("b", WORK) is graphs[1]
    assert cache.pop("a", OTHER_WORK) is graphs[2]


def test_graphs_of_earlier_weights_are_dropped():
    """Their backward pass went to another process: they would sit there until their client's next turn."""
    cache = GraphCache(100)
    for client in "ab":
        cache.put(client, WORK, graph(10))
    cache.put("c", ("new weights", 1), graph(10))
    assert len(cache) == 1
    assert cache.pop("a", WORK) is None
    cache.put("d", ("new weights", 1), graph(10))  # and their bytes do not count any more
    assert len(cache) == 2


def test_the_oldest_make_room():
    cache = GraphCache(100)  # two graphs of 40 bytes
    for client in "abc":
        cache.put(client, WORK, graph(10))
    assert [cache.pop(client, WORK) is not None for client in "abc"] == [False, True, True]


def test_renewing_a_graph_makes_it_the_youngest():
    cache = GraphCache(100)
    for client in "aba":
        cache.put(client, WORK, graph(10))
    cache.put("c", WORK, graph(10))
    assert [cache.pop(client, WORK) is not None for client in "abc"] == [True, False, True]


def test_a_graph_larger_than_the_cache_is_not_kept():
    cache = GraphCache(100)
    cache.put("a", WORK, graph(10))
    cache.put("b", WORK, graph(26))
    assert len(cache) == 0
    cache.put("a", WORK, graph(25))  # and its bytes do not count any more
    assert len(cache) == 1


# --- runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def _fresh_process():
    forget_runs()
    yield
    forget_runs()


def test_a_run_keeps_its_state_and_only_few_runs_are_kept():
    first = run_state(1)
    assert run_state(1) is first
    run_state(2)
    assert run_state(1) is first  # used last
    run_state(3)
    assert run_state(1) is first
    assert run_state(2) is not None
    assert len(process._runs) == 2
    forget_runs()
    assert run_state(1) is not first


# --- the app over it -------------------------------------------------------------------------------------------------
CALLS = []


def model_fn():
    CALLS.append("model")
    return tiny_resnet()


def data_fn(context, config):
    CALLS.append(("data", context.node_config["partition-id"], dict(config)))
    return load_partition(context)


class Wire:
    """Sends requests to a ClientApp as Flower does, and counts forward passes."""

    def __init__(self, monkeypatch, num_nodes=2, **options):
        become_server(1, 1)
        CALLS.clear()
        self.app = split_client_app(model_fn, cut=CUT, data_fn=data_fn, **options)
        self.num_nodes, self.forwards = num_nodes, 0
        run_forward = app_module.SplitClient.run_forward

        def counted(client, request):
            self.forwards += 1
            return run_forward(client, request)

        monkeypatch.setattr(app_module.SplitClient, "run_forward", counted)

    def ask(self, request, partition=0, run_id=1, app=None):
        context = Context(
            run_id=run_id,
            node_id=100 + partition,
            node_config={"partition-id": partition, "num-partitions": self.num_nodes},
            state=RecordDict(),
            run_config={},
        )
        message_type, content = RequestEncoder().encode(request)
        reply = (app or self.app)(Message(content, context.node_id, message_type), context)
        return decode_reply(request, reply.content)


@pytest.fixture
def wire(monkeypatch):
    return Wire(monkeypatch)


HALF = cut_model(tiny_resnet(), CUT).client


def weights(version="v1", scale=1.0):
    return Weights({n: p.detach() * scale for n, p in HALF.named_parameters()}, {}, version)


def order(step=0, count=4, client=0):
    return WorkOrder(client=client, seed=3, epoch=0, step=step, start=0, count=count)


def forward(wire, version="v1", scale=1.0, config=None, **where):
    return wire.ask(ForwardRequest(order(), weights(version, scale), config or {}), **where)


def backward(wire, activations, version="v1", scale=1.0, config=None, work=None, **where):
    gradients = tuple(torch.ones_like(t) for t in activations.tensors)
    return wire.ask(BackwardRequest(work or order(), weights(version, scale), gradients, config or {}), **where)


def same(a, b):
    return set(a.tensors) == set(b.tensors) and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def test_the_backward_pass_uses_the_graph_of_the_forward_pass(wire):
    backward(wire, forward(wire))
    assert wire.forwards == 1


def test_another_process_recomputes_and_gets_the_same(wire):
    activations = forward(wire)
    here = backward(wire, activations)
    forget_runs()
    there = backward(wire, activations)
    assert wire.forwards == 2
    assert same(here, there)
    again = backward(wire, activations)  # a repeated message: the graph is used up
    assert wire.forwards == 3
    assert same(here, again)


def test_a_graph_of_other_weights_is_never_used(wire):
    activations = forward(wire, "v1")
    fresh = backward(wire, activations, "v2", scale=2.0)
    assert wire.forwards == 2
    forget_runs()
    assert same(fresh, backward(wire, activations, "v2", scale=2.0))


def test_a_graph_of_other_work_is_never_used(wire):
    forward(wire)
    other = order(step=1)
    backward(wire, forward(wire), work=order())
    assert wire.forwards == 2
    backward(wire, forward(wire), work=other)
    assert wire.forwards == 4


def test_nodes_keep_their_graphs_apart(wire):
    both = [forward(wire, partition=k) for k in range(2)]
    assert not torch.equal(both[0].tensors[0], both[1].tensors[0])
    replies = [backward(wire, both[k], partition=k) for k in range(2)]
    assert wire.forwards == 2
    assert not same(*replies)


def test_a_full_cache_costs_time_not_results(wire, monkeypatch):
    expected = backward(wire, forward(wire))
    forget_runs()
    monkeypatch.setattr(process, "MAX_GRAPH_BYTES", 10)
    assert same(backward(wire, forward(wire)), expected)
    assert wire.forwards == 3


def test_model_and_data_are_made_once_a_client_and_process(wire):
    for _ in range(2):
        for k in range(2):
            backward(wire, forward(wire, partition=k), partition=k)
    assert CALLS.count("model") == 1  # one half for all clients of the process
    assert CALLS[1:] == [("data", 0, {}), ("data", 1, {})]


def test_another_config_makes_other_data(wire):
    forward(wire, config={"augment": False})
    forward(wire, config={"augment": True})
    forward(wire, config={"augment": False})
    assert [config for _, _, config in CALLS[1:]] == [{"augment": False}, {"augment": True}]


def test_runs_do_not_share_clients(wire):
    forward(wire, run_id=1)
    forward(wire, run_id=2)
    assert CALLS.count("model") == 2


def test_an_unpickled_app_finds_the_state_of_the_process(wire):
    """What the simulation does with every message: the ClientApp arrives as a copy."""
    activations = forward(wire, app=cloudpickle.loads(cloudpickle.dumps(wire.app)))
    backward(wire, activations, app=cloudpickle.loads(cloudpickle.dumps(wire.app)))
    assert wire.forwards == 1


def test_describe_answers_for_the_partition(wire):
    for k in range(2):
        description = wire.ask(DescribeRequest(True), partition=k)
        assert (description.partition_id, description.num_examples) == (k, client_sizes(2)[k])
        counts = population(2, LatencyBudgetedSampler).label_counts[k]
        assert dict(zip(description.labels, description.counts, strict=True)) == {
            c: n for c, n in enumerate(counts) if n
        }
