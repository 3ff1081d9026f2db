"""Defences in whole runs: with every method, over both carriers, in processes that serve several clients or end."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from support import (
    CUT,
    DELAYS,
    NUM_CLASSES,
    Steps,
    largest_difference,
    load_partition_64,
    planned_batches,
    population,
    sgd,
    tiny_resnet_64,
)
from test_u_shaped import ListeningGrid, u_net
from torch import nn
from torch.utils.data import TensorDataset

from psl_flower import (
    InProcessGrid,
    LatentDirichletSampler,
    ParallelSplitLearning,
    UniformGlobalSampler,
    split_client_app,
    tree,
)
from psl_flower.client import factory, runtime
from psl_flower.client.process import forget_runs, run_state
from psl_flower.client.runtime import answer
from psl_flower.errors import ConfigError, StepError
from psl_flower.methods import ParallelSplit
from psl_flower.privacy import (
    ClipCutGradient,
    Defence,
    DistanceCorrelation,
    GaussianNoise,
    LaplaceNoise,
    Quantize,
    RandomizedResponse,
    Secret,
    TopK,
    distance_correlation,
)

K = 4
SAMPLER, FEW = UniformGlobalSampler(40, seed=3), UniformGlobalSampler(150, seed=3)  # steps
METHODS = ("parallel", "u-shaped", "sequential", "splitfed-v1", "splitfed-v2")
TRANSPORTS = ("streams", "messages")
# methods know no carrier: both with one of them, then one or the other
RUNS = [("parallel", "messages"), *zip(METHODS, TRANSPORTS * 3, strict=False)]


def parts_of(method):
    """Return the model, and where it is cut."""
    return (u_net, {"cut": "body", "tail": "tail"}) if method == "u-shaped" else (tiny_resnet_64, {"cut": CUT})


def app(method, defences, **options):
    model_fn, cut = parts_of(method)
    return split_client_app(
        model_fn,
        **{"data_fn": load_partition_64, "method": method, "optimizer": sgd, "defences": defences, **cut, **options},
    )


def grid_of(method, defences, kind=InProcessGrid, **options):
    """Return a grid whose clients have the same secrets in each run."""
    grid = kind(app(method, defences, **options), K)
    for node in grid._contexts:
        run_state(grid.run.run_id).secrets[node] = Secret(bytes([node] * 32))
    return grid


def trained(method, grid, sampler=SAMPLER, **options):
    model_fn, cut = parts_of(method)
    options = {"evaluate_every": 0, "min_available_nodes": K, "device": "cpu", **cut, **options}
    strategy = ParallelSplitLearning(model_fn(), method=method, sampler=sampler, optimizer=sgd, **options)
    result = strategy.start(grid, ArrayRecord(model_fn().state_dict()), num_rounds=1)
    return result.arrays.to_torch_state_dict()


# --- all methods and carriers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "transport"), RUNS)
def test_no_strength_is_no_defence(method, transport):
    defences = [GaussianNoise(0), LaplaceNoise(0), DistanceCorrelation(0), TopK(10**9), RandomizedResponse(1e3, 4)]
    if method == "u-shaped":
        defences.append(ClipCutGradient(1e9, noise=0))
    plain, defended = (trained(method, grid_of(method, each), FEW, transport=transport) for each in ([], defences))
    assert largest_difference(plain, defended) == 0
    assert largest_difference(plain, parts_of(method)[0]().state_dict()) > 1e-3


class FreshProcesses(InProcessGrid):
    """Answers every message in a process as good as new."""

    def _answer(self, message, context):
        reply = super()._answer(message, context)
        forget_runs()
        return reply


ALL = [GaussianNoise(0.1), DistanceCorrelation(0.3), Quantize(6), TopK(70), LaplaceNoise(0.1)]


@pytest.mark.parametrize("method", METHODS)
def test_a_process_that_ends_with_every_message_does_the_same(method, monkeypatch):
    """So a stage that is done again leaves the same: noise and labels are those of the node's state."""
    model_fn, cut = parts_of(method)
    parts = factory.cut_model(model_fn(), *cut.values())  # cutting anew is half of what a new process takes
    monkeypatch.setattr(factory, "cut_model", lambda *_: copy.deepcopy(parts))
    defences = [*ALL, RandomizedResponse(1.0, NUM_CLASSES)]
    if method == "u-shaped":
        defences.append(ClipCutGradient(0.01))
    grid = grid_of(method, defences, FreshProcesses)
    for node, context in grid._contexts.items():
        context.state["psl_flower.secret"] = ConfigRecord({"value": bytes([node] * 32)})
    fresh = trained(method, grid, FEW, transport="messages")
    kept = trained(method, grid_of(method, defences), FEW, transport="messages")
    assert largest_difference(fresh, kept) == 0
    plain = trained(method, grid_of(method, []), FEW, transport="messages")
    assert largest_difference(plain, kept) > 1e-3


