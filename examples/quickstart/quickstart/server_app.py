"""The server: runs the rest of the model on the clients' activations."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from psl_flower import ParallelSplitLearning, UniformGlobalSampler
from quickstart.task import Net, load_server_test_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and save the final model."""
    config = context.run_config
    torch.manual_seed(0)
    model = Net()
    strategy = ParallelSplitLearning(
        model,
        cut="conv2",
        sampler=UniformGlobalSampler(batch_size=config["batch-size"]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=config["learning-rate"], momentum=0.9),
    )
    result = strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
    torch.save(result.arrays.to_torch_state_dict(), "final_model.pt")


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Test the whole model on the server's own test data."""
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(model, load_server_test_data())
    return MetricRecord({"loss": loss, "accuracy": accuracy})
