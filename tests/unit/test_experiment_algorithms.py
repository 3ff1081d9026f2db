"""The algorithms against their papers, on a problem small enough to compute by hand.

The model is ``v * w * x`` with a scalar w (the client half) and two logits' weights v (the server half). Client 0 holds
the examples 2 and 1 of classes 0 and 1, client 1 the example 3 of class 1.
"""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from support import largest_difference

from psl_flower import InProcessGrid
from psl_flower.app.task import load_images, make_model, make_optimizer, split_indices
from psl_flower.config import RunConfig
from psl_flower.experiments import Setting, Training, open_training
from psl_flower.experiments.data import Data, DeviceImages
from psl_flower.records import RoundRecord, StepRecord

X, Y = np.array([2.0, 1.0, 3.0]), np.array([0, 1, 1])
SHARES = [np.array([0, 1]), np.array([2])]
WEIGHTS = [2 / 3, 1 / 3]
W, V = 0.3, np.array([0.2, -0.4])
RATE, MOMENTUM = 0.1, 0.9


def gradients(w, v, rows):
    """Return the gradients of the mean cross-entropy over `rows`, by the chain rule."""
    x, h = X[rows], w * X[rows]
    z = h[:, None] * v
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    error = (p - np.eye(2)[Y[rows]]) / len(rows)
    return ((error @ v) * x).sum(), (error * h[:, None]).sum(axis=0)


class Momentum:
    """SGD with momentum as torch has it: m <- 0.9 m + g; p <- p - rate * m."""

    def __init__(self):
        self.m = 0.0

    def step(self, p, g):
        self.m = MOMENTUM * self.m + g
        return p - RATE * self.m


def tiny_data():
    pixels = X.astype(np.uint8).reshape(3, 1, 1, 1)
    images = DeviceImages(pixels, Y, mean=(0.0,), std=(1 / 255,), device=torch.device("cpu"), dtype=torch.float64)
    return Data(images, images, SHARES, 2)


def tiny_training(algorithm, rounds=2, seed=0, config=None, **options):
    settings = {"batch_size": 3, "learning_rate": RATE, "momentum": MOMENTUM, "cut": "server", "seed": seed}
    config = RunConfig(**{**settings, "num_server_rounds": rounds, **(config or {})})
    setting = Setting(config=config, num_clients=2, algorithm=algorithm, double=True, **options)
    linear = {"client": torch.nn.Linear(1, 1, bias=False), "server": torch.nn.Linear(1, 2, bias=False)}
    model = torch.nn.Sequential(OrderedDict(flat=torch.nn.Flatten(), **linear)).double()
    with torch.no_grad():
        model.client.weight.fill_(W)
        model.server.weight.copy_(torch.tensor(V)[:, None])
    return Training(setting, tiny_data(), model)


def trained(algorithm, **options):
    training = tiny_training(algorithm, **options)
    rounds = [r for r in training.records() if isinstance(r, RoundRecord)]
    w, v = training.model.client.weight, training.model.server.weight
    return w.item(), v.detach().numpy()[:, 0], rounds


def assert_weights(algorithm, w, v, **options):
    got_w, got_v, _ = trained(algorithm, **options)
    assert got_w == pytest.approx(w, abs=1e-7)
    assert got_v == pytest.approx(v, abs=1e-7)


# --- the papers' updates ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["centralised", "psl"])
def test_one_update_a_global_batch(algorithm):
    w, v, opt_w, opt_v = W, V, Momentum(), Momentum()
    for _ in range(2):
        gw, gv = gradients(w, v, [0, 1, 2])
        w, v = opt_w.step(w, gw), opt_v.step(v, gv)
    assert_weights(algorithm, w, v)


def test_sequential_split_learning_hands_the_client_half_and_its_momentum_on():
    w, v, opt_w, opt_v = W, V, Momentum(), Momentum()
    for _ in range(2):
        for rows in SHARES:
            gw, gv = gradients(w, v, rows)
            w, v = opt_w.step(w, gw), opt_v.step(v, gv)
    assert_weights("sl", w, v)


@pytest.mark.parametrize("algorithm", ["fedavg", "splitfed-v1"])
@pytest.mark.parametrize("local_epochs", [1, 3])
def test_both_halves_are_averaged_by_how_much_clients_hold(algorithm, local_epochs):
    w, v = W, V
    for _ in range(2):
        copies = []
        for rows in SHARES:
            wk, vk, opt_w, opt_v = w, v, Momentum(), Momentum()
            for _ in range(local_epochs):
                gw, gv = gradients(wk, vk, rows)
                wk, vk = opt_w.step(wk, gw), opt_v.step(vk, gv)
            copies.append((wk, vk))
        w = sum(weight * wk for weight, (wk, _) in zip(WEIGHTS, copies, strict=True))
        v = sum(weight * vk for weight, (_, vk) in zip(WEIGHTS, copies, strict=True))
    assert_weights(algorithm, w, v, local_epochs=local_epochs)


