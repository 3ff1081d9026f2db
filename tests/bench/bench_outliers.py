"""False alarms of `FaultPolicy.outlier_bound` on honest clients of skewed data, and the smallest lie that it catches.

16 clients with two of ten classes each (digits), batches of 64, a small CNN, 20 epochs: until every example is learnt,
and gradients of a few are all there is. "units": each client's pictures are times a factor of its own, lognormal with
a standard deviation of 1, as of devices that measure in units of their own.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from flwr.app import ArrayRecord
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from psl_flower import FaultPolicy, InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, split_client_app, tree
from psl_flower.client import runtime
from psl_flower.protocol import Leaf

K, LIAR = 16, 3


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def data(units):
    images, labels = load_digits(return_X_y=True)
    factors = np.exp(np.random.default_rng(0).normal(size=K)) if units else np.ones(K)

    def own(context):
        k = context.node_config["partition-id"]
        rows = np.flatnonzero((labels == k % 10) | (labels == (k + 1) % 10))[k // 10 :: 2]
        pictures = torch.tensor(images[rows] / 16 * factors[k], dtype=torch.float32).reshape(-1, 1, 8, 8)
        return TensorDataset(pictures, torch.tensor(labels[rows]))

    return own


def refused(bound, units, rounds, lie=None):
    """Return how many requests were refused for their norm, of all that were answered."""
    honest = runtime._Work.do

    def lying(work, request, clients):
        part = honest(work, request, clients)
        stage, factor = lie
        name = {"forward": "activations", "backward": "head"}[stage]
        if request.stage == stage and LIAR in request.orders.clients and request.orders.step == 20:
            leaf = part.outputs[name]
            scaled = Leaf(leaf.kind, tree.map_leaves(lambda t: t * factor, leaf.value), leaf.exact)
            part = replace(part, outputs={**part.outputs, name: scaled})
        return part

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(runtime._Work, "do", lying if lie else honest):
        strategy = ParallelSplitLearning(
            model(),
            cut="1",
            sampler=UniformGlobalSampler(64, seed=0),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            min_available_nodes=K,
            evaluate_every=0,
            faults=FaultPolicy(outlier_bound=bound),
            output_dir=folder,
        )
        app = split_client_app(model, cut="1", data_fn=data(units))
        strategy.start(InProcessGrid(app, K), ArrayRecord(model().state_dict()), num_rounds=rounds)
        summary = json.loads((Path(folder) / "summary.json").read_text())
        return summary["refused"].get("far out of bounds", 0), summary["steps_committed"]


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print("bound   data    false alarms   steps")
    for bound in (3.0, 5.0, 10.0):
        for units in (False, True):
            alarms, steps = refused(bound, units, rounds)
            print(f"{bound:5g}   {'units' if units else 'plain':6s}  {alarms:12d}   {steps:5d}", flush=True)
    print("lies at step 20 of one client that are caught, bound 10")
    for stage in ("forward", "backward"):
        for factor in (1e1, 1e2, 1e3, 1e4, 1e5, 1e6):
            caught = refused(10.0, False, 1, (stage, factor))[0] > 0
            print(f"{stage:9s} times {factor:7g}: {'caught' if caught else 'passes'}", flush=True)
