"""What the benchmarks of whole runs share: a run of an app through Flower, and the table of what it found."""

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
RESULTS = TESTS.parent / "outputs" / "bench"
PARTS = ("server", "clients", "wire", "planning", "records", "other")
COLUMNS = (
    *("clients", "carrier", "steps", "step ms", "central ms, 1 thread", "central ms, all threads", "ratio"),
    *(f"{part} ms" for part in PARTS),
    *("ServerApp s", "connected s", "first step s", "ServerApp MB", "clients MB"),
)


def run(link, app, *, num_supernodes=None, **settings):
    """Return what an app of tests/apps has found, on a SuperLink that is started."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        config = [f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in settings.items()]
        config.append(f"out={json.dumps(str(out))}")
        begin = time.time()
        link.run(TESTS / "apps" / app, num_supernodes=num_supernodes, run_config=config, quiet=True)
        return {**json.loads(out.read_text()), "begin": begin}


def row(found):
    """Return the row of the table that a run makes."""
    one, many = found["central"]
    carrier = found["transport"] + (" and shared memory" if found["shared_memory"] else "")
    times = [found["split"], one, many]
    cells = [found["clients"], carrier, found["steps"], *(f"{1e3 * t:.1f}" for t in times)]
    cells += [f"{found['split'] / min(one, many):.2f}"]
    cells += [f"{1e3 * found['spent'][part]:.1f}" for part in PARTS]
    cells += [f"{found[moment] - found['begin']:.1f}" for moment in ("main", "connected", "first_step")]
    cells += [f"{each:.0f}" for each in found["megabytes"]]
    return dict(zip(COLUMNS, map(str, cells), strict=True))


def prepared(link):
    """Let a link's processes import the app's code."""
    link.environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return link


def ray_seconds():
    """Return how long Ray takes to start by itself, with two actors on it."""
    program = """
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
Actor = ray.remote(type("Actor", (), {"ask": lambda self: 1}))
ray.get([each.ask.remote() for each in [Actor.remote(), Actor.remote()]])
"""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return time.perf_counter() - begin


class Table:
    """Prints rows as they come, and leaves them as CSV and markdown, with what they were measured on."""

    def __init__(self, name, **facts):
        RESULTS.mkdir(parents=True, exist_ok=True)
        self._path, self._facts, self._rows = RESULTS / name, {**_facts(), **facts}, []
        for fact, value in self._facts.items():
            print(f"{fact}: {value}", flush=True)
        print(_line(COLUMNS), _line(["---"] * len(COLUMNS)), sep="\n", flush=True)

    def add(self, found):
        """Take in what a run has found."""
        self._rows.append(row(found))
        print(_line(self._rows[-1].values()), flush=True)
        with self._path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *self._facts])
            writer.writeheader()
            writer.writerows({**each, **self._facts} for each in self._rows)
        lines = [f"- {fact}: {value}" for fact, value in self._facts.items()]
        lines += ["", _line(COLUMNS), _line(["---"] * len(COLUMNS)), *(_line(each.values()) for each in self._rows)]
        self._path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _facts():
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=TESTS, capture_output=True, text=True, check=False
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("flwr", "torch", "ray", "grpcio"))
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores of {cpu}, load {os.getloadavg()[0]:.1f}",
        "versions": f"Python {platform.python_version()}, {versions}",
        "commit": commit.stdout.strip() or "unknown",
    }
