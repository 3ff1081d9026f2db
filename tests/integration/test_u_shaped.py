"""The U shape equals centralised training, parameter by parameter, and labels never leave the clients."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from faulty import RecordingClient, RecordingRunner, assert_each_used_once
from flwr.app import ArrayRecord, Error, Message
from process_grid import ERROR_CRASHED
from support import (
    CUT,
    DELAYS,
    NUM_CLASSES,
    adam,
    client_data,
    largest_difference,
    load_partition_64,
    planned_batches,
    population,
    sgd,
    tiny_resnet,
    train_centralised,
)
from torch import nn
from torch.utils.data import TensorDataset

from psl_flower import (
    AlignedSampler,
    FaultPolicy,
    InProcessGrid,
    ParallelSplitLearning,
    SplitClient,
    SplitModel,
    UniformGlobalSampler,
    split_client_app,
)
from psl_flower.client.part import ClientPart
from psl_flower.client.process import RunState, forget_runs
from psl_flower.client.runtime import answer
from psl_flower.errors import ConfigError, MembershipError
from psl_flower.exchange.codec import WeightStore, decode_reply, decode_request
from psl_flower.exchange.records import content_to_frame
from psl_flower.methods import ParallelSplit, UShapedSplit
from psl_flower.protocol import DESCRIBE, Orders, Request, Weights
from psl_flower.split import cut_model
from psl_flower.strategy import strategy as strategy_module

K = 4
SAMPLER = UniformGlobalSampler(40, seed=3)


class Scale(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x * self.value


class UNet(nn.Module):
    """Skips the body with its stem's output, and has one scale at both ends."""

    def __init__(self, dropout=0.0):
        super().__init__()
        scale = nn.Parameter(torch.tensor(1.5))
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Scale(scale))
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU())
        self.tail = nn.Sequential(Scale(scale), nn.Dropout(dropout), nn.Linear(10, NUM_CLASSES))

    def forward(self, x):
        skip = self.stem(x)
        x = self.body(nn.functional.silu(skip))
        return self.tail(torch.cat([skip.mean((2, 3)), x.mean((2, 3))], 1))


def u_net(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(dropout).double()


def app(model_fn=u_net, **options):
    return split_client_app(
        model_fn, **{"cut": "body", "tail": "tail", "data_fn": load_partition_64, "device": "cpu", **options}
    )


def strategy(model=None, **options):
    options = {"cut": "body", "tail": "tail", "sampler": SAMPLER, "optimizer": sgd, **options}
    return ParallelSplitLearning(model or u_net(), min_available_nodes=K, device="cpu", **options)


def train(split, grid=None, num_rounds=1, model=None):
    return split.start(grid or InProcessGrid(app(), K), ArrayRecord((model or u_net()).state_dict()), num_rounds)


def centralised(optimizer=sgd, num_rounds=1, model=None):
    batches = [
        batch
        for epoch in range(num_rounds)
        for batch in planned_batches(SAMPLER.plan(population(K), epoch), K, seed=3, epoch=epoch, dtype=torch.float64)
    ]
    return train_centralised(model or u_net(), batches, optimizer)


@pytest.mark.parametrize(
    ("transport", "optimizer", "num_rounds"), [("messages", sgd, 1), ("streams", sgd, 1), ("streams", adam, 2)]
)
def test_equals_centralised_training(transport, optimizer, num_rounds):
    result = train(strategy(optimizer=optimizer, transport=transport), num_rounds=num_rounds)
    reference = centralised(optimizer, num_rounds)
    assert largest_difference(result.arrays.to_torch_state_dict(), reference) < 1e-9
    assert largest_difference(reference, u_net().state_dict()) > 1e-2
    assert result.train_metrics_clientapp[1]["accuracy"] > 0.3


def test_targets_that_do_not_count():
    """What the loss is the mean over is known only after it was computed, by all clients."""
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)

    def loss(outputs, labels):
        return nn.functional.cross_entropy(outputs, labels, weight, ignore_index=1)

    grid = InProcessGrid(app(loss=loss), K)
    result = train(strategy(), grid)
    step = sgd((model := u_net()).parameters())
    for x, y in planned_batches(SAMPLER.plan(population(K), 0), K, seed=3, epoch=0, dtype=torch.float64):
        step.zero_grad()
        loss(model(x), y).backward()
        step.step()
    assert largest_difference(result.arrays.to_torch_state_dict(), model.state_dict()) < 1e-9


class ByHand(SplitModel):
    def __init__(self):
        super().__init__(
            client=nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.SiLU()),
            server=nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.SiLU()),
            tail=nn.Linear(8, NUM_CLASSES),
        )


def by_hand():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ByHand().double()


