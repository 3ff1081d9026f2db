"""Takes a centralised step after every split one, so that both see the same machine, and says what each cost."""

import contextlib
import cProfile
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from cost.task import BATCH, CUT, model_fn, num_examples
from psl_flower import ParallelSplitLearning, UniformGlobalSampler
from psl_flower.exchange.streams import StreamOptions
from psl_flower.strategy import meeting
from psl_flower.strategy.summary import RunSummary
from psl_flower.threads import set_threads

app = ServerApp()


class Central:
    """The uncut model's steps, in a process of their own: with the memory that a plain program of torch has."""

    def __init__(self, examples):
        command = [sys.executable, str(Path(__file__).with_name("central.py")), str(examples)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def step(self, threads):
        """Return the seconds of a step, from the examples' numbers to the new weights."""
        print(threads, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Watched(RunSummary):
    """The summary of the run, for `Timed` to look into."""

    def __post_init__(self):
        super().__post_init__()
        Watched.last = self


class Timed(torch.optim.SGD):
    """After each split step, takes centralised ones with one and with all threads, and keeps the times of all."""

    def __init__(self, parameters, central, times):
        super().__init__(parameters, lr=0.01)
        self.central, self.times, self.threads = central, times, torch.get_num_threads()
        self.before = None
        self.first = None  # when the first step was over

    def step(self, closure=None):
        super().step(closure)
        spent = Watched.last.spent()
        if self.before is None:
            self.first = time.time()
        else:
            split = {on: spent[on] - self.before[on] for on in spent}
            self.times.append((split, self.central.step(1), self.central.step(self.threads)))
        self.before = Watched.last.spent()


@app.main()
def main(grid, context):
    begin, config = time.time(), context.run_config
    set_threads()
    num_clients = len(list(grid.get_node_ids()))
    times, optimizers, model = [], [], model_fn()
    central = Central(num_examples(config["steps"], num_clients))
    connected = []
    meeting.RunSummary = Watched
    logging.getLogger("flwr.psl_flower").addFilter(partial(_note, connected))
    with tempfile.TemporaryDirectory() as folder:
        strategy = ParallelSplitLearning(
            model,
            cut=CUT,
            sampler=UniformGlobalSampler(BATCH),
            optimizer=lambda parameters: optimizers.append(Timed(parameters, central, times)) or optimizers[-1],
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
    central.close()
    settled = times[len(times) // 5 :]
    split, *centrals = zip(*settled, strict=True)
    result = {
        "steps": len(settled),
        "split": statistics.median(sum(each.values()) for each in split),
        "central": [statistics.median(each) for each in centrals],
        "spent": {on: statistics.median(each[on] for each in split) for on in split[0]},
        "whole": summary["seconds"],
        "main": begin,
        "connected": connected[0] if connected else begin,
        "first_step": optimizers[0].first,
        "megabytes": [sum(map(_peak, pids)) for pids in (["self"], _actors())],
    }
    Path(str(config["out"])).write_text(json.dumps(result))


def _peak(pid):
    """Return the most memory that a process had so far, MB; 0 where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else []
    return int(lines[0].split()[1]) / 1e3 if lines else 0.0


def _actors():
    """Return the ids of the processes that the clients are in, of all simulations on this machine."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            pids += [path.parent.name] if path.read_bytes().startswith(b"ray::ClientAppActor") else []
    return pids


def _note(connected, record):
    if "connected by" in record.getMessage():
        connected.append(time.time())
    return True
