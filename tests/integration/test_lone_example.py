"""What is lost from an epoch's last step may be a single example: batch norm does not end the run then."""

import json

import torch
from flwr.app import ArrayRecord
from support import NUM_CLASSES, SIDE, client_sizes, load_partition, population, sgd
from torch import nn

from psl_flower import (
    FaultPolicy,
    InProcessGrid,
    ParallelSplitLearning,
    SplitClient,
    SplitModel,
    UniformGlobalSampler,
    split_client_app,
)

K = 16
SAMPLER = UniformGlobalSampler(24, seed=3)


def model_fn(context=None):
    torch.manual_seed(0)
    client = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 8))
    return SplitModel(client=client, server=nn.Sequential(nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, NUM_CLASSES)))


class FailsOnce(SplitClient):
    """One client fails once, at its last example, which is in the last step."""

    at, failed = None, False

    def draw_batch(self, order):
        if (order.client, order.step) == self.at and not FailsOnce.failed:
            FailsOnce.failed = True
            raise OSError("not now")
        return super().draw_batch(order)


def test_the_rest_of_an_epoch_may_be_one_example(tmp_path):
    plan = SAMPLER.plan(population(K))
    last = plan[len(plan) - 1]
    FailsOnce.at = (int(last.clients[last.quotas == 1][0]), len(plan) - 1)
    strategy = ParallelSplitLearning(
        model_fn(),
        sampler=SAMPLER,
        optimizer=sgd,
        output_dir=tmp_path,
        min_available_nodes=K,
        evaluate_every=0,
        faults=FaultPolicy(mistakes="retry"),
    )
    app = split_client_app(model_fn, data_fn=load_partition, client_class=FailsOnce)
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(model_fn().state_dict()), num_rounds=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sizes = [line["batch_size"] for line in lines if line["kind"] == "step" and line["round"] == 1]
    assert sizes[-1] == 1
    assert sum(sizes) == sum(client_sizes(K))
    assert result.train_metrics_clientapp[2]["num_examples"] == sum(client_sizes(K))
    state = result.arrays.to_torch_state_dict()
    assert state["server.0.num_batches_tracked"] == 2 * len(plan)  # all steps but that one
    assert all(torch.isfinite(t).all() for t in state.values())
