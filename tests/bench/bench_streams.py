"""Steps of split learning against centralised ones: the same model, batch size and optimizer, taken in turns.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python tests/bench/bench_streams.py [--only WORDS] [--threads N]

First over streams alone: two client processes with a thread each that stay, as Ray's actors on two cores do, or as many
as SuperNodes. Centralised steps follow each split step, in the server's process, so that all see the same machine;
medians over the steps are compared. `--threads` are the server half's, and the centralised step's in the second column.
Then over Flower's Ray simulation, streams and messages: a smaller step, for the messages' sake, and the engine's floor,
which is an echo: the same messages of the same size, with clients that compute nothing.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from process_grid import ProcessGrid

from psl_flower import ParallelSplitLearning, UniformGlobalSampler, replace_batch_norm, split_client_app
from psl_flower.app.local import LocalSuperLink
from psl_flower.app.models import build_model, default_cut
from psl_flower.exchange.streams import StreamOptions
from psl_flower.threads import available_cores

BATCH = 128
TESTS = Path(__file__).parents[1]

# model, clients, of SuperNodes (else two processes for all), steps, wire dtype
CASES = [
    ("cnn", 16, False, 50, "float32"),
    ("cnn", 128, False, 50, "float32"),
    ("cnn", 2, True, 50, "float32"),
    ("cnn", 128, False, 50, "float16"),
    ("cnn", 128, False, 50, "bfloat16"),
    ("cnn", 128, False, 50, "int8"),
    ("resnet18", 16, False, 5, "float32"),
    ("resnet18", 128, False, 5, "float32"),
    ("resnet18", 2, True, 5, "float32"),
]


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

    def __init__(self, parameters, centralised, times, threads):
        super().__init__(parameters, lr=0.01)
        self.centralised, self.times, self.threads = centralised, times, threads
        self.begin = None

    def step(self, closure=None):
        super().step(closure)
        if self.begin is not None:
            split = time.perf_counter() - self.begin
            self.times.append((split, self.centralised.step(1), self.centralised.step(self.threads)))
        self.begin = time.perf_counter()


def compare(name, num_clients, supernodes, steps, wire_dtype, threads):
    """Return medians of (split, centralised with one thread, centralised with `threads`) in seconds."""
    per_client = -(-steps * BATCH // num_clients)
    times = []
    model = make_model(name)
    processes = 0 if supernodes else 2
    with ProcessGrid(functools.partial(make_app, name, per_client), num_clients, processes) as grid:
        strategy = ParallelSplitLearning(
            model,
            cut=default_cut(name),
            sampler=UniformGlobalSampler(BATCH),
            optimizer=functools.partial(Timed, centralised=Centralised(name), times=times, threads=threads),
            transport="streams",
            stream_options=StreamOptions(wire_dtype=wire_dtype),
            evaluate_every=0,
        )
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1, timeout=300)
    return [statistics.median(column) for column in zip(*times[len(times) // 5 :], strict=True)]


def streams(only, threads):
    print(f"| model, clients | wire | split ms | centralised ms, 1 / {threads} threads | ratio to the faster |")
    print("|---|---|---|---|---|")
    for name, clients, supernodes, steps, wire in CASES:
        what = f"{name}, {clients}{' SuperNodes' * supernodes} | {wire}"
        if only in what:
            split, *central = compare(name, clients, supernodes, steps, wire, threads)
            columns = " / ".join(f"{seconds * 1e3:.1f}" for seconds in central)
            print(f"| {what} | {split * 1e3:.1f} | {columns} | {split / min(central):.2f} |", flush=True)


def simulation(counts):
    print("\n| simulation, clients | carrier | split ms | echo ms | centralised ms | ratio | KB a step |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        superlink = LocalSuperLink(Path(folder) / "home", folder)
        superlink.environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        with superlink:
            for count in counts:
                path = Path(folder) / f"{count}.json"
                superlink.run(TESTS / "apps" / "cost", num_supernodes=count, run_config=[f"out='{path}'"], quiet=True)
                found = json.loads(path.read_text())
                for carrier, split in found["split"].items():
                    echo = f"{found['echo'] * 1e3:.1f}" if carrier == "messages" else ""
                    print(
                        f"| {count} | {carrier} | {split * 1e3:.1f} | {echo} | {found['central'] * 1e3:.1f} "
                        f"| {split / found['central']:.2f} | {found['bytes'][carrier] / 1024:.0f} |",
                        flush=True,
                    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--only", default="", help="cases that contain this; 'simulation': only the last table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the client processes
    if options.only != "simulation":
        streams(options.only, options.threads)
    if options.only in ("", "simulation"):
        simulation([16, 128])


if __name__ == "__main__":
    main()