@pytest.mark.parametrize("method", ["parallel", "u-shaped"])
def test_clients_that_a_process_serves_as_one_do_what_each_alone_would(method):
    everything = UniformGlobalSampler(sum(population(K).sizes), seed=3)  # a single step: rounding changes no noise yet
    defences = [*ALL, RandomizedResponse(1.0, NUM_CLASSES), *([ClipCutGradient(0.01)] if method == "u-shaped" else [])]
    joint, alone = (
        trained(method, grid_of(method, defences), everything, transport=transport) for transport in TRANSPORTS
    )
    assert largest_difference(joint, alone) < 1e-9
    assert largest_difference(joint, trained(method, grid_of(method, []), everything)) > 1e-3


@pytest.mark.parametrize(("defence", "share"), [(TopK(9), 0.15), (Quantize(4), 0.15)])
def test_what_tells_little_travels_in_few_bytes_and_trains_the_same(defence, share, monkeypatch):
    """Over both carriers; gradients come back as ever."""
    found = {}
    for transport in TRANSPORTS:
        for packs in (True, False):
            with monkeypatch.context() as patch:
                if not packs:
                    patch.setattr(runtime, "packing_of", lambda defences: None)
                steps = Steps()
                options = {"transport": transport, "callbacks": [steps]}
                weights = trained("parallel", grid_of("parallel", [defence]), FEW, **options)
                found[transport, packs] = weights, sum(record.bytes_received for record in steps.records)
        (packed, few), (plain, many) = found[transport, True], found[transport, False]
        assert largest_difference(packed, plain) == 0
        assert few < share * many


# --- each is what it says --------------------------------------------------------------------------------------------
class WithPenalty(nn.Module):
    """Centralised training with what the clients' defences make of the loss."""

    def __init__(self, weight, k):
        super().__init__()
        self.model, self.weight, self.k = tiny_resnet_64(), weight, k
        self.model.train()

    def loss(self, x, y, counts):
        z = self.model.layer1(self.model.stem(x))
        pairs = zip(torch.split(x, counts), torch.split(z, counts), strict=True)
        penalty = sum(distance_correlation(a, b) for a, b in pairs)
        flat = z.flatten(1)
        kept = (flat.abs() >= flat.abs().topk(self.k, dim=1).values[:, -1:]).reshape(z.shape)
        outputs = self.model.head(self.model.layer2(z * kept).mean(dim=(2, 3)))
        return nn.functional.cross_entropy(outputs, y) + self.weight * penalty


@pytest.mark.parametrize(
    ("weight", "k", "transport"),
    [(0.5, 144, "messages"), (0.5, 60, "streams"), (0.5, 60, "messages"), (0.0, 60, "streams")],
)
def test_the_head_is_trained_with_the_gradient_of_the_loss_and_the_penalty(weight, k, transport):
    reference, plan = WithPenalty(weight, k), SAMPLER.plan(population(K), 0)
    optimizer = sgd(reference.parameters())
    batches = planned_batches(plan, K, seed=3, epoch=0, dtype=torch.float64)
    for step, (x, y) in zip(plan, batches, strict=True):
        optimizer.zero_grad()
        reference.loss(x, y, step.quotas.tolist()).backward()
        optimizer.step()
    grid = grid_of("parallel", [TopK(k), DistanceCorrelation(weight)])
    state = trained("parallel", grid, transport=transport)
    assert largest_difference(state, reference.model.state_dict()) < 1e-9


