"""Takes a centralised step after every split one, so that both see the same machine, and says what each cost."""

import time

import numpy as np
import torch
from beside import measure
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from cost.task import BATCH, CUT, images, model_fn, num_examples
from psl_flower import UniformGlobalSampler
from psl_flower.threads import set_threads

app = ServerApp()


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


class Central:
    """The uncut model's steps."""

    def __init__(self, examples):
        self.images, self.rng = images(examples), np.random.default_rng(0)
        self.model = model_fn()
        self.optimizer = optimizer(self.model.parameters())

    def step(self):
        """Take a step, from the examples' numbers to the new weights."""
        x, y = self.images.get_batch(self.rng.choice(len(self.images), BATCH))
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


@app.main()
def main(grid, context):
    begin, config = time.time(), context.run_config
    set_threads()
    model, examples = model_fn(), num_examples(config["steps"], len(list(grid.get_node_ids())))
    measure(
        grid,
        config,
        begin,
        model=model,
        cut=CUT,
        sampler=UniformGlobalSampler(BATCH),
        optimizer=optimizer,
        arrays=ArrayRecord(model.state_dict()),
        central=Central(examples).step,
    )
