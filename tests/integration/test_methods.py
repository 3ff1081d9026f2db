"""Ways of splitting beside parallel: each equals a reference of a few lines that trains in one process."""

import copy
import functools
import json
import os
import signal
from collections import Counter, OrderedDict
from itertools import zip_longest

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from process_grid import ERROR_CRASHED, ProcessGrid
from support import CUT, adam, client_data, client_sizes, largest_difference, load_partition_64, sgd, tiny_resnet_64
from torch import nn

from psl_flower import (
    ConfigError,
    FaultPolicy,
    InProcessGrid,
    LatentDirichletSampler,
    ParallelSplitLearning,
    UniformGlobalSampler,
    split_client_app,
)
from psl_flower.app.experiment import train_in_process
from psl_flower.callbacks import Callback
from psl_flower.client import process
from psl_flower.client.own import OwnPart
from psl_flower.client.part import ClientPart
from psl_flower.client.process import run_state
from psl_flower.config import RunConfig
from psl_flower.errors import ProtocolError
from psl_flower.stragglers import SlowFractionDelays

K, B, SEED, ROUNDS = 5, 24, 3, 2  # client 3 has no examples
HOLDERS = [k for k in range(K) if client_sizes(K)[k]]
METHODS = ("sequential", "splitfed-v1", "splitfed-v2")
FIRST_NODE = 2  # of an InProcessGrid: that of client 0