def test_splitfed_v2_averages_client_halves_and_trains_one_server_half_in_random_order():
    orders = set()
    for seed in range(6):
        got_w, got_v, _ = trained("splitfed-v2", seed=seed)
        by_hand = {order: splitfed_v2(order) for order in [(0, 0), (0, 1), (1, 0), (1, 1)]}
        fits = [o for o, (w, v) in by_hand.items() if abs(w - got_w) < 1e-7 and np.abs(v - got_v).max() < 1e-7]
        assert len(fits) == 1
        orders.update(fits)
    assert {first for first, _ in orders} == {second for _, second in orders} == {0, 1}


def splitfed_v2(first_of_rounds):
    w, v, opt_v = W, V, Momentum()
    for first in first_of_rounds:
        copies = {}
        for k in (first, 1 - first):
            gw, gv = gradients(w, v, SHARES[k])
            copies[k], v = Momentum().step(w, gw), opt_v.step(v, gv)
        w = WEIGHTS[0] * copies[0] + WEIGHTS[1] * copies[1]
    return w, v


# --- clocks ----------------------------------------------------------------------------------------------------------
def test_simulated_time(tmp_path):
    """Client 0 takes two batches of one example, client 1 one."""
    path = tmp_path / "delays.csv"
    path.write_text("client_id,latency,per_sample\n0,1,0.5\n1,2,0.25\n")
    delays = {"config": {"delays": "csv", "delays_path": str(path)}, "rounds": 1, "local_batch_size": 1}
    expected = {
        "centralised": None,
        "psl": max(1 + 0.5 * 2, 2 + 0.25),  # one step, with all
        "sl": 2 * (1 + 0.5) + (2 + 0.25),
        "splitfed-v1": max(2 * (1 + 0.5), 2 + 0.25),
        "splitfed-v2": 2 * (1 + 0.5) + (2 + 0.25),
        "fedavg": max(1 + 0.5 * 2, 2 + 0.25),
    }
    for algorithm, seconds in expected.items():
        assert trained(algorithm, **delays)[2][0].seconds_simulated == seconds, algorithm


def test_steps_of_clients_that_work_at_the_same_time_have_no_time_of_their_own():
    delays = {"config": {"delays": "slow-fraction"}, "rounds": 1}
    timed = {}
    for algorithm in ("psl", "sl", "splitfed-v1", "splitfed-v2", "fedavg"):
        steps = [r for r in tiny_training(algorithm, **delays).records() if isinstance(r, StepRecord)]
        timed[algorithm] = {r.seconds_simulated is not None for r in steps}
    assert timed == {"psl": {True}, "sl": {True}, "splitfed-v1": {False}, "splitfed-v2": {True}, "fedavg": {False}}


# --- against Flower --------------------------------------------------------------------------------------------------
def test_fedavg_is_flowers():
    """Weights and buffers of batch norm agree with Flower's own strategy, over two rounds.

    In double precision: Flower adds the clients up in an order that it draws, and what single precision makes of
    another order is no longer small after two rounds.
    """
    num_clients, batch_size = 3, 32
    options = {"model": "tiny-cnn", "partition": "mild", "classes_per_client": 4}
    config = RunConfig(num_server_rounds=2, batch_size=64, device="cpu", **options)
    setting = Setting(
        config=config,
        num_clients=num_clients,
        algorithm="fedavg",
        local_batch_size=batch_size,
        double=True,
    )
    app = ClientApp()

    @app.train()
    def train(message, context):
        k = context.node_config["partition-id"]
        epoch = message.content["config"]["server-round"] - 1
        images = load_images(config, "train", split_indices(config, "train", num_clients)[k])
        model = make_model(config).double()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = make_optimizer(config, model.parameters())
        order = np.random.default_rng([config.seed, epoch, k]).permutation(len(images))
        model.train()
        for rows in np.array_split(order, -(-len(order) // batch_size)):
            inputs, targets = images.get_batch(rows)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs.double()), targets).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(images)})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=num_clients)
    grid = InProcessGrid(app, num_nodes=num_clients)
    arrays = ArrayRecord(make_model(config).double().state_dict())
    expected = strategy.start(grid, arrays, num_rounds=2).arrays.to_torch_state_dict()

    training = open_training(setting)
    list(training.records())
    state = training.model.state_dict()
    counted = [name for name in state if "num_batches_tracked" in name]  # truncated every round there
    assert all(abs(state.pop(name).item() - expected.pop(name).item()) < 2 for name in counted)
    assert largest_difference(state, expected) < 1e-9
    first = make_model(config).double().state_dict()
    assert largest_difference(state, {name: first[name] for name in state}) > 1e-2
    assert any("running_mean" in name for name in state)
