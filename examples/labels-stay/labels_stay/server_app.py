"""The registry: it runs the body of the model, keeps every byte that it receives, and ends by telling what it was."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from labels_stay.listening import ListeningGrid
from labels_stay.model import CUT, TAIL, Net
from psl_flower import ParallelSplitLearning, UniformGlobalSampler

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, then print what was received."""
    config = context.run_config
    torch.manual_seed(0)
    model = Net()
    with ListeningGrid(grid, "outputs") as listening:
        ParallelSplitLearning(
            model,
            cut=CUT,
            tail=TAIL,
            secure_aggregation=True,
            sampler=UniformGlobalSampler(batch_size=config["batch-size"]),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=config["learning-rate"], momentum=0.9),
            transport="messages",  # what comes over streams does not pass the grid
            output_dir="outputs",
        ).start(listening, ArrayRecord(model.state_dict()), num_rounds=config["num-server-rounds"])
    print(listening.told())
