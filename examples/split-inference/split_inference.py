"""Train a model split, write its two halves, and use them in two processes that know nothing of each other's layers.

    python examples/split-inference/split_inference.py

A device's process has the images and the first layers, a server's has the rest. What they make of images together is
compared with the whole model's outputs, and with what `strategy.predict` returns.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from psl_flower import Cut, InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, export_halves, split_client_app

HERE = Path(__file__).parent
CUT = Cut("classifier", example={"images": torch.zeros(2, 1, 8, 8)})


class Net(torch.nn.Module):
    """A convolution on the device, two dense layers on the server."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
        )
        self.classifier = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(16 * 4 * 4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return a score for each digit, (n, 10)."""
        return self.classifier(self.features(images))


def load_data(context: Context) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return a client's training and test data: every fifth digit is for the test."""
    images, labels = load_digits(return_X_y=True)
    own = slice(context.node_config["partition-id"], None, context.node_config["num-partitions"])
    inputs, targets = (
        torch.tensor(images[own], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16,
        torch.tensor(labels[own]),
    )
    test = torch.arange(len(targets)) % 5 == 0
    return (inputs[~test], targets[~test]), (inputs[test], targets[test])


def main() -> None:
    """Train, export, and predict apart."""
    app = split_client_app(Net, cut=CUT, data_fn=load_data)
    grid = InProcessGrid(app, num_nodes=4)
    strategy = ParallelSplitLearning(
        Net(),
        cut=CUT,
        sampler=UniformGlobalSampler(batch_size=64),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        evaluate_every=0,
    )
    result = strategy.start(grid, ArrayRecord(Net().state_dict()), num_rounds=4)
    model = Net().eval()
    model.load_state_dict(result.arrays.to_torch_state_dict())

    found = strategy.predict(grid, result)
    right = sum(int((each.outputs.argmax(1) == each.labels).sum()) for each in found.values())
    print(f"strategy.predict: {right} of {sum(len(each.rows) for each in found.values())} test images are right")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        client, server = export_halves(model, folder, CUT)
        images = torch.tensor(load_digits().data[:100], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        save_file({"images": images}, folder / "images.safetensors")
        process = subprocess.Popen([sys.executable, HERE / "server.py", server], stdout=subprocess.PIPE, text=True)
        try:
            address = process.stdout.readline().strip()
            words = [client, address, folder / "images.safetensors", folder / "outputs.safetensors"]
            subprocess.run([sys.executable, HERE / "device.py", *words], check=True)
        finally:
            process.terminate()
            process.wait()
        (outputs,) = load_file(folder / "outputs.safetensors").values()
    with torch.no_grad():
        print(f"Largest difference to the whole model's outputs: {float((outputs - model(images)).abs().max()):.1e}")


if __name__ == "__main__":
    main()
