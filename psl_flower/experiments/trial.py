"""Train one experiment and leave what came out in a folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from psl_flower.app.experiment import train_in_process
from psl_flower.app.local import LocalSuperLink
from psl_flower.app.task import load_images, make_model
from psl_flower.callbacks import make_loggers
from psl_flower.config import RunConfig
from psl_flower.experiments.setting import Setting
from psl_flower.experiments.sweep import Experiment
from psl_flower.experiments.training import open_training
from psl_flower.records import RoundRecord
from psl_flower.strategy.recorder import MODEL_FILE, RunRecorder
from psl_flower.typing import IntArray

SETTING_FILE, CONFUSION_FILE = "setting.json", "confusion.csv"
OnRound = Callable[[int], None]

_BATCH = 1000  # examples in one forward pass
_APP = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "psl-experiment"
version = "1.0.0"
description = "One experiment of a sweep"
license = "Apache-2.0"
dependencies = ["psl-flower"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "psl-flower"

[tool.flwr.app.components]
serverapp = "psl_flower.app.server_app:app"
clientapp = "psl_flower.app.client_app:app"

[tool.flwr.app.config]
"""


def run_trial(experiment: Experiment, folder: Path, on_round: OnRound) -> None:
    """Train.

    Parameters
    ----------
    experiment : Experiment
    folder : Path
        For metrics (JSONL, CSV), configuration and confusion matrix; there, and empty.
    on_round : callable
        Told the number of rounds that are done, where the engine says.

    Raises
    ------
    PSLError, RuntimeError
        If the training fails.
    """
    setting = experiment.setting
    (folder / SETTING_FILE).write_text(json.dumps(describe(experiment), indent=2) + "\n", encoding="utf-8")
    torch.set_num_threads(setting.config.threads or 1)
    confusion = _ENGINES[experiment.engine](setting, folder, on_round)
    np.savetxt(folder / CONFUSION_FILE, confusion, fmt="%d", delimiter=",")


def describe(experiment: Experiment) -> dict[str, Any]:
    """Return the whole setting of an experiment, for a file."""
    setting = {key: value for key, value in vars(experiment.setting).items() if key != "config"}
    return {"engine": experiment.engine, **setting, "config": experiment.setting.config.as_run_config()}


def _vectorised(setting: Setting, folder: Path, on_round: OnRound) -> IntArray:
    training = open_training(setting)
    callbacks = make_loggers(setting.config.loggers, folder)
    own = {name.replace("_", "-"): value for name, value in vars(setting).items() if name != "config"}
    with RunRecorder(folder, {**setting.config.as_run_config(), **own}, callbacks=callbacks) as recorder:
        for record in training.records():
            if isinstance(record, RoundRecord):
                recorder.round(record)
                on_round(record.round)
            else:
                recorder.step(record)
    return training.confusion()


def _in_process(setting: Setting, folder: Path, on_round: OnRound) -> IntArray:
    config = replace(setting.config, output_dir=str(folder), keep_checkpoints=0)
    train_in_process(config, setting.num_clients, lambda epoch, accuracy: on_round(epoch))
    return _confusion(config, folder)


def _simulation(setting: Setting, folder: Path, on_round: OnRound) -> IntArray:
    config = replace(setting.config, output_dir=str(folder), keep_checkpoints=0)
    with tempfile.TemporaryDirectory(prefix="psl-flower-") as temporary:
        app = Path(temporary) / "app"
        app.mkdir()
        # JSON's strings, numbers and booleans are TOML's
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in config.as_run_config().items())
        (app / "pyproject.toml").write_text(_APP + "".join(lines), encoding="utf-8")
        with LocalSuperLink(Path(temporary) / "home") as superlink:
            superlink.run(app, num_supernodes=setting.num_clients, quiet=True)
    return _confusion(config, folder)


_ENGINES: Mapping[str, Callable[[Setting, Path, OnRound], IntArray]] = {
    "vectorised": _vectorised,
    "in-process": _in_process,
    "simulation": _simulation,
}


@torch.inference_mode()
def _confusion(config: RunConfig, folder: Path) -> IntArray:
    """Return how often the model of a run took each class, a row, for each, a column, of the test split: (C, C)."""
    model, test = make_model(config), load_images(config, "test")
    model.load_state_dict(load_file(folder / MODEL_FILE))
    model.eval()
    outputs = [model(test.get_batch(rows)[0]) for rows in np.array_split(np.arange(len(test)), -(-len(test) // _BATCH))]
    classes = outputs[0].shape[1]
    predicted = torch.cat(outputs).argmax(dim=1).numpy()
    counts = np.bincount(test.targets * classes + predicted, minlength=classes**2)
    return counts.reshape(classes, classes).astype(np.int64)
