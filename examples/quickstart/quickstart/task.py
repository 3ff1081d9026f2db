"""The model, the data, and how one is tested on the other."""

from functools import cache

import torch
import torch.nn.functional as F
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner, PathologicalPartitioner
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset


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
def load_all():
    """Return training and test images and labels of all clients together: (images, images, labels, labels)."""
    images, labels = load_digits(return_X_y=True)  # pixels from 0 to 16
    images = ((images - 4.9) / 6.0).reshape(-1, 1, 8, 8).astype("float32")
    return train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)


@cache
def partitioned(partition, num_partitions):
    """Return the training data of all clients, ready to be asked for one client's."""
    images, _, labels, _ = load_all()
    if partition == "iid":
        partitioner = IidPartitioner(num_partitions)
    else:
        partitioner = PathologicalPartitioner(num_partitions, "label", 2, class_assignment_mode="first-deterministic")
    partitioner.dataset = Dataset.from_dict({"image": list(images), "label": labels}).with_format("torch")
    return partitioner


def load_data(context):
    """Return one client's training data and its test data, a fifth of what it has."""
    partition_id, num_partitions = context.node_config["partition-id"], context.node_config["num-partitions"]
    partitioner = partitioned(context.run_config["partition"], num_partitions)
    parts = partitioner.load_partition(partition_id).train_test_split(test_size=0.2, seed=42)
    return tuple(TensorDataset(parts[name][:]["image"], parts[name][:]["label"]) for name in ("train", "test"))


def load_server_test_data():
    """Return the server's own test data."""
    _, images, _, labels = load_all()
    return TensorDataset(torch.tensor(images), torch.tensor(labels))


def test(model, data):
    """Return a model's mean loss and its accuracy."""
    images, labels = data.tensors
    model.eval()
    with torch.inference_mode():
        logits = model(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).float().mean().item()