class Skipping(nn.Module):
    """What goes to the body goes past it as well: one and the same tensor leaves, and stays."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.SiLU())
        self.body, self.tail = nn.Linear(8, 8), nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        z = self.stem(x)
        return self.tail(torch.cat([z, self.body(z)], 1))


def skipping():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Skipping().double()


def test_what_stays_with_the_client_is_not_defended():
    plan, reference = SAMPLER.plan(population(K), 0), skipping()
    optimizer = sgd(reference.parameters())
    for step, (x, y) in zip(plan, planned_batches(plan, K, seed=3, epoch=0, dtype=torch.float64), strict=True):
        z = reference.stem(x)
        kept = (z.abs() >= z.abs().topk(3, dim=1).values[:, -1:]).double()
        counts = step.quotas.tolist()
        penalty = sum(map(distance_correlation, torch.split(x, counts), torch.split(z, counts)))
        outputs = reference.tail(torch.cat([z, reference.body(z * kept)], 1))
        optimizer.zero_grad()
        (nn.functional.cross_entropy(outputs, y) + 0.3 * penalty).backward()
        optimizer.step()
    options = {"cut": "body", "tail": "tail"}
    grid = InProcessGrid(
        split_client_app(skipping, data_fn=load_partition_64, defences=[TopK(3), DistanceCorrelation(0.3)], **options),
        K,
    )
    split = ParallelSplitLearning(
        skipping(), sampler=SAMPLER, optimizer=sgd, evaluate_every=0, min_available_nodes=K, **options
    )
    state = split.start(grid, ArrayRecord(skipping().state_dict()), 1).arrays.to_torch_state_dict()
    assert largest_difference(state, reference.state_dict()) < 1e-9


def told(context, epsilon):
    """Return a client's data with the labels that it tells."""
    x, y = load_partition_64(context).tensors
    defence, secret = RandomizedResponse(epsilon, NUM_CLASSES), Secret(bytes([context.node_id] * 32))
    labels = defence.labels(y.numpy(), np.arange(len(y)), secret, b"labels 0 train ")
    assert (labels != y.numpy()).any()
    return TensorDataset(x, torch.from_numpy(labels))


@pytest.mark.parametrize(
    ("method", "sampler"), [*((m, FEW) for m in METHODS), ("parallel", LatentDirichletSampler(150, seed=3))]
)
def test_whatever_is_computed_from_labels_is_computed_from_what_is_told(method, sampler):
    options = {"transport": "messages", "delays": DELAYS if sampler.needs_delays else None}
    defended = trained(method, grid_of(method, [RandomizedResponse(1.0, NUM_CLASSES)]), sampler, **options)
    replaced = grid_of(method, [], data_fn=partial(told, epsilon=1.0))
    assert largest_difference(defended, trained(method, replaced, sampler, **options)) == 0
    assert largest_difference(defended, trained(method, grid_of(method, []), sampler, **options)) > 1e-4


def outputs_of(grid, stage, name):
    """Return what clients gave, a tensor each, in the order of the requests."""
    return [
        tree.leaves(part.outputs[name].value)[0]
        for request, reply in grid.heard
        if request.stage == stage
        for part in reply.parts
    ]


def test_every_gradient_that_leaves_is_clipped():
    def norms(defences):
        grid = grid_of("u-shaped", defences, ListeningGrid)
        trained("u-shaped", grid, FEW, transport="messages")
        return torch.cat([value.flatten(1).norm(dim=1) for value in outputs_of(grid, "tail_loss", "gradient")])

    plain = norms([])
    bound = float(plain.median())
    assert float(plain.max()) > 1.1 * bound
    assert float(norms([ClipCutGradient(bound, noise=0)]).max()) == pytest.approx(bound)


def test_the_server_that_asks_again_averages_nothing_out():
    grid = grid_of("parallel", [GaussianNoise(0.5)], ListeningGrid)
    plain = grid_of("parallel", [], ListeningGrid)
    for each in (grid, plain):
        trained("parallel", each, FEW, transport="messages")
    first, true = outputs_of(grid, "forward", "activations")[0], outputs_of(plain, "forward", "activations")[0]
    assert float((first - true).std()) == pytest.approx(0.5, rel=0.1)
    request = next(request for request, _ in grid.heard if request.stage == "forward")
    state = run_state(grid.run.run_id)
    # the same examples once more, at the same weights and as if for another step
    again = replace(request, orders=replace(request.orders, step=7, checksums=None))
    clients = {node: client for (node, _), client in state.clients.items()}
    reply = answer(ParallelSplit(), state, lambda node, _: clients[node], again)
    assert not reply.failures
    assert torch.equal(tree.leaves(reply.parts[0].outputs["activations"].value)[0], first)


