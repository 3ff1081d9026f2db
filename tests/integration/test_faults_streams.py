"""Faults over streams within one process: clients share forward passes and sums of gradients, and still fail alone."""

import json

import numpy as np
import pytest
from flwr.app import ArrayRecord
from support import CUT, client_sizes, largest_difference, load_partition, sgd, tiny_resnet

from psl_flower import (
    FaultPolicy,
    InProcessGrid,
    ParallelSplitLearning,
    SplitClient,
    UniformGlobalSampler,
    split_client_app,
)
from psl_flower.server import LocalBackend
from psl_flower.strategy import strategy as strategy_module

K = 6


class Moody(SplitClient):
    """In some steps it fails to make its batch, in some it makes one that is not finite."""

    share, failures, mood = 0.0, set(), 1.0

    def draw(self, order):
        where = (order.client, order.epoch, order.step)
        self.mood = np.random.default_rng([9, *where]).random()
        if self.mood < Moody.share:
            Moody.failures.add(where)
        return super().draw(order)

    def batch(self, dataset, indices):
        batch = super().batch(dataset, indices)
        if self.mood < Moody.share / 2:
            raise OSError("disk on fire")
        return batch.inputs * float("nan") if self.mood < Moody.share else batch.inputs, batch.target


def start(tmp_path, share, **options):
    Moody.share, Moody.failures = share, set()
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition, client_class=Moody)
    strategy = ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        sampler=UniformGlobalSampler(24, seed=3),
        optimizer=sgd,
        transport="streams",
        min_available_nodes=K,
        evaluate_every=0,
        output_dir=tmp_path,
        faults=FaultPolicy(mistakes="retry"),
        **options,
    )
    return strategy.start(InProcessGrid(app, K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=2)


def test_batches_that_fail_cost_their_clients_the_step(tmp_path):
    result = start(tmp_path, 0.08)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(Moody.failures) > 8
    again = summary["steps_redone"] * K  # in a step that is tried again, the same clients fail
    assert 0 <= sum(summary["refused"].values()) - len(Moody.failures) <= again
    assert set(summary["refused"]) == {"client error", "not finite"}
    for metrics in result.train_metrics_clientapp.values():
        assert metrics["num_examples"] == sum(client_sizes(K))


def test_resuming_over_streams(tmp_path, monkeypatch):
    whole = start(tmp_path / "whole", 0.0)

    class Killed(BaseException):
        pass

    class Dies(LocalBackend):
        left = 25

        def commit(self, gradients):
            Dies.left -= 1
            if Dies.left < 0:
                raise Killed
            super().commit(gradients)

    monkeypatch.setattr(strategy_module, "LocalBackend", Dies)
    with pytest.raises(Killed):
        start(tmp_path / "cut", 0.0, checkpoint_every=4)
    monkeypatch.undo()
    resumed = start(tmp_path / "cut", 0.0, checkpoint_every=4, resume_from="latest")
    states = [r.arrays.to_torch_state_dict() for r in (resumed, whole)]
    assert largest_difference(*states) < 1e-6
