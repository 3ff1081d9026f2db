"""Takes a centralised step of LoRA after every split one, and says what each cost."""

import time

from beside import measure
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from lora.task import BATCH, CUT, LOSS, adapters, make_model, optimizer
from psl_flower import UniformGlobalSampler
from psl_flower.threads import set_threads

app = ServerApp()


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
        central=("lora.task", config["width"], config["layers"]),
        **LOSS,
    )
