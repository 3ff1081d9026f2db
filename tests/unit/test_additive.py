"""Whether the loss of a batch can be put together from its parts' is told by what the loss does."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from psl_flower.errors import ConfigError
from psl_flower.server import Additivity, Reduction, additive, adds_up, weighted

GENERATOR = torch.Generator().manual_seed(0)
OUTPUTS = torch.randn(7, 3, dtype=torch.float64, generator=GENERATOR).requires_grad_()
LABELS = torch.tensor([0, 2, 1, -100, -100, -100, 1])


def masked(outputs, labels):
    mask = labels != -100
    return F.cross_entropy(outputs, labels, reduction="none")[mask].sum() / mask.sum()


def answer(loss, outputs=OUTPUTS, labels=LABELS):
    found = weighted(loss, outputs, labels, len(labels), reduction=Reduction())
    return adds_up(loss, outputs, labels, len(labels), found)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        masked,
        lambda o, y: F.cross_entropy(o, y, reduction="sum"),
        lambda o, y: F.cross_entropy(o, y, reduction="sum") / (y != -100).sum().item(),
        lambda o, y: F.cross_entropy(o, y, weight=torch.tensor([1.0, 2.0, 5.0]).double(), label_smoothing=0.1),
        lambda o, y: o.square().mean(),
    ],
)
def test_means_and_sums_do(loss):
    assert answer(loss) is True


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: masked(o, y).sqrt(),
        lambda o, y: F.cross_entropy(o, y) + o.square().mean(),
        lambda o, y: F.cross_entropy(o, y, reduction="sum") * (1 / (y != -100).sum().item()),
        lambda o, y: 1 - o.softmax(1)[:, 0].prod(),
        lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(o))),
    ],
)
def test_others_do_not(loss):
    assert answer(loss) is False


def test_what_only_other_labels_show():
    """In each row one of two targets counts; of others it may be both."""
    outputs = torch.randn(8, 3, 2, dtype=torch.float64, generator=GENERATOR)
    labels = torch.tensor([0, -100]).repeat(8, 1)
    assert answer(F.cross_entropy, outputs, labels) is True
    assert answer(lambda o, y: F.cross_entropy(o, y) + o.square().mean(), outputs, labels) is False


def test_parts_of_as_many_rows_would_hide_what_weighs_nothing_by_them():
    of_six = OUTPUTS[:6], LABELS[[0, 1, 2, 0, 1, 2]]
    assert answer(lambda o, y: (F.cross_entropy(o, y, reduction="sum") / len(y)).view(1).mean(), *of_six) is False


def test_what_does_not_show():
    assert answer(F.cross_entropy, OUTPUTS[:1], LABELS[:1]) is None
    assert answer(F.cross_entropy, OUTPUTS, torch.full((7,), -100)) is None
    assert answer(lambda o, y: F.cross_entropy(F.dropout(o), y)) is None  # random

    def of_seven(outputs, labels):
        assert len(outputs) == 7
        return outputs.mean()

    assert answer(of_seven) is None


class Relative:
    """Divides by a running mean of its own."""

    def __init__(self, counts=True):
        self.mean, self.counts = 1.0, counts

    def __call__(self, outputs, labels):
        loss = F.cross_entropy(outputs, labels)
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        return loss / self.mean if self.counts else loss


def test_what_keeps_something_from_batch_to_batch_is_refused_where_it_counts():
    with pytest.raises(ConfigError, match=r"another one when it is computed again: .* \(no tail\)"):
        answer(Relative())
    assert answer(Relative(counts=False)) is True
    assert answer(lambda o, y: F.cross_entropy(o + random.random() * np.random.rand(), y)) is True  # noqa: NPY002
    assert answer(lambda o, y: F.cross_entropy(o * random.random() + np.random.rand(), y)) is None  # noqa: NPY002


def test_some_batches_are_looked_at_in_training_only(monkeypatch):
    monkeypatch.setattr(additive, "apart", lambda loss: None)  # the calls of a copy do not count

    def loss(outputs, labels):
        calls.append(len(labels))
        return outputs.square().mean().sqrt()

    calls, looking = [], Additivity(2)
    found = weighted(loss, OUTPUTS, LABELS, 7)
    arguments = (loss, OUTPUTS, LABELS, 7, found)
    with torch.no_grad():
        assert not looking.refuted(*arguments, classify=True)
    assert calls == [7]
    assert [looking.refuted(*arguments, classify=True) for _ in range(3)] == [True, True, False]
    assert calls == [7] + 6 * [2, 5, 7, 7, 7]
