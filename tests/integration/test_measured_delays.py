"""Two of eight clients sleep, on a clock of the test's: the estimates find them, and the sampler works around them."""

import numpy as np
import pytest
from faulty import FakeTime
from flwr.app import ArrayRecord
from support import CUT, load_partition, sgd, tiny_resnet

from psl_flower import ConfigError, InProcessGrid, ParallelSplitLearning, SplitClient, split_client_app
from psl_flower.client import runtime
from psl_flower.exchange import messages
from psl_flower.samplers import AlignedSampler, Delays, UniformGlobalSampler
from psl_flower.stragglers import DelayEstimator, NoDelays

CLIENTS, SLOW, WAIT = 8, (2, 5), 0.05  # seconds a step


class TwoSleepers:
    def delays(self, client_ids):
        ids = np.asarray(client_ids)
        return Delays(np.where(np.isin(ids, SLOW), WAIT, 0.0), np.zeros(len(ids)))


class Watching(AlignedSampler):
    """Keeps the plans and what they were made from."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.plans = []

    def plan(self, population, epoch=0, **options):
        self.plans.append(super().plan(population, epoch, **options))
        return self.plans[-1]

    def slow_steps(self, epoch):
        """Return in how many steps of an epoch a sleeper takes part."""
        plan = self.plans[epoch]
        return len(np.unique(plan.steps()[np.isin(plan.clients, SLOW)]))


def start(sampler, num_rounds, **options):
    grid = InProcessGrid(split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition), num_nodes=CLIENTS)
    strategy = ParallelSplitLearning(tiny_resnet(), cut=CUT, sampler=sampler, optimizer=sgd, **options)
    return strategy.start(grid, ArrayRecord(tiny_resnet().state_dict()), num_rounds=num_rounds)


def test_estimates_converge_and_the_sampler_adapts_within_two_epochs(monkeypatch):
    clock = FakeTime()
    for module in (runtime, messages):
        monkeypatch.setattr(module, "time", clock)
    sampler, estimator = Watching(24, seed=1), DelayEstimator()
    start(sampler, 3, delays=estimator, simulated_delays=TwoSleepers(), sleep=True)
    delays = estimator.delays(np.arange(CLIENTS))
    typical = delays.latency + delays.per_sample * 3  # about three examples a step and client
    slow = np.isin(np.arange(CLIENTS), SLOW)
    assert (typical[slow] >= WAIT).all()
    assert typical[slow].max() < 1.1 * WAIT
    assert typical[~slow].max() < 0.1 * WAIT
    steps = len(sampler.plans[0])
    assert sampler.slow_steps(0) > 0.8 * steps  # nothing known yet: the sleepers are everywhere
    assert sampler.slow_steps(2) < 0.6 * sampler.slow_steps(0)


def test_simulated_seconds_follow_the_true_delays():
    result = start(UniformGlobalSampler(24, seed=1), 1, delays=NoDelays(), simulated_delays=TwoSleepers())
    metrics = result.train_metrics_clientapp[1]
    # a sleeper is in nearly every step of 24 of some 400 examples
    assert metrics["seconds_simulated"] == pytest.approx(WAIT * metrics["num_steps"], rel=0.25)
    assert metrics["seconds_plan"] >= 0
    assert 0 < metrics["client_mix_mean"] < 2


def test_without_simulated_delays_there_are_no_simulated_seconds():
    result = start(UniformGlobalSampler(24, seed=1), 1)
    assert "seconds_simulated" not in result.train_metrics_clientapp[1]


def test_only_samplers_that_plan_by_class_ask_for_classes(monkeypatch):
    requests = []
    describe = SplitClient.describe

    def spy(self, *, label_counts, **more):
        requests.append(label_counts)
        return describe(self, label_counts=label_counts, **more)

    monkeypatch.setattr(SplitClient, "describe", spy)
    start(UniformGlobalSampler(24), 1)
    assert requests == [False] * CLIENTS
    requests.clear()
    start(AlignedSampler(24), 1, delays=TwoSleepers())
    assert requests == [True] * CLIENTS


def test_a_sampler_that_plans_with_delays_needs_them():
    with pytest.raises(ConfigError, match="plans with delays: pass delays="):
        ParallelSplitLearning(tiny_resnet(), cut=CUT, sampler=AlignedSampler(24))
    with pytest.raises(ConfigError, match="needs simulated_delays"):
        ParallelSplitLearning(tiny_resnet(), cut=CUT, sleep=True)
    with pytest.raises(ConfigError, match="must be a delay model"):
        ParallelSplitLearning(tiny_resnet(), cut=CUT, delays=0.5)