# --- the references --------------------------------------------------------------------------------------------------
def batches(client, epoch):
    """Yield a client's batches of an epoch."""
    x, y = client_data(client, K, torch.float64).tensors
    order = np.random.default_rng([SEED, epoch, client]).permutation(len(y))
    for rows in np.array_split(order, -(-len(y) // B)):
        yield x[rows], y[rows]


def backward(model, batch):
    model.train()
    model.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()


def halves(model):
    """Return the parameters of head and body."""
    head = [p for n, p in model.named_parameters() if n.split(".")[0] in ("stem", "layer1")]
    return head, [p for n, p in model.named_parameters() if n.split(".")[0] not in ("stem", "layer1")]


def average(states, weights):
    """Return the weighted average of state dicts; whole numbers are rounded."""
    total = {}
    for name, first in states[0].items():
        mean = sum(w * s[name].double() for s, w in zip(states, weights, strict=True)) / sum(weights)
        total[name] = mean.to(first.dtype) if first.is_floating_point() else mean.round().to(first.dtype)
    return total


def sequential(make_optimizer):
    model = tiny_resnet_64()
    optimizer = make_optimizer(model.parameters())
    for epoch in range(ROUNDS):
        for client in HOLDERS:
            for batch in batches(client, epoch):
                backward(model, batch)
                optimizer.step()
    return model.state_dict()


def splitfed_v1(make_optimizer, gone=None):
    model = tiny_resnet_64()
    for epoch in range(ROUNDS):
        states, weights = [], []
        for client in HOLDERS:
            copied = copy.deepcopy(model)
            optimizer = make_optimizer(copied.parameters())
            for batch in batches(client, epoch):
                backward(copied, batch)
                optimizer.step()
            if (epoch, client) != gone:
                states.append(copied.state_dict())
                weights.append(client_sizes(K)[client])
        model.load_state_dict(average(states, weights))
    return model.state_dict()


def splitfed_v2(make_optimizer, gone=None, steps=0):
    model = tiny_resnet_64()
    body_optimizer = make_optimizer(halves(model)[1])
    for epoch in range(ROUNDS):
        begin, heads, weights = copy.deepcopy(halves(model)[0]), [], []
        for client in turns(epoch):
            head = halves(model)[0]
            with torch.no_grad():
                for p, first in zip(head, begin, strict=True):
                    p.copy_(first)
            head_optimizer = make_optimizer(head)
            for i, batch in enumerate(batches(client, epoch)):
                if (epoch, client) == gone and i == steps:
                    break
                backward(model, batch)
                head_optimizer.step()
                body_optimizer.step()
            if (epoch, client) != gone:
                heads.append({str(i): p.detach().clone() for i, p in enumerate(head)})
                weights.append(client_sizes(K)[client])
        with torch.no_grad():
            for p, mean in zip(halves(model)[0], average(heads, weights).values(), strict=True):
                p.copy_(mean)
    return model.state_dict()


def turns(epoch):
    rng = np.random.default_rng(np.random.SeedSequence([SEED, epoch], spawn_key=(1,)))
    return [HOLDERS[i] for i in rng.permutation(len(HOLDERS))]


REFERENCES = dict(zip(METHODS, (sequential, splitfed_v1, splitfed_v2), strict=True))


# --- the runs --------------------------------------------------------------------------------------------------------
def grid_of(method, optimizer=sgd, kind=InProcessGrid):
    app = split_client_app(tiny_resnet_64, cut=CUT, data_fn=load_partition_64, method=method, optimizer=optimizer)
    return kind(app, num_nodes=K)


def strategy_of(method, optimizer=sgd, **options):
    sampler = UniformGlobalSampler(B, seed=SEED)
    return ParallelSplitLearning(
        tiny_resnet_64(), cut=CUT, method=method, sampler=sampler, optimizer=optimizer, evaluate_every=0, **options
    )


def trained(grid, strategy, num_rounds=ROUNDS):
    result = strategy.start(grid, ArrayRecord(tiny_resnet_64().state_dict()), num_rounds=num_rounds)
    return result.arrays.to_torch_state_dict()


def records(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# --- exactness -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("transport", ["messages", "streams"])
@pytest.mark.parametrize(("method", "optimizer"), [*((m, sgd) for m in METHODS), ("splitfed-v1", adam)])
def test_equals_its_reference(method, optimizer, transport):
    state = trained(grid_of(method, optimizer), strategy_of(method, optimizer, transport=transport))
    reference = REFERENCES[method](optimizer)
    assert largest_difference(state, reference) < 1e-9
    assert largest_difference(reference, tiny_resnet_64().state_dict()) > 1e-2


def test_the_methods_differ():
    """Else being equal to one's own reference would prove little."""
    states = [reference(sgd) for reference in REFERENCES.values()]
    assert min(largest_difference(a, b) for i, a in enumerate(states) for b in states[:i]) > 1e-4


def test_the_clients_follow_the_schedule_of_the_learning_rate():
    def halving(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.0)

    once = trained(grid_of("splitfed-v1"), strategy_of("splitfed-v1"), num_rounds=1)
    twice = trained(grid_of("splitfed-v1"), strategy_of("splitfed-v1", scheduler=halving), num_rounds=2)
    parameters = [name for name, _ in tiny_resnet_64().named_parameters()]
    assert largest_difference({n: once[n] for n in parameters}, {n: twice[n] for n in parameters}) < 1e-12


# --- clients that are lost -------------------------------------------------------------------------------------------
def examples(client, steps):
    """Return how many examples are in a client's first batches of an epoch."""
    return sum(len(y) for _, y in list(batches(client, 0))[:steps])


class Losing(Callback):
    """Has a client's own head be lost after some of its steps in the first round, as when its SuperNode dies."""

    def __init__(self, grid, client, steps):
        self._own, self._node = run_state(grid.run.run_id).own, FIRST_NODE + client
        self._state, self._used, self.done = grid._contexts[self._node].state, examples(client, steps), False

    def on_step(self, record):
        _, kept = self._own._kept.get(self._node, (None, None))
        if kept and not self.done and kept["head"].used == self._used:
            self._own.forget(self._node)
            self._state.pop("psl_flower.own", None)  # over streams there is none
            self.done = True


@pytest.mark.parametrize("transport", ["messages", "streams"])
@pytest.mark.parametrize("method", ["splitfed-v1", "splitfed-v2"])
def test_a_client_that_loses_its_head_is_left_out_of_the_average_and_reported(method, transport, tmp_path):
    client, steps, grid = turns(0)[1], 2, grid_of(method)
    losing = Losing(grid, client, steps)
    # without classification a step is told at once
    options = {"callbacks": [losing], "output_dir": tmp_path, "classification": False, "transport": transport}
    strategy = strategy_of(method, **options)
    state = trained(grid, strategy)
    assert losing.done
    options = {"steps": steps} if method == "splitfed-v2" else {}
    without = REFERENCES[method](sgd, gone=(0, client), **options)
    assert largest_difference(state, without) < 1e-9
    assert largest_difference(REFERENCES[method](sgd), without) > 1e-4
    unseen = client_sizes(K)[client] - examples(client, steps)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["refused"] == {"left out for the round": 1}
    assert summary["examples_unseen"] == {str(client): unseen}
    assert [r["examples_unseen"] for r in records(tmp_path, "round")] == [unseen, 0]


def load_and_tell(folder, context):
    """Load a client's data; tell which process it is in."""
    (folder / str(context.node_config["partition-id"])).write_text(str(os.getpid()))
    return load_partition_64(context)


def make_app(folder):
    data_fn = functools.partial(load_and_tell, folder)
    return split_client_app(tiny_resnet_64, cut=CUT, data_fn=data_fn, method="splitfed-v1", optimizer=sgd)


class Killing(Callback):
    """Kills a client's process after the second step of the run."""

    def __init__(self, folder, client):
        self._file = folder / str(client)

    def on_step(self, record):
        if (record.round, record.step) == (1, 1):
            os.kill(int(self._file.read_text()), signal.SIGKILL)


@pytest.mark.slow  # six processes import torch
def test_a_client_whose_process_is_killed_is_back_in_the_next_round(tmp_path):
    """Over streams, a process for each client: the new one does not have the head of the old one."""
    pids, client = tmp_path / "pids", 2
    pids.mkdir()
    options = {"transport": "streams", "callbacks": [Killing(pids, client)], "classification": False}
    with ProcessGrid(functools.partial(make_app, pids), K) as grid:
        state = trained(grid, strategy_of("splitfed-v1", output_dir=tmp_path, min_available_nodes=K, **options))
    assert largest_difference(state, splitfed_v1(sgd, gone=(0, client))) < 1e-9
    unseen = client_sizes(K)[client] - examples(client, 2)
    assert [r["examples_unseen"] for r in records(tmp_path, "round")] == [unseen, 0]


class LosingReplies(InProcessGrid):
    """Loses replies, `lost` by type of message and node: the client has done the work, nobody learns of it."""

    lost: Counter

    def _answer(self, message, context):
        reply, what = super()._answer(message, context), (message.metadata.message_type, context.node_id)
        if not self.lost[what]:
            return reply
        self.lost[what] -= 1
        return Message(Error(ERROR_CRASHED, "lost"), reply_to=message)


@pytest.mark.parametrize("method", ["splitfed-v1", "splitfed-v2"])
@pytest.mark.parametrize("times", [1, 2])  # once: asked again at once; twice: the step is made anew
def test_a_step_can_be_asked_for_again(method, times, monkeypatch):
    """A head that was stepped for a reply that got lost is not stepped twice for one batch."""
    grid, node = grid_of(method, kind=LosingReplies), FIRST_NODE + 2
    lost = {"train.begin": 1, "train.local_forward": times, "train.local_backward": times, "train.collect": 1}
    grid.lost = Counter({(stage, node): number for stage, number in lost.items()})
    monkeypatch.setattr("psl_flower.strategy.tolerance.Backoff.left_out", lambda self: set())
    state = trained(grid, strategy_of(method, faults=FaultPolicy(min_batch_fraction=1.0)))
    assert not grid.lost.total()
    assert largest_difference(state, REFERENCES[method](sgd)) < 1e-9


class SeveralProcesses(LosingReplies):
    """Has each message answered by another of several processes, as Ray's actors do; of none: by a new one."""

    number, lost = 0, Counter()

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._processes, self._rng = [OrderedDict() for _ in range(self.number)], np.random.default_rng(1)

    def _answer(self, message, context):
        chosen = self._processes[self._rng.integers(self.number)] if self.number else OrderedDict()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process, "_runs", chosen)
            return super()._answer(message, context)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(("method", "optimizer"), [("splitfed-v1", adam), ("splitfed-v2", sgd)])
def test_over_messages_heads_go_along_from_process_to_process(method, optimizer, number, monkeypatch):
    grid, node = grid_of(method, optimizer, kind=SeveralProcesses), FIRST_NODE + 2
    grid._processes = [OrderedDict() for _ in range(number)]
    grid.number, grid.lost = number, Counter({("train.local_forward", node): 2, ("train.local_backward", node): 2})
    monkeypatch.setattr("psl_flower.strategy.tolerance.Backoff.left_out", lambda self: set())
    strategy = strategy_of(method, optimizer, transport="messages", faults=FaultPolicy(min_batch_fraction=1.0))
    assert largest_difference(trained(grid, strategy), REFERENCES[method](optimizer)) < 1e-9
    assert not grid.lost.total()


def test_steps_that_are_skipped_leave_heads_as_they_were_and_old_heads_are_noticed():
    part = ClientPart("head", nn.Linear(2, 1).double(), torch.device("cpu"))
    part.parameters = dict(part.module.named_parameters())
    own = OwnPart(part, functools.partial(torch.optim.SGD, lr=0.5))
    gradients = {name: torch.ones_like(p) for name, p in part.parameters.items()}
    first = part.module.bias.item()
    own.run_on(8)
    own.go_to(8)  # the server has skipped the step
    assert (own.used, part.module.bias.item()) == (8, first)
    own.run_on(4)
    own.step(gradients, 1.0, 4)
    assert (own.used, part.module.bias.item()) == (12, first - 0.5)
    own.go_to(8)  # the step has come to nothing
    assert (own.used, part.module.bias.item()) == (8, first)
    with pytest.raises(ProtocolError, match="was trained on 8 examples, the server counts 20; it is left out"):
        own.go_to(20)


# --- records, resuming, refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_records_hold_exact_bytes_and_both_clocks(method, tmp_path):
    delays = SlowFractionDelays(fraction=0.5)
    trained(grid_of(method), strategy_of(method, simulated_delays=delays, output_dir=tmp_path), num_rounds=1)
    steps, (whole,) = records(tmp_path, "step"), records(tmp_path, "round")
    model = tiny_resnet_64()
    head = sum(8 * p.numel() for p in halves(model)[0])
    row = 8 * 4 * 6 * 6  # what crosses the cut for one example, one way
    own = method != "sequential"
    for step in steps:
        # over messages every request has the weights with it, but those about a client's own head
        sent = row * step["batch_size"] + (8 * step["clients"] if own else 2 * head)
        assert step["bytes_sent"] == sent
        assert step["bytes_received"] == (row + 8) * step["batch_size"] + (0 if own else head)
    around = head * len(HOLDERS) if own else 0
    assert whole["bytes_sent"] == sum(s["bytes_sent"] for s in steps) + around
    assert whole["bytes_received"] == sum(s["bytes_received"] for s in steps) + around
    known = delays.delays(np.arange(K))
    time = {k: [known.latency[k] + known.per_sample[k] * len(y) for _, y in batches(k, 0)] for k in HOLDERS}
    side_by_side = sum(map(max, zip_longest(*time.values(), fillvalue=0)))
    expected = side_by_side if method == "splitfed-v1" else sum(map(sum, time.values()))
    assert whole["seconds_simulated"] == pytest.approx(expected)
    assert whole["seconds_real"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_the_end_of_a_round(method, tmp_path):
    """Its last round's average is not taken twice, and it ends in the same weights to the last bit."""
    trained(grid_of(method), strategy_of(method, output_dir=tmp_path), num_rounds=1)
    again = strategy_of(method, output_dir=tmp_path, resume_from="latest")
    resumed = trained(grid_of(method), again)
    assert largest_difference(resumed, trained(grid_of(method), strategy_of(method))) == 0


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match=r"clients train a part of the model.*got None"):
        grid_of("splitfed-v1", optimizer=None)
    with pytest.raises(ConfigError, match="method must be"):
        RunConfig(method="splitfed")
    with pytest.raises(ConfigError, match="checkpoint_every=5: leave it 0"):
        strategy_of("splitfed-v2", checkpoint_every=5, output_dir="never-made")
    with pytest.raises(ConfigError, match=r"method 'sequential' makes each client's batches.*got LatentDirichlet"):
        ParallelSplitLearning(tiny_resnet_64(), cut=CUT, method="sequential", sampler=LatentDirichletSampler(B))


@pytest.mark.parametrize("method", METHODS)
def test_the_default_app_takes_the_method_of_its_configuration(method, tmp_path):
    config = RunConfig(method=method, model="tiny-cnn", num_server_rounds=2, batch_size=32, output_dir=str(tmp_path))
    training = train_in_process(config, 3)
    assert training.accuracy[-1] > training.accuracy[0] + 0.2
    assert json.loads((tmp_path / "config.json").read_text())["strategy"]["method"] == method
