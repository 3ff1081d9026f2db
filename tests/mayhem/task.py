"""What is trained: a small model in two or three parts, and data of five clients."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from psl_flower import SplitModel

K, CLASSES, WIDTH = 5, 3, 6


def make_parts(tail):
    torch.manual_seed(0)
    parts = [
        nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Linear(8, CLASSES),
    ]
    parts = [part.double() for part in parts]
    return parts if tail else [parts[0], nn.Sequential(*parts[1:])]


def make_model(tail):
    with torch.random.fork_rng():
        names = ("client", "server", "tail") if tail else ("client", "server")
        return SplitModel(**dict(zip(names, make_parts(tail), strict=True)))


def data_of(client):
    rng = np.random.default_rng([11, client])
    size = 8 + 3 * client
    images, labels = rng.normal(size=(size, WIDTH)), rng.integers(CLASSES, size=size)
    return TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))


SIZES = [len(data_of(k)) for k in range(K)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
