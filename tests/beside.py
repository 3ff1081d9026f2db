"""Centralised steps between the split ones of a run, on the same machine: what the apps of benchmarks share."""

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
from contextlib import closing, contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch
from flwr.serverapp import ServerApp

from psl_flower import ParallelSplitLearning
from psl_flower.exchange.streams import StreamOptions
from psl_flower.records import StepRecord, read_metrics
from psl_flower.strategy import meeting
from psl_flower.strategy.summary import RunSummary
from psl_flower.threads import set_threads


class Central:
    """Centralised steps in a process of their own: with the memory that a plain program of torch has.

    It is started for the first of them: beside the run's own processes it would delay what the run does first.

    Parameters
    ----------
    module : str
        Its function ``centralised`` returns one that takes a step, from the examples to the new weights.
    *numbers : int
        What that function is given.
    """

    def __init__(self, module, *numbers):
        self._command = [sys.executable, str(Path(__file__).with_name("central.py")), module, *map(str, numbers)]

    def step(self, threads):
        """Take a step with so many threads, and return its seconds."""
        print(threads, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    @cached_property
    def _process(self):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(self._command, env=environment, **pipes)

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


class Beside:
    """After each step of an optimizer takes centralised ones, with one and with all threads, and keeps all times.

    Parameters
    ----------
    central : Central
    """

    def __init__(self, central):
        self.central, self.threads = central, torch.get_num_threads()
        self.times = []  # of a split step by what it was spent on, of a centralised one with one thread and with all
        self.first = None  # when the first step was over
        self.summary = None  # of the run
        self._before = None

    def of(self, optimizer):
        """Return an optimizer whose steps these are taken beside."""
        optimizer.register_step_post_hook(lambda *_: self._step())
        return optimizer

    @contextmanager
    def watching(self):
        """Look into the summary of the run within."""

        def watched(*args, **kwargs):
            self.summary = RunSummary(*args, **kwargs)
            return self.summary

        made, meeting.RunSummary = meeting.RunSummary, watched
        try:
            yield
        finally:
            meeting.RunSummary = made

    def _step(self):
        spent = self.summary.spent()
        if self._before is None:
            self.first = time.time()
        else:
            split = {on: spent[on] - self._before[on] for on in spent}
            self.times.append((split, self.central.step(1), self.central.step(self.threads)))
        self._before = self.summary.spent()


def app_of(settings):
    """Return a ServerApp that measures; `settings` makes the arguments of `measure` of a configuration and K."""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        begin, config = time.time(), context.run_config
        set_threads()
        measure(grid, config, begin, **settings(config, len(list(grid.get_node_ids()))))

    return app


def measure(grid, config, begin, *, model, central, optimizer, arrays, **settings):
    """Run a strategy as an app's configuration says, and write what was found to its file `out`.

    Parameters
    ----------
    begin : float
        When the app began.
    central : tuple
        The module and numbers of `Central`.
    optimizer : callable
        Makes one of the strategy's parameters.
    arrays : ArrayRecord
        What the run begins with.
    **settings
        Further arguments of the strategy.
    """
    beside, connected = Beside(Central(*central)), []
    logging.getLogger("flwr.psl_flower").addFilter(partial(_note, connected))
    with tempfile.TemporaryDirectory() as folder, beside.watching(), closing(beside.central):
        cutting = time.time()
        strategy = ParallelSplitLearning(
            model,
            optimizer=lambda parameters: beside.of(optimizer(parameters)),
            transport=config["transport"],
            stream_options=StreamOptions(shared_memory=config["shared-memory"]),
            min_available_nodes=len(list(grid.get_node_ids())),
            evaluate_every=0,
            keep_checkpoints=0,
            output_dir=folder,
            **settings,
        )
        cutting = time.time() - cutting
        run = partial(strategy.start, grid, arrays, num_rounds=1)
        if config["profile"]:
            profile = cProfile.Profile()
            profile.runcall(run)
            profile.dump_stats(config["profile"])
        else:
            run()
        whole = json.loads((Path(folder) / "summary.json").read_text())["seconds"]
        records = [each for each in read_metrics(Path(folder) / "metrics.jsonl") if isinstance(each, StepRecord)]
    settled = beside.times[len(beside.times) // 5 :]
    split, *centrals = zip(*settled, strict=True)
    actors = _actors()
    found = {
        "clients": strategy.min_available_nodes,
        "transport": config["transport"],
        "shared_memory": config["transport"] == "streams" and config["shared-memory"],
        "steps": len(settled),
        "split": statistics.median(sum(each.values()) for each in split),
        "central": [statistics.median(each) for each in centrals],
        "spent": {on: statistics.median(each[on] for each in split) for on in split[0]},
        "bytes": {
            way: statistics.median(getattr(each, f"bytes_{way}") for each in records[-len(settled) :])
            for way in ("sent", "received")
        },
        "actors": len(actors),
        "whole": whole,
        "main": begin,
        "cutting": cutting,
        "connected": connected[0] if connected else begin,
        "first_step": beside.first,
        "megabytes": [sum(map(_peak, pids)) for pids in (["self"], actors)],
    }
    Path(str(config["out"])).write_text(json.dumps(found))


def _peak(pid):
    """Return the most memory that a process had so far, MB; 0 where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else []
    return int(lines[0].split()[1]) / 1e3 if lines else 0.0


def _actors():
    """Return the ids of the processes that the clients of this simulation are in."""
    home, pids = f"FLWR_HOME={os.environ.get('FLWR_HOME')}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (folder / "cmdline").read_bytes().startswith(b"ray::ClientAppActor"):
                pids += [folder.name] if home in (folder / "environ").read_bytes().split(b"\0") else []
    return pids


def _note(connected, record):
    if "connected by" in record.getMessage():
        connected.append(time.time())
    return True
