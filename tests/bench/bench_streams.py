"""Steps over streams against centralised steps: the same model, batch size and optimizer, taken in turns.

    OMP_NUM_THREADS=1 python tests/bench/bench_streams.py [--quick] [--threads N]

Two client processes that stay, as Ray's actors on two cores do. A centralised step follows each split step, in this
process, so that both see the same machine; medians over the steps are compared. `--threads` are the ServerApp's, and
the centralised step's in the second column.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from process_grid import ProcessGrid

from psl_flower import ParallelSplitLearning, UniformGlobalSampler, replace_batch_norm, split_client_app
from psl_flower.app.models import build_model, default_cut
from psl_flower.exchange.streams import StreamOptions

BATCH = 128


def make_model(name):
    return replace_batch_norm(build_model(name, in_channels=3, num_classes=10, seed=0), before=default_cut(name))


def load(per_client, context):
    rng = np.random.default_rng(context.node_config["partition-id"])
    images = rng.normal(size=(per_client, 3, 32, 32)).astype(np.float32)
    return TensorDataset(torch.from_numpy(images), torch.from_numpy(rng.integers(0, 10, per_client)))


def make_app(name, per_client):
    return split_client_app(
        functools.partial(make_model, name), cut=default_cut(name), data_fn=functools.partial(load, per_client)
    )


class Centralised:
    """The uncut model's step."""

    def __init__(self, name):
        self.model = make_model(name)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.batch = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))

    def step(self, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        x, y = self.batch
        torch.nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        torch.set_num_threads(before)
        return seconds


class Timed(torch.optim.SGD):
    """After each split step, takes centralised ones, and keeps the times of all."""

    def __init__(self, parameters, centralised, times):
        super().__init__(parameters, lr=0.01)
        self.centralised, self.times = centralised, times
        self.begin = None

    def step(self, closure=None):
        super().step(closure)
        if self.begin is not None:
            split = time.perf_counter() - self.begin
            self.times.append((split, self.centralised.step(1), self.centralised.step(2)))
        self.begin = time.perf_counter()


def compare(name, num_clients, steps, transport="streams", wire_dtype="float32"):
    """Return medians of (split, centralised with 1 thread, centralised with 2 threads) in seconds."""
    per_client = -(-steps * BATCH // num_clients)
    times = []
    model = make_model(name)
    with ProcessGrid(functools.partial(make_app, name, per_client), num_clients, num_processes=2) as grid:
        strategy = ParallelSplitLearning(
            model,
            cut=default_cut(name),
            sampler=UniformGlobalSampler(BATCH),
            optimizer=functools.partial(Timed, centralised=Centralised(name), times=times),
            transport=transport,
            stream_options=StreamOptions(wire_dtype=wire_dtype),
            evaluate_every=0,
        )
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1, timeout=300)
    return [statistics.median(column) for column in zip(*times[len(times) // 5 :], strict=True)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the client processes
    cases = [("cnn", 16, 60, "streams", "float32"), ("cnn", 128, 60, "streams", "float32")]
    if not options.quick:
        cases += [("cnn", 128, 60, "streams", w) for w in ("float16", "bfloat16", "int8")]
        cases += [("cnn", 16, 10, "messages", "float32"), ("cnn", 128, 10, "messages", "float32")]
        cases += [("resnet18", 16, 6, "streams", "float32"), ("resnet18", 128, 6, "streams", "float32")]
    print("| model, K | carrier, wire | split ms | centralised ms, 1 / 2 threads | ratio to the faster |")
    print("|---|---|---|---|---|")
    for name, k, steps, transport, wire in cases:
        if options.only not in f"{name} {k} {transport} {wire}":
            continue
        split, one, two = compare(name, k, steps, transport, wire)
        print(
            f"| {name}, {k} | {transport}, {wire} | {split * 1e3:.1f} | {one * 1e3:.1f} / {two * 1e3:.1f} "
            f"| {split / min(one, two):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
