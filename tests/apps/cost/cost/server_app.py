"""Takes a centralised step after every split one, so that both see the same machine, and says what each cost."""

import time

from beside import measure
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from cost.task import BATCH, CUT, model_fn, num_examples, optimizer
from psl_flower import UniformGlobalSampler
from psl_flower.threads import set_threads

app = ServerApp()


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
        central=("cost.task", examples),
    )
