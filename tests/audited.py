"""What tests of audits share: a small network in three parts, and some of the digits."""

import torch
from torch import nn

from psl_flower.app.datasets import load_arrays


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU())
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 32), nn.ReLU())
        self.tail = nn.Linear(32, 10)

    def forward(self, x):
        return self.tail(self.body(self.head(x)))


def digits(split, size):
    images, labels = load_arrays("digits", split)
    return torch.from_numpy(images[:size]).float() / 128 - 0.6, torch.from_numpy(labels[:size])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
