"""Memory that a virtual client adds to the ServerApp and to the processes that serve it, over streams.

    OMP_NUM_THREADS=1 python tests/bench/bench_stream_memory.py

Two client processes that stay, as Ray's actors on two cores do, each run started afresh. Clients hold two examples of
8x8 pixels, so what is left is what the library keeps for each. Resident memory after an epoch.
"""

import functools
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from process_grid import ProcessGrid

from psl_flower import ParallelSplitLearning, UniformGlobalSampler, split_client_app
from psl_flower.app.models import build_model

COUNTS = (100, 400, 1000)
make_model = functools.partial(build_model, "cnn", in_channels=1, num_classes=10, seed=0)


def load(context):
    return TensorDataset(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))


def make_app():
    return split_client_app(make_model, cut="stage2", data_fn=load)


def resident(pid="self"):
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


def measure(num_clients):
    """Return the resident kB of server and client processes."""
    torch.set_num_threads(1)
    model = make_model()
    with ProcessGrid(make_app, num_clients, num_processes=2) as grid:
        strategy = ParallelSplitLearning(
            model, cut="stage2", sampler=UniformGlobalSampler(128), transport="streams", evaluate_every=0
        )
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1)
        return resident(), sum(resident(each.process.pid) for each in grid.resident)


def main():
    context = multiprocessing.get_context("spawn")
    print("| virtual clients | ServerApp MB | both client processes MB | kB a client added, there and there |")
    print("|---|---|---|---|")
    before = None
    for count in COUNTS:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = (count, *pool.submit(measure, count).result())
        added = []
        if before is not None:
            added = [(b - a) / (count - before[0]) for a, b in zip(before[1:], found[1:], strict=True)]
        print(f"| {count} | {found[1] / 1024:.0f} | {found[2] / 1024:.0f} | {', '.join(f'{n:.1f}' for n in added)} |")
        before = found


if __name__ == "__main__":
    main()
