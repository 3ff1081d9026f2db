"""The vectorised path equals the split run: parameters, batch statistics, metrics and clocks."""

import sys
from collections import OrderedDict
from dataclasses import replace
from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord
from support import largest_difference
from torch import nn

from psl_flower import InProcessGrid, ParallelSplitLearning, split_client_app
from psl_flower.app.client_app import cut_fn
from psl_flower.app.task import central_test, cut_of, load_partition, make_model, make_optimizer
from psl_flower.config import RunConfig
from psl_flower.experiments import Setting, open_training
from psl_flower.experiments import training as training_module
from psl_flower.records import RoundRecord, StepRecord
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.strategy.recorder import RunRecorder

NUM_CLIENTS = 5


def config_for(sampler, **options):
    return RunConfig(
        **{
            "num_server_rounds": 1,
            "sampler": sampler,
            "batch_size": 64,
            "seed": 3,
            "partition": "severe",
            "delays": "slow-fraction",
            "delays_fraction": 0.3,
            "delays_per_sample": 0.1,
            "device": "cpu",
            **options,
        }
    )


class Doubled:
    """An ImageSet in double precision."""

    def __init__(self, images):
        self.images, self.targets = images, images.targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.get_batch([index])

    def get_batch(self, indices):
        inputs, targets = self.images.get_batch(indices)
        return inputs.double(), targets


def split_run(config, *, double, monkeypatch):
    """Train with messages; return the weights, and the records of the run."""

    def model_fn(context):
        model = make_model(RunConfig.read(context.run_config))
        return model.double() if double else model

    def data_fn(context):
        return Doubled(load_partition(context)[0]) if double else load_partition(context)[0]

    recorders = []

    class Recorder(RunRecorder):
        def __init__(self, *args):
            super().__init__(*args)
            recorders.append(self)

    monkeypatch.setattr("psl_flower.strategy.strategy.RunRecorder", Recorder)
    app = split_client_app(model_fn, cut=cut_fn, data_fn=data_fn)
    grid = InProcessGrid(app, num_nodes=NUM_CLIENTS, run_config=dict(config.as_run_config()))
    model, delays = make_model(config), config.make_delays()
    model = model.double() if double else model
    strategy = ParallelSplitLearning(
        model,
        cut=cut_of(config),
        sampler=config.make_sampler(),
        optimizer=partial(make_optimizer, config),
        delays=delays[0],
        simulated_delays=delays[1],
        device="cpu",
        transport="messages",
        evaluate_every=0,
    )
    result = strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=config.num_server_rounds,
        evaluate_fn=None if double else central_test(config),
    )
    return result.arrays.to_torch_state_dict(), recorders[0]


def vectorised(config, *, double):
    setting = Setting(config=config, num_clients=NUM_CLIENTS, double=double)
    training = open_training(setting)
    records = list(training.records())
    steps = [r for r in records if isinstance(r, StepRecord)]
    return training.model.state_dict(), steps, [r for r in records if isinstance(r, RoundRecord)]


@pytest.mark.parametrize(
    ("sampler", "augment"),
    [
        # augmentation is drawn in the same way whether or not quotas are by class, as lds has them
        pytest.param(sampler, augment, marks=() if augment == "none" or sampler == "lds" else pytest.mark.slow)
        for sampler in SAMPLERS
        for augment in ("none", "crop-flip")
    ],
)
def test_equals_the_split_run(sampler, augment, monkeypatch):
    config = config_for(sampler, augment=augment)
    expected, recorder = split_run(config, double=True, monkeypatch=monkeypatch)
    state, steps, rounds = vectorised(config, double=True)
    assert len(steps) >= 20
    assert any("running_var" in name for name in state)
    assert largest_difference(state, expected) < 1e-9
    first = make_model(config).double().state_dict()
    assert largest_difference(state, first) > 1e-2  # it did train
    assert_same_records(steps, recorder.steps, 1e-9)
    assert_same_records(rounds, recorder.rounds, 1e-9)


def test_equals_the_split_run_in_single_precision(monkeypatch):
    config = config_for("ugs", learning_rate=0.005)
    expected, recorder = split_run(config, double=False, monkeypatch=monkeypatch)
    state, steps, rounds = vectorised(config, double=False)
    assert len(steps) >= 20
    assert largest_difference(state, expected) < 1e-5
    assert_same_records(steps, recorder.steps, 1e-5)
    assert_same_records(rounds, recorder.rounds, 1e-5)


def test_the_optimizer_carries_over_rounds(monkeypatch):
    # in double precision only: Adam divides gradients that are zero but for rounding by their own size
    config = config_for("ugs", num_server_rounds=2, batch_size=128, optimizer="adam", learning_rate=0.005)
    expected, recorder = split_run(config, double=True, monkeypatch=monkeypatch)
    state, steps, rounds = vectorised(config, double=True)
    assert largest_difference(state, expected) < 1e-9
    assert_same_records(steps, recorder.steps, 1e-9)
    assert_same_records(rounds, recorder.rounds, 1e-9)


def normed_head(config):
    """Batch norm in the server half that sees one value a channel and example."""
    torch.manual_seed(config.seed)
    layers = {
        "flat": nn.Flatten(),
        "first": nn.Linear(64, 24),
        "norm": nn.BatchNorm1d(24),
        "act": nn.SiLU(),
        "head": nn.Linear(24, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def test_equals_the_split_run_where_an_epoch_ends_in_a_single_example(monkeypatch):
    """Fixed quotas leave such a rest; batch norm has no statistics of it."""
    for module in (sys.modules[__name__], training_module):
        monkeypatch.setattr(module, "make_model", normed_head)
    config = config_for("fls", batch_size=60, cut="norm", num_server_rounds=2)
    expected, recorder = split_run(config, double=True, monkeypatch=monkeypatch)
    state, steps, rounds = vectorised(config, double=True)
    assert [step.batch_size for step in steps].count(1) == 2
    assert state["norm.num_batches_tracked"] == len(steps) - 2
    assert largest_difference(state, expected) < 1e-9
    assert_same_records(steps, recorder.steps, 1e-9)
    assert_same_records(rounds, recorder.rounds, 1e-9)


def assert_same_records(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name, expected in vars(b).items():
            value = getattr(a, name)
            if name.startswith("bytes"):
                assert value is None
            elif name == "evaluate_serverapp" and expected:
                assert value == pytest.approx(expected, abs=tolerance)
            elif name not in ("seconds_real", "seconds_plan", "evaluate_serverapp"):
                assert value == pytest.approx(expected, abs=tolerance), name


def test_the_comparison_is_sensitive():
    """Another order of examples must show: else the comparisons above prove nothing."""
    config = config_for("ugs", batch_size=256)
    state = vectorised(config, double=True)[0]
    assert largest_difference(state, vectorised(config, double=True)[0]) == 0
    assert largest_difference(state, vectorised(replace(config, batch_size=200), double=True)[0]) > 1e-6


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
