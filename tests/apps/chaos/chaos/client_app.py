"""The clients: now and then one sends what is not finite, or its process dies; each writes down what it draws."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import support

from psl_flower import SplitClient, split_client_app


class Chaotic(SplitClient):
    """Faults are decided by the order, and happen once: a file in the shared folder says that one has happened."""

    def draw(self, order):
        indices, config = super().draw(order), self.config
        where = (order.client, order.epoch, order.step, order.start, order.count)
        folder, name = Path(config["results"]), "-".join(map(str, where))
        (folder / "drawn").mkdir(exist_ok=True)
        (folder / "drawn" / name).write_text(json.dumps(indices.tolist()))
        mood = np.random.default_rng([5, *where]).random()
        self.poisoned = mood < config["share"] and _first(folder / "poisoned" / name)
        if config["hold-at"] == f"{order.epoch}-{order.step}":
            hold(folder)
        deadly = mood > 0.9 and order.step > 4
        if deadly and any(_first(folder / "died" / str(i)) for i in range(config["deaths"])):
            os.kill(os.getpid(), signal.SIGKILL)
        return indices

    def batch(self, dataset, indices):
        batch = super().batch(dataset, indices)
        return batch.inputs * float("nan") if self.poisoned else batch.inputs, batch.target


def hold(folder):
    """Say that the run is where it is to be interrupted, and work as long as it takes."""
    (folder / "held").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)


def _first(path):
    path.parent.mkdir(exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


app = split_client_app(support.tiny_resnet, cut=support.CUT, data_fn=support.load_partition, client_class=Chaotic)
