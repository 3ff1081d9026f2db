"""Activations of a frozen head are asked for once, and training goes on as if they came each time."""

import pytest
import torch
from flwr.app import ArrayRecord
from support import DELAYS, Steps, largest_difference, load_partition_64
from support import fast_sgd as sgd
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from psl_flower import (
    ConfigError,
    InProcessGrid,
    ParallelSplitLearning,
    UniformGlobalSampler,
    split_client_app,
)
from psl_flower.errors import StepError
from psl_flower.exchange.streams import StreamOptions
from psl_flower.privacy import GaussianNoise
from psl_flower.samplers import LatencyBudgetedSampler, PoissonGlobalSampler
from psl_flower.stragglers import DelayEstimator
from psl_flower.strategy.kept import KeptRows

K = 3
SAMPLER = UniformGlobalSampler(40, seed=1)


def net(dropout=0.0, frozen=True):
    """Return a model whose head gives a row the same bits in any batch, as a matrix product does not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = (nn.GroupNorm(1, 1), nn.Dropout(dropout), nn.ReLU())
        model = nn.Sequential(*head, nn.Flatten(), nn.Linear(36, 8), nn.SiLU(), nn.Linear(8, 4)).double()
    model[0].weight.data.fill_(1.5)
    model[0].requires_grad_(not frozen)
    return model


def load(context):
    train = load_partition_64(context)
    return train, TensorDataset(*(t[:30] for t in train.tensors))


class Augmented(Dataset):
    """Draws random numbers, as augmentation does."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + torch.rand(()), y


def trained(model_fn=net, data_fn=load, rounds=2, client=None, **options):
    """Return the result, and the record of each step."""
    steps, model = Steps(), model_fn()
    app = split_client_app(model_fn, cut="3", data_fn=data_fn, device="cpu", **(client or {}))
    strategy = ParallelSplitLearning(
        model,
        cut="3",
        optimizer=sgd,
        device="cpu",
        min_available_nodes=K,
        callbacks=[steps],
        **{"sampler": SAMPLER, "transport": "streams", **options},
    )
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(model.state_dict()), rounds)
    return result, steps.records


@pytest.mark.parametrize(
    ("transport", "client"),
    [
        ("messages", {}),
        ("streams", {"defences": [GaussianNoise(0.1)]}),
        pytest.param("streams", {}, marks=pytest.mark.slow),
    ],
)
def test_equal_to_the_bit_and_nothing_is_sent_twice(transport, client):
    (plain, each), (kept, once) = (
        trained(transport=transport, client=client, cache_activations=cache) for cache in (False, True)
    )
    noise = bool(client)  # is the client's own secret's, which is another in each run
    difference = largest_difference(plain.arrays.to_torch_state_dict(), kept.arrays.to_torch_state_dict())
    assert difference == 0 if not noise else 0 < difference < 0.2
    if not noise:
        assert dict(plain.evaluate_metrics_clientapp[2]) == dict(kept.evaluate_metrics_clientapp[2])
    steps = len(each) // 2
    assert [r.bytes_received for r in once[1:steps]] == [r.bytes_received for r in each[1:steps]]
    for full, record in zip(each[steps:], once[steps:], strict=True):
        assert record.batch_size == full.batch_size
        assert record.bytes_sent == record.bytes_received == 0
        assert full.bytes_received == (36 * 8 + 8) * record.batch_size


def test_clients_that_are_not_asked_are_not_waited_for():
    """Neither measured nor on the virtual clock."""
    delays = DelayEstimator()
    _, records = trained(cache_activations=True, delays=delays, simulated_delays=DELAYS)
    steps = len(records) // 2
    assert all(record.seconds_simulated > 0 for record in records[:steps])
    assert [record.seconds_simulated for record in records[steps:]] == [0] * steps
    assert len(delays.state_dict()["clients"]) == K


def test_nothing_is_kept_of_a_prediction(monkeypatch):
    monkeypatch.setattr(KeptRows, "put", lambda *_: pytest.fail("kept"))
    model = net()
    app = split_client_app(net, cut="3", data_fn=load, device="cpu")
    strategy = ParallelSplitLearning(model, cut="3", device="cpu", min_available_nodes=K, cache_activations=True)
    found = strategy.predict(InProcessGrid(app, K), ArrayRecord(model.state_dict()))
    assert [len(each.rows) for each in found.values()] == [30] * K


def test_a_resumed_run_asks_once_more(tmp_path):
    folder = {"output_dir": tmp_path, "cache_activations": True}
    whole, _ = trained(cache_activations=True)
    trained(rounds=1, **folder)
    resumed, records = trained(resume_from="latest", **folder)
    assert largest_difference(whole.arrays.to_torch_state_dict(), resumed.arrays.to_torch_state_dict()) == 0
    assert all(record.bytes_received > 0 for record in records)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_fn": lambda: net(dropout=0.1)}, "the part that is run draws random numbers: set its dropout to 0"),
        ({"data_fn": lambda context: Augmented(load_partition_64(context))}, "draws random numbers: turn augmentation"),
    ],
)
def test_what_is_not_the_same_each_time_is_refused(changes, text):
    """Also where clients of one process are joined to one batch."""
    with pytest.raises(StepError, match=text):
        trained(rounds=1, cache_activations=True, **changes)


def test_clients_see_that_their_own_parts_are_frozen(monkeypatch):
    """Whatever the server says of its model."""
    monkeypatch.setattr("psl_flower.strategy.strategy.check_cache", lambda cache, *_: cache)
    with pytest.raises(StepError, match=r"'0\.weight' of the client half trains: freeze it"):
        trained(lambda: net(frozen=False), rounds=1, cache_activations=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model": net(frozen=False)}, "a frozen head, 2 of its parameters train, '0.weight' is the first"),
        (
            {"tail": "6"},
            "labels that come with the activations: method 'u-shaped' leaves .* tail_loss and tail_predict",
        ),
        ({"method": "splitfed-v1"}, "method 'splitfed-v1' has none"),
        ({"sampler": LatencyBudgetedSampler(8), "delays": DELAYS}, "LatencyBudgetedSampler plans by class"),
        ({"sampler": PoissonGlobalSampler(8)}, "PoissonGlobalSampler lets clients draw"),
        ({"stream_options": StreamOptions(wire_dtype="float16")}, "wire_dtype 'float16' scales all by the largest"),
        ({"cache_activations": "yes"}, "must be True or False, got 'yes'"),
    ],
)
def test_refused_at_once(options, text):
    with pytest.raises(ConfigError, match=text):
        ParallelSplitLearning(**{"model": net(), "cut": "3", "cache_activations": True, **options})
