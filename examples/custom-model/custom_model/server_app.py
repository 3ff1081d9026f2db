"""The server: a regression, so it brings its own loss and its own score."""

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from torch.nn.functional import mse_loss

from custom_model.data import all_kinds, padded_batch
from custom_model.model import make_model
from psl_flower import ParallelSplitLearning, UniformGlobalSampler

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and leave metrics, curves and the model in the folder outputs/."""
    config = context.run_config
    torch.manual_seed(0)
    model = make_model()
    strategy = ParallelSplitLearning(
        model,  # a SplitModel is cut already
        sampler=UniformGlobalSampler(batch_size=config["batch-size"]),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=config["learning-rate"]),
        loss=mse_loss,
        classification=False,  # labels are numbers, not classes
        output_dir="outputs",
    )
    strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=evaluate,
    )


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Return how much of the targets' variance the whole model explains on objects of all kinds (R2)."""
    model = make_model().eval()
    model.load_state_dict(arrays.to_torch_state_dict())
    curves = all_kinds()
    inputs, targets = padded_batch(curves, np.arange(len(curves)))
    with torch.inference_mode():
        loss = mse_loss(model(*inputs), targets)
    return MetricRecord({"loss": loss.item(), "r2": 1 - (loss / targets.var(correction=0)).item()})
