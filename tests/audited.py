"""What tests of audits share: a small network in three parts, some of the digits, and what is attacked."""

import torch
from support import fast_sgd as sgd
from torch import nn

from psl_flower.app.datasets import load_arrays
from psl_flower.audit.rehearsal import Setting


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU())
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 32), nn.ReLU())
        self.tail = nn.Linear(32, 10)

    def forward(self, x):
        return self.tail(self.body(self.head(x)))


def setting(**options):
    """Return what is trained and attacked; half of the four clients are the attacker's."""
    torch.manual_seed(0)
    data = {"train": digits("train", 640), "test": digits("test", 40), "num_classes": 10}
    usual = {"cut": "body", "num_clients": 4, "num_shadow": 2, "num_rounds": 3, "optimizer": sgd}
    return Setting(**{"model": Net(), **data, **usual, **options})


def digits(split, size):
    images, labels = load_arrays("digits", split)
    return torch.from_numpy(images[:size]).float() / 128 - 0.6, torch.from_numpy(labels[:size])
