"""Takes a centralised step after every split one, so that both see the same machine, and says what each cost."""

import cProfile
import json
import logging
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from cost.task import BATCH, CUT, images, model_fn, num_examples
from psl_flower import ParallelSplitLearning, UniformGlobalSampler
from psl_flower.exchange.streams import StreamOptions
from psl_flower.threads import set_threads

app = ServerApp()


class Central:
    """The uncut model's steps."""

    def __init__(self, examples):
        self.images, self.rng = images(examples), np.random.default_rng(0)
        self.model = model_fn()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def step(self, threads):
        """Return the seconds of a step, from the examples' numbers to the new weights."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        begin = time.perf_counter()
        x, y = self.images.get_batch(self.rng.choice(len(self.images), BATCH))
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        torch.set_num_threads(before)
        return seconds


class Timed(torch.optim.SGD):
    """After each split step, takes centralised ones with one and with all threads, and keeps the times of all."""

    def __init__(self, parameters, central, times):
        super().__init__(parameters, lr=0.01)
        self.central, self.times, self.threads = central, times, torch.get_num_threads()
        self.begin = None

    def step(self, closure=None):
        super().step(closure)
        now = time.perf_counter()
        if self.begin is not None:
            self.times.append((now - self.begin, self.central.step(1), self.central.step(self.threads)))
        else:
            self.times.append((time.time(), 0.0, 0.0))  # when the first step was over
        self.begin = time.perf_counter()


@app.main()
def main(grid, context):
    begin, config = time.time(), context.run_config
    threads, num_clients = set_threads(), len(list(grid.get_node_ids()))
    times, model = [], model_fn()
    central = Central(num_examples(config["steps"], num_clients))
    connected = []
    logging.getLogger("flwr.psl_flower").addFilter(partial(_note, connected))
    with tempfile.TemporaryDirectory() as folder:
        strategy = ParallelSplitLearning(
            model,
            cut=CUT,
            sampler=UniformGlobalSampler(BATCH),
            optimizer=partial(Timed, central=central, times=times),
            transport=config["transport"],
            stream_options=StreamOptions(shared_memory=config["shared-memory"]),
            min_available_nodes=num_clients,
            evaluate_every=0,
            keep_checkpoints=0,
            output_dir=folder,
        )
        run = partial(strategy.start, grid, ArrayRecord(model.state_dict()), num_rounds=1)
        if config["profile"]:
            profile = cProfile.Profile()
            profile.runcall(run)
            profile.dump_stats(config["profile"])
        else:
            run()
        summary = json.loads((Path(folder) / "summary.json").read_text())
    first, steps = times[0], np.array(times[1:])
    spent = dict(summary["seconds"])
    spent["server"] -= steps[:, 1:].sum()
    settled = steps[len(steps) // 5 :]
    result = {
        "steps": len(times),
        "split": statistics.median(settled[:, 0]),
        "central": {str(n): statistics.median(settled[:, i]) for i, n in ((1, 1), (2, threads))},
        "spent": {on: spent[on] / len(times) for on in spent if on not in ("start", "evaluation")},
        "main": begin,
        "connected": connected[0] if connected else begin,
        "first_step": first[0],
        "start": spent["start"],
    }
    Path(str(config["out"])).write_text(json.dumps(result))


def _note(connected, record):
    if "are connected by" in record.msg:
        connected.append(time.time())
    return True
