"""Run a sweep's trainings in processes of their own, each once, however often it is interrupted."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from psl_flower.checks import writing_to
from psl_flower.colours import plain_log
from psl_flower.experiments.results import RUNS_FOLDER, read_result, summarise, write_results
from psl_flower.experiments.sweep import Experiment, distinct
from psl_flower.strategy.folder import FolderLock
from psl_flower.strategy.progress import clock
from psl_flower.threads import available_cores

_INTERVAL = 10.0  # seconds between two lines of progress
_STOP_TIMEOUT = 40.0  # a simulation stops its SuperLink and Ray
_UNFINISHED = ".unfinished-"

Say = Callable[[str], None]


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def default_workers(threads: int, device: str) -> int:
    """Return how many trainings run at once: one on a GPU, else as many as there are cores for their threads."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return 1
    return max(1, available_cores() // threads)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder, made if it is not there; raise ConfigError if that fails or another process holds it."""
    with writing_to(folder, "--output"):
        (folder / RUNS_FOLDER).mkdir(parents=True, exist_ok=True)
    with FolderLock(folder, "--output"):
        yield


@dataclass(eq=False)
class _Worker:
    """A process that trains one experiment."""

    experiment: Experiment
    process: BaseProcess
    connection: Connection
    done: int = 0  # rounds
    error: str = "the process ended without a word"
    finished: bool = False


class Runner:
    """Trains what is not finished yet; a training is finished when its folder has its name, and its result in it.

    Parameters
    ----------
    folder : Path
        Of the sweep: ``results.csv``, and a folder a training in ``runs``. One runner at a time; see `alone_in`.
    workers : int
        Processes at once.
    """

    def __init__(self, folder: Path, workers: int, say: Say = say) -> None:
        self._folder, self._num_workers, self._say = folder, workers, say
        # a process a training, forked from one that has imported all that takes seconds (the last two are imported at
        # first use, by torch's optimizers and for the digits): it starts at once, and takes no other with it
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(["psl_flower.experiments.trial", "torch._dynamo", "sklearn.datasets"])
        self._workers: list[_Worker] = []

    def run(self, experiments: Sequence[Experiment]) -> dict[str, str]:
        """Train; return what went wrong, by the label of the experiment.

        One that fails does not stop the others.
        """
        runs = self._folder / RUNS_FOLDER
        for interrupted in runs.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(interrupted, ignore_errors=True)
        trainings = list(distinct(experiments))
        waiting = [e for e in trainings if read_result(runs / e.name) is None]
        for experiment in waiting:  # what is left of one that somebody has damaged
            shutil.rmtree(runs / experiment.name, ignore_errors=True)
        before, total = len(trainings) - len(waiting), len(trainings)
        if before:
            self._say(f"{before} of {total} trainings are finished already")
        write_results(self._folder, experiments)
        rounds, begin, failures, ended = _rounds(waiting), time.monotonic(), dict[str, str](), list[Experiment]()
        told = begin
        try:
            while waiting or self._workers:
                while waiting and len(self._workers) < self._num_workers:
                    self._start(waiting.pop(0))
                for worker in self._hear():
                    ended.append(worker.experiment)
                    what = self._ended(worker, failures)
                    write_results(self._folder, experiments)
                    eta = _eta(begin, rounds, ended, self._workers)
                    self._say(
                        f"{before + len(ended):{len(str(total))}}/{total}  {worker.experiment.label}: {what}{eta}"
                    )
                    told = time.monotonic()
                if time.monotonic() - told > _INTERVAL:
                    told = time.monotonic()
                    names = "; ".join(f"{w.experiment.label} (epoch {w.done})" for w in self._workers)
                    self._say(f"    {names}{_eta(begin, rounds, ended, self._workers)}")
        finally:
            self._stop()
        return failures

    def _start(self, experiment: Experiment) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_train, args=(experiment, self._folder / RUNS_FOLDER, theirs))
        process.start()
        theirs.close()
        self._workers.append(_Worker(experiment, process, ours))

    def _hear(self) -> list[_Worker]:
        """Wait for news, a second at most; return the workers that have ended."""
        ready = set(wait([w.connection for w in self._workers], timeout=1.0))
        for worker in self._workers:
            if worker.connection in ready:
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):  # it has gone
                    worker.connection.close()
                    worker.process.join()
                    continue
                if kind == "round":
                    worker.done = value
                elif kind == "failed":
                    worker.error = value
                else:
                    worker.finished, worker.error = True, value
        gone = [w for w in self._workers if w.connection.closed]
        self._workers = [w for w in self._workers if w not in gone]
        return gone

    def _ended(self, worker: _Worker, failures: dict[str, str]) -> str:
        """Clean up behind a worker and return how it went."""
        if worker.finished:
            return worker.error
        code = worker.process.exitcode
        shutil.rmtree(
            _unfinished(self._folder / RUNS_FOLDER, worker.experiment, worker.process.pid), ignore_errors=True
        )
        failures[worker.experiment.label] = f"{worker.error} (exit code {code})" if code else worker.error
        return "FAILED: " + worker.error.strip().splitlines()[-1]

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_STOP_TIMEOUT)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            path = _unfinished(self._folder / RUNS_FOLDER, worker.experiment, worker.process.pid)
            shutil.rmtree(path, ignore_errors=True)
        self._workers.clear()


def _unfinished(runs: Path, experiment: Experiment, pid: int | None) -> Path:
    return runs / f"{_UNFINISHED}{experiment.name}-{pid}"


def _rounds(experiments: Sequence[Experiment]) -> int:
    return sum(e.setting.config.num_server_rounds for e in experiments)


def _eta(begin: float, rounds: int, ended: Sequence[Experiment], workers: Sequence[_Worker]) -> str:
    done = _rounds(ended) + sum(w.done for w in workers)
    return f"   ETA {clock((time.monotonic() - begin) * (rounds - done) / done)}" if done else ""


# --- in a worker's process -------------------------------------------------------------------------------------------
def _train(experiment: Experiment, runs: Path, connection: Connection) -> None:
    """Train one experiment; its folder gets its name when all of it is there."""
    from psl_flower.experiments.trial import run_trial

    _end_with_the_runner()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    plain_log()
    folder, begin = _unfinished(runs, experiment, os.getpid()), time.monotonic()
    folder.mkdir()
    try:
        run_trial(experiment, folder, lambda done: connection.send(("round", done)))
        result = summarise(folder, time.monotonic() - begin)
        _put_in_place(folder, runs / experiment.name)
    except Exception as error:
        connection.send(("failed", "".join(traceback.format_exception(error))))
        return
    accuracy, seconds = result["accuracy_last"] or 0.0, result["seconds_total"] or 0.0
    connection.send(("finished", f"accuracy {accuracy:.3f} in {clock(seconds)}"))


def _put_in_place(folder: Path, place: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    folder.rename(place)


def _end_with_the_runner() -> None:
    """Make this process end when the runner asks for it, and when the runner is killed; what it started goes too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the runner decides
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
