"""One exchange with two client processes, the same bytes each way, over streams as a deployment has them.

    OMP_NUM_THREADS=1 python tests/bench/bench_stream_echo.py

The payload goes out as the client half's weights, a new version each time, and comes back as its activations. Two
processes hold their streams open inside their attach messages, as two SuperNodes' ClientApps do; Flower has no part
in what is measured.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from process_grid import ProcessGrid

from psl_flower import SplitModel, split_client_app
from psl_flower.exchange.streams import StreamCarrier
from psl_flower.protocol import ForwardRequest, Weights, WorkOrder

SIZES = (64 * 2**10, 2 * 2**20, 16 * 2**20)


class Echo(nn.Module):
    """Returns its parameter, whatever its input."""

    def __init__(self, elements):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1, elements))

    def forward(self, x):
        return self.p.view_as(self.p)


def make_app():
    elements = int(os.environ["PSL_ECHO_BYTES"]) // 4
    data = TensorDataset(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    return split_client_app(
        lambda: SplitModel(client=Echo(elements), server=nn.Linear(1, 2)), data_fn=lambda context: data
    )


def measure(num_bytes, repeats):
    os.environ["PSL_ECHO_BYTES"] = str(num_bytes)  # the client processes are started below
    times = []
    with ProcessGrid(make_app, 2) as grid, StreamCarrier(grid) as carrier:
        for i in range(repeats):
            weights = Weights({"client.p": torch.from_numpy(np.full((1, num_bytes // 4), i, np.float32))}, {}, f"v{i}")
            requests = {
                node: ForwardRequest(WorkOrder(client=k, seed=0, epoch=0, step=i, start=0, count=1), weights)
                for k, node in enumerate(grid.get_node_ids())
            }
            begin = time.perf_counter()
            answers = carrier.exchange(requests, 60)
            times.append(time.perf_counter() - begin)
            for answer in answers.values():
                assert answer.failure is None, answer.failure
                assert float(answer.reply.tensors[0][0, -1]) == i
    return times[repeats // 5 :]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| bytes each way and client | median ms | fastest ms |\n|---|---|---|")
    for size in SIZES:
        found = measure(size, 300 if size < 2**20 else 40)
        print(f"| {size:,} | {statistics.median(found) * 1e3:.2f} | {min(found) * 1e3:.2f} |", flush=True)
