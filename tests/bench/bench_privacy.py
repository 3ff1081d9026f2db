"""What privacy costs in time and bytes: the U shape against plain split learning, and secure aggregation against none.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python tests/bench/bench_privacy.py [--only WORDS] [--steps N]

Over streams, with two client processes that stay, as Ray's actors on two cores do, or one a client, as SuperNodes. The
two sides of a comparison run one after the other, several times: medians of their steps are compared, in seconds and
in processor seconds, which tell more on a busy machine. Steps are those of a second round, as `metrics.jsonl` has them;
bytes are those of tensors, both ways.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from process_grid import ProcessGrid

from psl_flower import ParallelSplitLearning, UniformGlobalSampler, replace_batch_norm, split_client_app
from psl_flower.app.models import build_model
from psl_flower.callbacks import Callback

BATCH = 128

# model, cut, tail, secure, clients, client processes, side of the images: the second is compared with the first
PAIRS = {
    "U shape, K = 128": [
        ("cnn", "stage2", None, False, 128, 2, 32),
        ("cnn", "stage2", "head", False, 128, 2, 32),
    ],
    "secure aggregation, ResNet-18 at layer2, 16 clients, 2 processes": [
        ("resnet18", "layer2", None, False, 16, 2, 32),
        ("resnet18", "layer2", None, True, 16, 2, 32),
    ],
    "secure aggregation, ResNet-18 at layer2, 128 clients with neighbours, 2 processes": [
        ("resnet18", "layer2", None, False, 128, 2, 32),
        ("resnet18", "layer2", None, True, 128, 2, 32),
    ],
}


def make_model(name, cut, tail):
    return replace_batch_norm(build_model(name, in_channels=3, num_classes=10, seed=0), before=cut, tail=tail)


def load(per_client, side, context):
    rng = np.random.default_rng(context.node_config["partition-id"])
    images = rng.normal(size=(per_client, 3, side, side)).astype(np.float32)
    return TensorDataset(torch.from_numpy(images), torch.from_numpy(rng.integers(0, 10, per_client)))


def make_app(name, cut, tail, secure, per_client, side):
    torch.set_num_threads(1)
    make = functools.partial(make_model, name, cut, tail)
    data = functools.partial(load, per_client, side)
    return split_client_app(make, cut=cut, tail=tail, data_fn=data, secure_aggregation=secure)


class Processors(Callback):
    """Notes what the processors have done for some processes until the end of each step."""

    def __init__(self, pids):
        self.pids, self.seconds = pids, []

    def on_step(self, record):
        stats = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.pids]
        self.seconds.append(sum(int(n) for stat in stats for n in stat[11:13]) / os.sysconf("SC_CLK_TCK"))


def measure(case, steps):
    """Return the seconds of the steps, the processor seconds of one, and the bytes of one."""
    name, cut, tail, secure, clients, processes, side = case
    per_client = -(-BATCH * steps // clients)
    model = make_model(name, cut, tail)
    app = functools.partial(make_app, name, cut, tail, secure, per_client, side)
    with tempfile.TemporaryDirectory() as folder, ProcessGrid(app, clients, processes) as grid:
        processors = Processors([os.getpid(), *(each.process.pid for each in grid.resident)])
        ParallelSplitLearning(
            model,
            cut=cut,
            tail=tail,
            secure_aggregation=secure,
            sampler=UniformGlobalSampler(BATCH),
            transport="streams",
            min_available_nodes=clients,
            evaluate_every=0,
            output_dir=folder,
            keep_checkpoints=0,
            callbacks=[processors],
        ).start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if record["kind"] == "step" and record["round"] == 2]
    sizes = [record["bytes_sent"] + record["bytes_received"] for record in found]
    # of the first round's, callbacks may hear at its end only
    worked = (processors.seconds[-1] - processors.seconds[-len(found)]) / (len(found) - 1)
    return [record["seconds_real"] for record in found], worked, statistics.median(sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comparisons whose names hold these words")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--times", type=int, default=2, help="how often each side runs")
    options = parser.parse_args()
    for title, pair in PAIRS.items():
        if not all(word in title for word in options.only.split()):
            continue
        seconds, worked, sizes = ([], []), ([], []), [0, 0]
        for _ in range(options.times):
            for i, case in enumerate(pair):
                each, cpu, sizes[i] = measure(case, options.steps)
                seconds[i].extend(each)
                worked[i].append(cpu)
        medians, cpu = ([statistics.median(each) for each in both] for both in (seconds, worked))
        print(
            f"{title}: {1000 * medians[0]:.0f} ms a step, {1000 * medians[1]:.0f} ms with it, ratio "
            f"{medians[1] / medians[0]:.2f}; of the processors {1000 * cpu[0]:.0f} and {1000 * cpu[1]:.0f} ms, ratio "
            f"{cpu[1] / cpu[0]:.2f}; {sizes[0] / 1e6:.2f} MB a step, {sizes[1] / 1e6:.2f} MB with it, ratio "
            f"{sizes[1] / sizes[0]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