def test_a_model_cut_by_hand():
    grid = InProcessGrid(app(by_hand, cut=None, tail=None, method="u-shaped"), K)
    split = strategy(by_hand(), cut=None, tail=None, method="u-shaped")
    result = train(split, grid, model=by_hand())
    # the first bias of the body meets batch norm: its gradient is zero but for rounding, which SGD leaves so
    assert largest_difference(result.arrays.to_torch_state_dict(), centralised(model=by_hand())) < 1e-9


def with_test_data(context):
    data = load_partition_64(context)
    return data, TensorDataset(*(t[:30] for t in data.tensors))


def test_evaluation_on_the_clients():
    result = train(strategy(transport="streams"), InProcessGrid(app(data_fn=with_test_data), K))
    model = u_net()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    x, y = (torch.cat([client_data(k, K, torch.float64).tensors[i][:30] for k in range(K)]) for i in (0, 1))
    with torch.no_grad():
        logits = model.eval()(x)
    told = result.evaluate_metrics_clientapp[1]
    assert told["loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), abs=1e-9)
    assert told["accuracy"] == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert told["num_examples"] == 30 * K


@pytest.mark.curves
def test_a_client_that_is_alone_in_a_step_tells_neither_loss_nor_score(tmp_path):
    """Their sum would be its own. What is learned is the same."""
    grid = ListeningGrid(app(data_fn=with_test_data), num_nodes=1)
    options = {"sampler": UniformGlobalSampler(40, seed=3), "optimizer": sgd, "output_dir": tmp_path}
    alone = ParallelSplitLearning(u_net(), cut="body", tail="tail", min_available_nodes=1, **options)
    result = train(alone, grid)
    batches = planned_batches(SAMPLER.plan(population(1), 0), 1, seed=3, epoch=0, dtype=torch.float64)
    reference = train_centralised(u_net(), batches, sgd)
    assert largest_difference(result.arrays.to_torch_state_dict(), reference) < 1e-9
    told = [part.outputs for request, reply in grid.heard for part in reply.parts if request.stage == "tail_loss"]
    assert {(outputs["loss"].value.item(), outputs["counts"].value[0].item()) for outputs in told} == {(0.0, 0.0)}
    assert {tuple(outputs["score"].value.tolist()) for outputs in told} == {(0, 0)}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {(line["loss"], line["accuracy"], line["deviation"]) for line in lines if line["kind"] == "step"} == {
        (None, None, None)
    }
    assert np.isnan(result.evaluate_metrics_clientapp[1]["loss"])
    assert (tmp_path / "curves.png").stat().st_size > 5000


# --- what crosses ----------------------------------------------------------------------------------------------------
class ListeningGrid(InProcessGrid):
    """Keeps what clients reply, by the type of the message."""

    def __init__(self, client_app, num_nodes=K):
        super().__init__(client_app, num_nodes)
        self.heard, self._store = [], WeightStore()  # frozen weights are sent once

    def _answer(self, message, context):
        reply = super()._answer(message, context)
        _, _, request = decode_request(content_to_frame(message.content), self._store)
        self.heard.append((request, decode_reply(content_to_frame(reply.content), request)))
        return reply


def test_labels_stay():
    """Nothing that a client replies is, or changes with, the label of an example, but what the loss makes of it."""
    grid = ListeningGrid(app())
    train(strategy(transport="messages"), grid)
    sent = {
        (request.stage, name): leaf.kind.value
        for request, reply in grid.heard
        for part in reply.parts
        for name, leaf in part.outputs.items()
    }
    assert sent == {
        ("head_forward", "activations"): "rows",
        ("tail_loss", "gradient"): "rows",
        ("tail_loss", "tail"): "sum",
        ("tail_loss", "past"): "sum",
        ("tail_loss", "loss"): "sum",
        ("tail_loss", "counts"): "sum",
        ("tail_loss", "score"): "sum",
        ("head_backward", "head"): "sum",
    }
    described = [each for _, reply in grid.heard for each in reply.descriptions.values()]
    assert len(described) == K
    assert all(each.labels is None and each.counts is None for each in described)


def ask(**options):
    """Return what a client of the U shape says to a request of whoever made it."""
    state = RunState()
    method, halves = UShapedSplit(), cut_model(u_net(), "body", "tail")
    parts = method.assign(halves.parts)
    weights = {
        name: Weights(dict(parts[name].named_parameters()), dict(parts[name].named_buffers()), "v", "c")
        for name in method.client_parts()
    }
    state.parts = {name: ClientPart(name, parts[name], torch.device("cpu")) for name in method.client_parts()}
    request = Request(**{"nodes": (7,), "weights": weights, **options})
    return answer(method, state, lambda node, config: SplitClient(client_data(0, K, torch.float64)), request)


ORDERS = Orders(clients=np.array([0]), starts=np.array([0]), counts=np.array([5]))
BY_CLASS = {"class_starts": np.zeros((1, NUM_CLASSES), int), "class_counts": np.array([[5, 0, 0, 0]])}


def test_a_client_answers_its_own_method_alone():
    assert not ask(stage="head_forward", orders=ORDERS).failures
    for stage in ParallelSplit.stages():
        reply = ask(stage=stage, orders=ORDERS)
        assert "was built for method 'u-shaped', which has no stage" in reply.failures[7].detail
        assert not reply.parts


@pytest.mark.parametrize(
    "question",
    [
        {"stage": DESCRIBE, "label_counts": True},
        {"stage": "head_forward", "orders": replace(ORDERS, **BY_CLASS)},
    ],
)
def test_a_client_tells_nothing_by_class(question):
    reply = ask(**question)
    assert "with which labels stay here: it tells nothing by class" in reply.failures[7].detail
    assert not reply.parts
    assert not reply.descriptions


def test_server_and_clients_must_have_the_same_method():
    with pytest.raises(MembershipError, match=r"the server's method is 'parallel', that of .* is 'u-shaped'"):
        train(strategy(tiny_resnet(), cut=CUT, tail=None), model=tiny_resnet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": nn.functional.mse_loss}, "labels and loss stay with the clients: give loss"),
        ({"classification": False}, "give loss and classification to split_client_app"),
        ({"metrics": {"f1": lambda outputs, labels: 0.0}}, "leave metrics out"),
        ({"sampler": AlignedSampler(20), "delays": DELAYS}, "AlignedSampler plans by class"),
        ({"method": "parallel"}, r"'parallel' has 2 parts \(head, body\), the model is cut into 3: give no tail"),
        (
            {"model": tiny_resnet(), "cut": CUT, "method": "u-shaped", "tail": None},
            "'u-shaped' has 3 parts .*, the model is cut into 2: give a tail",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        strategy(**options)


def test_batch_statistics_are_refused_in_the_tail():
    model = u_net()
    model.tail[1] = nn.BatchNorm1d(10)
    with pytest.raises(ConfigError, match=r"examples one by one, but 'tail.1'"):
        strategy(model)


# --- losses of clients, and randomness -------------------------------------------------------------------------------
class LosingGrid(InProcessGrid):
    """Loses a client in the middle of a few steps."""

    def __init__(self):
        super().__init__(app(client_class=RecordingClient), K)
        self.asked, self.lost = Counter(), []

    def _answer(self, message, context):
        stage, client = message.metadata.message_type, context.node_config["partition-id"]
        self.asked[stage] += 1
        if (
            stage in ("train.tail_loss", "train.head_backward")
            and client == self.asked[stage] // K % 3
            and self.asked[stage] < 30
        ):
            self.lost.append(stage)
            return Message(Error(ERROR_CRASHED, "the process died"), reply_to=message)
        return super()._answer(message, context)


def test_clients_lost_in_the_middle_of_a_step(monkeypatch):
    monkeypatch.setattr(strategy_module, "StepRunner", RecordingRunner)
    grid = LosingGrid()
    result = train(strategy(transport="messages", faults=FaultPolicy(patience=300)), grid)
    assert set(grid.lost) == {"train.tail_loss", "train.head_backward"}
    assert_each_used_once(RecordingRunner.latest, K, 1)
    data = [client_data(k, K, torch.float64).tensors for k in range(K)]
    batches = [
        tuple(torch.cat([data[k][i][rows] for k, (_, rows) in drawn.items()]) for i in (0, 1))
        for _, drawn in RecordingRunner.latest.committed
    ]
    assert min(len(y) for _, y in batches) < 35  # some went on without
    reference = train_centralised(u_net(), batches, sgd)
    assert largest_difference(result.arrays.to_torch_state_dict(), reference) < 1e-9


class AloneClient(SplitClient):
    def forward(self, half, inputs):
        return super().forward(half, inputs)


def test_dropout_in_the_tail_is_each_clients_own_wherever_it_runs():
    def run(client_class=SplitClient, transport="streams"):
        grid = InProcessGrid(app(lambda: u_net(0.3), client_class=client_class), K)
        result = train(strategy(u_net(0.3), transport=transport), grid)
        forget_runs()
        return result.arrays.to_torch_state_dict()

    joint = run()
    assert largest_difference(joint, run(AloneClient)) < 1e-12
    assert largest_difference(joint, run(transport="messages")) < 1e-12
    assert largest_difference(joint, centralised()) > 1e-4
