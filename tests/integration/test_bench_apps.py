"""The benchmarks' apps run, here in this process: nothing else runs them between two benchmarks."""

import copy
import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict

from psl_flower import InProcessGrid
from psl_flower.client import factory
from psl_flower.strategy import strategy

APPS = Path(__file__).parents[1] / "apps"


def run(app, monkeypatch, tmp_path, **config):
    """Run an app of the benchmarks with two clients; return what it found."""
    monkeypatch.syspath_prepend(APPS / app)
    monkeypatch.syspath_prepend(APPS.parent)
    server, client = (importlib.import_module(f"{app}.{end}_app") for end in ("server", "client"))
    config |= {"out": str(tmp_path / "found.json"), "transport": "streams", "shared-memory": True, "profile": ""}
    threads = torch.get_num_threads()
    try:
        server.app(InProcessGrid(client.app, 2, config), Context(1, 1, {}, RecordDict(), config))
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "found.json").read_text())
    assert 0 < found["steps"] < config["steps"]  # the first ones are not counted
    assert min(*found["central"], found["split"], found["spent"]["server"], found["spent"]["clients"]) > 0
    assert found["main"] <= found["connected"] <= found["first_step"]
    return found


def test_the_app_of_steps_beside_centralised_ones(monkeypatch, tmp_path):
    run("cost", monkeypatch, tmp_path, steps=2)


class Here:
    """Centralised steps in this process, where transformers is imported already."""

    def __init__(self, module, *numbers):
        self._step = importlib.import_module(module).centralised(*numbers)

    def step(self, threads):
        begin = time.perf_counter()
        self._step()
        return time.perf_counter() - begin

    def close(self):
        pass


def test_the_app_of_steps_with_lora_sends_the_bytes_of_splitlora(monkeypatch, tmp_path):
    pytest.importorskip("peft")
    cut, parts = strategy.cut_model, []  # recording a transformer takes seconds: once for both sides
    monkeypatch.setattr(strategy, "cut_model", lambda *args, **kw: parts.append(cut(*args, **kw)) or parts[0])
    monkeypatch.setattr(factory, "cut_model", lambda *_: copy.deepcopy(parts[0]))
    monkeypatch.syspath_prepend(APPS.parent)
    monkeypatch.setattr(importlib.import_module("beside"), "Central", Here)
    found = run("lora", monkeypatch, tmp_path, steps=6, width=16, layers=2)
    task = sys.modules["lora.task"]
    theirs = task.bytes_of_step(task.make_model(16, 2), 16, processes=1)
    # medians: the first steps send more, frozen weights, and gradients by client until those of all at once are trusted
    assert found["bytes"] == {"sent": theirs["sent"], "received": theirs["received"] + theirs["masks and labels"]}
