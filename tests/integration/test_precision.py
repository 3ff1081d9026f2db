"""Training under autocast to bfloat16 equals centralised training under autocast, and sends half the bytes."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from support import Steps, largest_difference, load_partition, planned_batches, population
from support import fast_sgd as sgd
from torch import nn

from psl_flower import (
    ConfigError,
    InProcessGrid,
    ParallelSplitLearning,
    UniformGlobalSampler,
    split_client_app,
)
from psl_flower.exchange.streams import StreamOptions
from psl_flower.privacy import DPSGD, DistanceCorrelation

K = 3
SAMPLER = UniformGlobalSampler(40, seed=1)
PRIVATE = DPSGD(clip=1e3, noise=0.0, batch_size=40, delta=1e-3)


def small_net(dtype=torch.float32):
    """Return a model whose values at each cut, under autocast, are in bfloat16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 3), nn.SiLU(), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(6 * 4 * 4, 4)).to(dtype)


def trained(precision, num_clients=K, *, wire="float32", transport="messages", tail=None, method=None, **options):
    """Return the weights after a round, and what crossed in its second step, sent and received."""
    steps, model = Steps(), small_net()
    both = {"cut": "2", "tail": tail, "method": method}
    own = {name: options[name] for name in ("private", "secure_aggregation") if name in options}
    app = split_client_app(small_net, data_fn=load_partition, device="cpu", optimizer=sgd, **both, **own)
    strategy = ParallelSplitLearning(
        model,
        sampler=SAMPLER,
        optimizer=sgd,
        device="cpu",
        min_available_nodes=num_clients,
        evaluate_every=0,
        transport=transport,
        stream_options=StreamOptions(wire_dtype=wire),
        precision=precision,
        callbacks=[steps],
        **both,
        **options,
    )
    result = strategy.start(InProcessGrid(app, num_clients), ArrayRecord(model.state_dict()), 1)
    return result.arrays.to_torch_state_dict(), steps.records


def centralised(precision, num_clients=K):
    """Return the weights of torch's own loop."""
    model = small_net()
    step = sgd(model.parameters())
    plan = SAMPLER.plan(population(num_clients), 0)
    for x, y in planned_batches(plan, num_clients, seed=1, epoch=0, dtype=torch.float32):
        step.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        step.step()
    return model.state_dict()


# of one client every product is that of the whole batch; those of several are rounded to bfloat16 client by client
@pytest.mark.parametrize(
    ("num_clients", "transport", "tail", "tolerance"),
    [(1, "messages", None, 1e-6), (1, "streams", None, 1e-6), (1, "streams", "5", 1e-6), (K, "streams", None, 4e-3)],
)
def test_equals_torch_under_autocast(num_clients, transport, tail, tolerance):
    split, _ = trained("bf16", num_clients, transport=transport, tail=tail)
    reference, full = centralised("bf16", num_clients), centralised("full", num_clients)
    assert largest_difference(split, reference) < tolerance
    assert largest_difference(reference, full) > 5e-4


@pytest.mark.parametrize(("transport", "tail"), [("messages", None), ("streams", None), ("streams", "5")])
def test_what_crosses_in_bfloat16_has_half_the_bytes(transport, tail):
    (_, full), (_, half) = (trained(precision, transport=transport, tail=tail) for precision in ("full", "bf16"))
    values = 6 * 6 * 6 + (0 if tail is None else 6 * 4 * 4)  # of an example, each way
    for one, other in zip(full[1:], half[1:], strict=True):
        assert one.bytes_sent - other.bytes_sent == 2 * values * one.batch_size
        assert one.bytes_received - other.bytes_received == 2 * values * one.batch_size


def test_fewer_bits_than_bfloat16_where_the_wire_has_fewer():
    _, half = trained("bf16", transport="streams")
    _, eight = trained("bf16", transport="streams", wire="int8")
    rows = half[1].batch_size
    assert half[1].bytes_received - eight[1].bytes_received == (6 * 6 * 6 - 4) * rows  # a scale a row
    assert eight[-1].loss == pytest.approx(half[-1].loss, abs=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"secure_aggregation": True},
        pytest.param({"private": PRIVATE}, marks=pytest.mark.slow),
        {"private": PRIVATE, "tail": "5"},
        pytest.param({"method": "splitfed-v2"}, marks=pytest.mark.slow),
    ],
    ids=["secure", "private", "private-u", "splitfed"],
)
def test_with_what_else_there_is(options):
    """Close to the same in full precision, and not the same."""
    (half, _), (full, _) = (trained(precision, transport="streams", **options) for precision in ("bf16", "full"))
    assert 0 < largest_difference(half, full) < 0.02
    first = small_net().state_dict()
    assert largest_difference(full, first) > 0.05


@pytest.mark.parametrize("tail", [None, "5"])
def test_users_are_given_outputs_that_numpy_takes(tail):
    """And so is the distance correlation of what leaves in bfloat16, whose distances torch does not compute in it."""

    def data(context):
        return (load_partition(context),) * 2

    def on_predict(outputs, rows, context):
        assert outputs.numpy().shape == (len(rows), 4)
        return outputs.to(torch.bfloat16)

    model, cuts = small_net(), {"cut": "2", "tail": tail}
    defended = {"defences": [DistanceCorrelation(0.5)]}
    app = split_client_app(
        small_net, data_fn=data, device="cpu", **cuts, **defended, **({"on_predict": on_predict} if tail else {})
    )
    strategy = ParallelSplitLearning(
        model,
        sampler=SAMPLER,
        optimizer=sgd,
        device="cpu",
        min_available_nodes=K,
        transport="messages",
        precision="bf16",
        metrics=None if tail else {"largest": lambda outputs, labels: float(outputs.numpy().max())},
        **cuts,
    )
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(model.state_dict()), 1)
    assert tail or np.isfinite(result.evaluate_metrics_clientapp[1]["largest"])
    found = strategy.predict(InProcessGrid(app, K), result)
    assert {each.outputs.numpy().dtype for each in found.values()} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("precision", "dtype", "text"),
    [
        ("fp16", torch.float32, "needs the loss to be scaled.*take 'bf16'"),
        ("bf17", torch.float32, "precision must be one of 'full', 'bf16'.*did you mean 'bf16'"),
        ("bf16", torch.float64, "for weights in float32, those of this model are torch.float64"),
    ],
)
def test_refused(precision, dtype, text):
    with pytest.raises(ConfigError, match=text):
        ParallelSplitLearning(small_net(dtype), cut="2", precision=precision)
