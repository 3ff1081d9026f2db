"""The model and the data of the benchmark: a small CNN on random 28x28 images, 128 examples a step."""

import numpy as np
import torch
from torch.utils.data import TensorDataset

from psl_flower.app.models import build_model

BATCH = 128
STEPS = 12


def model_fn():
    return build_model("cnn", in_channels=1, num_classes=10, seed=0)


def data_fn(context):
    client, num_clients = context.node_config["partition-id"], context.node_config["num-partitions"]
    rng = np.random.default_rng([5, client])
    size = BATCH * STEPS // num_clients
    images = torch.tensor(rng.normal(size=(size, 1, 28, 28)), dtype=torch.float32)
    return TensorDataset(images, torch.tensor(rng.integers(0, 10, size)))
