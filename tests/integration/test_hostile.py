"""Lies of one member: refused, told, and no harm to the model or the run; each succeeds where nothing defends."""

import json
from dataclasses import replace

import pytest
import torch
from faulty import RecordingRunner, assert_each_used_once, recording_app
from flwr.app import ArrayRecord, Context, RecordDict
from support import CUT, DELAYS, load_partition_with_test, sgd, tiny_resnet

from psl_flower import (
    FaultPolicy,
    InProcessGrid,
    LatencyBudgetedSampler,
    ParallelSplitLearning,
    UniformGlobalSampler,
    split_client_app,
    tree,
)
from psl_flower.client import runtime
from psl_flower.protocol import Leaf
from psl_flower.strategy import strategy as strategy_module

K, LIAR = 6, 1


class Lying:
    """Has a client scale what it sends of a stage, in some steps."""

    def __init__(self, stage, output, factor, steps):
        self.honest, self.lies = runtime._Work.do, 0
        self.stage, self.output, self.factor, self.steps = stage, output, factor, steps

    def __call__(self, work, request, clients):
        part, orders = self.honest(work, request, clients), request.orders
        if request.stage == self.stage and LIAR in orders.clients and orders.step in self.steps:
            self.lies += 1
            part = replace(part, outputs={**part.outputs, self.output: self.lie(part.outputs[self.output], orders)})
        return part

    def lie(self, leaf, orders):
        def scaled(tensor):
            if self.stage == "backward":  # a sum
                return tensor * self.factor
            begin = int(orders.counts[: orders.clients.tolist().index(LIAR)].sum())
            tensor = tensor.clone()
            tensor[begin : begin + int(orders.counts[orders.clients.tolist().index(LIAR)])] *= self.factor
            return tensor

        return Leaf(leaf.kind, tree.map_leaves(scaled, leaf.value), leaf.exact)


def train(folder, transport, lying, monkeypatch, rounds=2, sampler=None, app=None, **policy):
    monkeypatch.setattr(runtime._Work, "do", lambda *arguments: lying(*arguments))
    monkeypatch.setattr(strategy_module, "StepRunner", RecordingRunner)
    strategy = ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        sampler=sampler or UniformGlobalSampler(32, seed=3),
        optimizer=sgd,
        transport=transport,
        min_available_nodes=K,
        evaluate_every=0,
        faults=FaultPolicy(**policy),
        output_dir=folder,
        delays=DELAYS,
    )
    grid = InProcessGrid(app or recording_app(), K)
    result = strategy.start(grid, ArrayRecord(tiny_resnet().state_dict()), num_rounds=rounds)
    return result, json.loads((folder / "summary.json").read_text())


def size_of(result):
    weights = result.arrays.to_torch_state_dict()
    return max(float(t.double().abs().max()) for name, t in weights.items() if t.is_floating_point())


LIES = {"activations": ("forward", "activations", 1e6), "gradient": ("backward", "head", 1e30)}


@pytest.mark.parametrize("transport", ["messages", "streams"])
@pytest.mark.parametrize("what", LIES)
def test_one_lie_costs_its_client_that_step_and_nobody_else_anything(tmp_path, monkeypatch, what, transport):
    lying = Lying(*LIES[what], steps=[4])
    result, summary = train(tmp_path, transport, lying, monkeypatch)
    assert lying.lies >= 2  # once a round
    assert summary["refused"].keys() == {"far out of bounds"}
    assert summary["failures"].keys() == {str(LIAR)}  # also where its gradient was one of a sum
    assert summary["excluded"] == {}
    assert_each_used_once(RecordingRunner.latest, K, 2)
    assert size_of(result) < 100


@pytest.mark.parametrize("what", LIES)
def test_without_the_bound_the_lie_ruins_the_model(tmp_path, monkeypatch, what):
    lying = Lying(*LIES[what][:2], 1e6, steps=[4])
    result, summary = train(tmp_path, "messages", lying, monkeypatch, rounds=1, outlier_bound=None)
    assert summary["refused"] == {}
    assert size_of(result) > 1e3


def test_whoever_lies_again_and_again_is_left_out(tmp_path, monkeypatch):
    lying = Lying("forward", "activations", 1e6, steps=range(1000))
    result, summary = train(tmp_path, "messages", lying, monkeypatch, rounds=1)
    assert summary["refused"] == {"far out of bounds": 3}
    assert list(summary["excluded"]) == [str(LIAR)]
    assert "activations[0]: norm" in summary["excluded"][str(LIAR)]
    assert size_of(result) < 100
    used = RecordingRunner.latest.used()
    assert {client for _, client in used} == {0, 2, 4, 5}  # 3 has no data


