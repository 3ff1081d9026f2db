"""The model, the data, and how one is trained and tested on the other."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner, PathologicalPartitioner
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader


class Net(nn.Module):
    """A small CNN for grey images of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        """Return the logits of a batch of images."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)


@cache  # once a process
def digits():
    """Return all images and their labels, as on the Hugging Face Hub, in two splits: "train" and "test"."""
    images, labels = load_digits(return_X_y=True)  # pixels from 0 to 16
    images = [Image.fromarray(image) for image in images.reshape(-1, 8, 8).astype(np.uint8)]
    data = Dataset.from_dict({"img": images, "label": labels}).class_encode_column("label")
    return data.train_test_split(test_size=360, stratify_by_column="label", seed=0)


@cache
def partitioned(num_partitions, partition):
    """Return the training data of all clients, ready to be asked for one client's."""
    if partition == "iid":
        partitioner = IidPartitioner(num_partitions)
    else:
        partitioner = PathologicalPartitioner(num_partitions, "label", 2, class_assignment_mode="first-deterministic")
    partitioner.dataset = digits()["train"]  # from the Hub: FederatedDataset(dataset=..., partitioners={"train": ...})
    return partitioner


def apply_transforms(batch):
    """Make tensors of a batch's images."""
    batch["img"] = [(torch.tensor(np.array(image), dtype=torch.float32)[None] - 4.9) / 6 for image in batch["img"]]
    return batch


def load_data(partition_id, num_partitions, batch_size, partition):
    """Return loaders of one client's training data, and of its test data: a fifth of what it has."""
    parts = partitioned(num_partitions, partition).load_partition(partition_id)
    parts = parts.train_test_split(test_size=0.2, seed=42).with_transform(apply_transforms)
    return DataLoader(parts["train"], batch_size, shuffle=True), DataLoader(parts["test"], batch_size)


def load_server_test_data():
    """Return a loader of the server's own test data."""
    return DataLoader(digits()["test"].with_transform(apply_transforms), batch_size=128)


def train(model, loader, epochs, lr):
    """Train a model and return its mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    losses = []
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch["img"]), batch["label"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(model, loader):
    """Return a model's mean loss and its accuracy."""
    model.eval()
    loss, right, number = 0.0, 0, len(loader.dataset)
    with torch.inference_mode():
        for batch in loader:
            logits, labels = model(batch["img"]), batch["label"]
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(dim=1) == labels).sum().item()
    return loss / number, right / number
