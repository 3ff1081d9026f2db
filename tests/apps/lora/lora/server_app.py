"""Takes a centralised step of LoRA after every split one, and says what each cost."""

import time

import numpy as np
import torch
from beside import measure
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from lora.task import BATCH, CUT, LOSS, adapters, make_model, pad, texts
from psl_flower import UniformGlobalSampler
from psl_flower.threads import set_threads

app = ServerApp()


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


class Central:
    """The uncut model's steps."""

    def __init__(self, model):
        self.model, self.rows, self.rng = model.train(), texts(512, seed=99), np.random.default_rng(0)
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad])

    def step(self):
        """Take a step, from the rows to the new weights."""
        batch = pad([self.rows[i] for i in self.rng.choice(len(self.rows), BATCH)])
        labels = batch.pop("labels")
        self.optimizer.zero_grad()
        LOSS["loss"](self.model(**batch), labels).backward()
        self.optimizer.step()


@app.main()
def main(grid, context):
    begin, config = time.time(), context.run_config
    set_threads()
    model = make_model(config["width"], config["layers"])
    measure(
        grid,
        config,
        begin,
        model=model,
        cut=CUT,
        state="trainable",
        sampler=UniformGlobalSampler(BATCH),
        optimizer=optimizer,
        arrays=ArrayRecord(adapters(model)),
        central=Central(make_model(config["width"], config["layers"])).step,
        **LOSS,
    )