def honest(*arguments):
    return HONEST(*arguments)


HONEST = runtime._Work.do


def test_labels_of_other_classes_than_described_are_a_mistake(tmp_path, monkeypatch):
    def lying(work, request, clients):
        part = HONEST(work, request, clients)
        if request.stage == "forward" and LIAR in request.orders.clients:
            at = request.orders.clients.tolist().index(LIAR)
            first = int(request.orders.counts[:at].sum())
            labels = part.outputs["labels"].value.clone()
            labels[first] = (labels[first] + 1) % 4  # in range
            part = replace(part, outputs={**part.outputs, "labels": Leaf(part.outputs["labels"].kind, labels, True)})
        return part

    sampler = LatencyBudgetedSampler(32, seed=3)
    _, summary = train(tmp_path, "messages", lying, monkeypatch, rounds=1, sampler=sampler, mistakes="exclude")
    assert list(summary["excluded"]) == [str(LIAR)]
    assert "as it described its data" in summary["excluded"][str(LIAR)]


def test_a_claim_of_test_examples_without_end_costs_that_client_the_evaluation(caplog):
    def claiming(context):
        train, test = load_partition_with_test(context)
        return train, Endless(test) if context.node_config["partition-id"] == LIAR else test

    class Endless(torch.utils.data.Dataset):
        def __init__(self, test):
            self.test = test

        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            return self.test[index % len(self.test)]

    strategy = ParallelSplitLearning(
        tiny_resnet(), cut=CUT, sampler=UniformGlobalSampler(128, seed=3), optimizer=sgd, min_available_nodes=K
    )
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=claiming)
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=1)
    found = result.evaluate_metrics_clientapp[1]["num_examples"]
    assert 0 < found < 1000
    assert f"evaluation goes on without client {LIAR}" in caplog.text
    assert "it claims 1000000000 test examples" in caplog.text


@pytest.mark.parametrize("transport", ["messages", "streams"])
@pytest.mark.parametrize(
    ("what", "kind"),
    [([0.0, -100.0, 0.0, 0.0], "malformed"), ([8.0, 8.0, 0.0, 1.0], "far out of bounds")],
    ids=["negative counts", "a loss that is not finite"],
)
def test_what_one_member_counts_neither_turns_the_gradients_round_nor_ends_the_run(
    tmp_path, monkeypatch, transport, what, kind
):
    """The server divides by the sum of what clients count, and ends the run where the loss is not finite."""

    def lying(work, request, clients):
        part = HONEST(work, request, clients)
        if request.stage != "tail_loss" or LIAR not in request.orders.clients:
            return part
        counts = torch.tensor(what, dtype=torch.float64)
        if len(clients) > 1:  # one sum
            counts += part.outputs["counts"].value
        return replace(part, outputs={**part.outputs, "counts": Leaf(part.outputs["counts"].kind, counts)})

    monkeypatch.setattr(runtime._Work, "do", lying)
    strategy = ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        tail="head",
        sampler=UniformGlobalSampler(32, seed=3),
        optimizer=sgd,
        transport=transport,
        min_available_nodes=K,
        evaluate_every=0,
        faults=FaultPolicy(mistakes="exclude"),
        output_dir=tmp_path,
    )
    app = split_client_app(tiny_resnet, cut=CUT, tail="head", data_fn=lambda c: load_partition_with_test(c)[0])
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=1)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["excluded"]) == [str(LIAR)]
    assert list(summary["refused"]) == [kind]
    assert size_of(result) < 100


def test_a_newcomer_that_is_refused_reads_in_its_own_log_why(caplog):
    """It comes with the partition of another in round 1; it is told once, and the run goes on."""

    class Second(InProcessGrid):
        def push_messages(self, messages):
            old = self._contexts[3]
            options = {"node_config": dict(old.node_config), "state": RecordDict(), "run_config": {}}
            self._contexts.setdefault(99, Context(run_id=old.run_id, node_id=99, **options))
            return super().push_messages(messages)

    strategy = ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        sampler=UniformGlobalSampler(64, seed=3),
        optimizer=sgd,
        transport="messages",
        min_available_nodes=K,
        evaluate_every=0,
    )
    result = strategy.start(Second(recording_app(), K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=3)
    assert result.train_metrics_clientapp[3]["num_clients"] == K - 1  # one has no data
    why = "partition-id must be unique, 1 is that of node 3"
    assert caplog.text.count(f"node 99 is refused: {why}") == 1
    assert caplog.text.count(f"The server does not let node 99 in: {why}") == 1
