"""A script that trains in its own process, over streams, until somebody interrupts it.

    python tests/interrupted.py FOLDER ROUNDS

says "training" on standard output, from the middle of a pass of torch's in an exchange of the second round.
"""

import signal
import sys
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from support import CUT, load_partition, sgd, tiny_resnet

from psl_flower import InProcessGrid, ParallelSplitLearning, SplitClient, UniformGlobalSampler, split_client_app

K = 4


class Telling(SplitClient):
    """Says when it is asked for a step, and takes two seconds for it: longer than the script to end."""

    def draw(self, order):
        if (order.epoch, order.step) == (1, 5):
            x = torch.ones(1, requires_grad=True)
            y = 2 * x
            y.register_hook(_linger)
            y.backward()
        return super().draw(order)


def _linger(gradient):
    print("training", flush=True)
    for _ in range(200):
        time.sleep(0.01)


def train(folder: Path, num_rounds: int, client_class: type[SplitClient] = SplitClient, **options):
    """Train, or go on training, in `folder`; return the whole model."""
    strategy = ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        sampler=UniformGlobalSampler(32, seed=3),
        optimizer=sgd,
        min_available_nodes=K,
        transport="streams",
        evaluate_every=0,
        output_dir=folder,
        checkpoint_every=2,
        **options,
    )
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition, client_class=client_class)
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(tiny_resnet().state_dict()), num_rounds)
    return result.arrays.to_torch_state_dict()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    train(Path(sys.argv[1]), int(sys.argv[2]), Telling)