@pytest.mark.parametrize("frozen", [True, False])
def test_noise_is_that_of_the_weights_which_the_rows_come_from(frozen):
    """So a head that does not train leaves the same in every step, however the tail trains: nothing to average."""

    def model_fn():
        model = skipping()
        model.stem.requires_grad_(not frozen)
        return model

    options = {"cut": "body", "tail": "tail", "device": "cpu"}
    grid = ListeningGrid(
        split_client_app(model_fn, data_fn=load_partition_64, defences=[GaussianNoise(0.5)], **options), K
    )
    everything = UniformGlobalSampler(sum(population(K).sizes), seed=3)
    strategy = ParallelSplitLearning(
        model_fn(),
        sampler=everything,
        optimizer=sgd,
        transport="messages",
        evaluate_every=0,
        min_available_nodes=K,
        **options,
    )
    strategy.start(grid, ArrayRecord(model_fn().state_dict()), num_rounds=3)
    left = {}
    for request, reply in grid.heard:
        if request.stage == "head_forward":
            (order,), (part,) = request.orders.each(), reply.parts
            rows = tree.leaves(part.outputs["activations"].value)[0]
            for example, row in zip(order.order_of(order.count), rows, strict=True):
                left.setdefault((order.client, int(example)), []).append(row)
    assert {len(rows) for rows in left.values()} == {3}
    same = [torch.equal(first, row) for first, *others in left.values() for row in others]
    assert all(same) if frozen else not any(same)


@pytest.mark.parametrize(
    ("defences", "secure", "warned"),
    [
        ([GaussianNoise(5.0), TopK(2)], False, True),
        ([GaussianNoise(5.0)], True, False),
        ([RandomizedResponse(5.0, NUM_CLASSES)], False, False),
    ],
)
def test_a_client_is_told_that_its_parameter_gradients_are_not_defended(defences, secure, warned, caplog):
    grid = InProcessGrid(app("parallel", defences, secure_aggregation=secure), K)
    trained("parallel", grid, FEW, secure_aggregation=secure)
    told = [record.getMessage() for record in caplog.records if "defences of rows do nothing" in record.getMessage()]
    assert len(told) == warned
    assert all("Use secure_aggregation=True as well" in text for text in told)


# --- what does not go together ---------------------------------------------------------------------------------------
class Own(Defence):
    """A defence of one's own: only the sign of activations leaves."""

    def rows(self, rows, of):
        return rows.sign()


def test_a_defence_of_ones_own():
    grid = grid_of("parallel", [Own()], ListeningGrid)
    trained("parallel", grid, FEW, transport="messages")
    left = torch.cat(outputs_of(grid, "forward", "activations"))
    assert set(left.unique().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: app("parallel", [ClipCutGradient(1.0)]), ConfigError, "'parallel' the server has the labels and comp"),
        (lambda: app("splitfed-v1", [ClipCutGradient(1.0)]), ConfigError, "keep the labels with a tail"),
        (lambda: app("parallel", GaussianNoise(1)), ConfigError, r"must be a list, \[GaussianNoise\(0.1\)\], say"),
        (lambda: app("parallel", ["GaussianNoise(1)"]), ConfigError, "must be of psl_flower.privacy"),
        (
            lambda: trained("parallel", grid_of("parallel", [RandomizedResponse(1.0, 2)])),
            StepError,
            "RandomizedResponse is for the classes 0 to 1: there are other labels",
        ),
        (
            lambda: trained("parallel", InProcessGrid(app("parallel", lambda context: [None]), K)),
            Exception,
            "defences must be of psl_flower.privacy",
        ),
    ],
)
def test_what_does_not_go_together_is_told(make, error, message):
    with pytest.raises(error, match=message):
        make()
