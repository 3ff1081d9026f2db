"""A training process that is killed with SIGKILL at random moments and resumed until it is done.

    python tests/kill_resume.py FOLDER KILLS SEED

leaves an uninterrupted run in FOLDER/whole and the other in FOLDER/killed, and prints how many kills came in time. The
process under test is forked, so that imports are paid for once; it says where it is through a pipe (one byte at every
client's pass and at every stage of writing a checkpoint), and dies some bytes later.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch._dynamo  # noqa: F401 (optimizers import it when they are made: a second or two in every process)
from flwr.app import ArrayRecord
from support import CUT, load_partition, sgd, tiny_resnet

from psl_flower import (
    InProcessGrid,
    ParallelSplitLearning,
    SplitClient,
    UniformGlobalSampler,
    checkpoint,
    split_client_app,
)
from psl_flower.strategy import recorder

K, ROUNDS = 3, 3


def train(folder: Path, beat: Callable[[], None]) -> None:
    """Train, or go on training, in `folder`."""

    class Beating(SplitClient):
        def draw_batch(self, order):
            beat()
            return super().draw_batch(order)

        def forward(self, half, inputs):
            (activations,) = super().forward(half, inputs)
            if activations.requires_grad:
                activations.register_hook(lambda gradient: beat())
            return (activations,)

    def before_and_after(function):
        def call(*arguments, **options):
            beat()
            try:
                return function(*arguments, **options)
            finally:
                beat()

        return call

    checkpoint.save_file = before_and_after(checkpoint.save_file)
    checkpoint._flush = before_and_after(checkpoint._flush)
    recorder.save_curves = lambda *arguments: None
    strategy = ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        sampler=UniformGlobalSampler(24, seed=3),
        optimizer=sgd,
        output_dir=folder,
        checkpoint_every=2,
        resume_from="latest",
        min_available_nodes=K,
    )
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition, client_class=Beating)
    strategy.start(InProcessGrid(app, K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=ROUNDS)


def attempt(folder: Path, last_beat: int | None) -> bool:
    """Train in a process of its own, killed at a beat; return whether it was."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            train(folder, lambda: os.write(writing, b".") and None)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    os.close(writing)
    beats = 0
    while read := os.read(reading, 1):
        beats += len(read)
        if last_beat is not None and beats == last_beat:
            os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit("training failed")
    return False


def main(folder: Path, kills: int, seed: int) -> None:
    rng, killed = np.random.default_rng(seed), 0
    attempt(folder / "whole", None)
    for _ in range(kills):
        killed += attempt(folder / "killed", int(rng.integers(1, 120)))
    attempt(folder / "killed", None)
    print(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
