"""Labels that are told with chance: differential privacy for each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from psl_flower.checks import check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.privacy.defences.base import Defence
from psl_flower.privacy.secret import Secret
from psl_flower.typing import FloatArray, IntArray


@dataclass(frozen=True)
class RandomizedResponse(Defence):
    """Replaces the label of each example by chance: epsilon-differential privacy for the label (label DP).

    A label stays with probability e^epsilon / (e^epsilon + C - 1), else it is any of the other C - 1, each as likely as
    the next (Warner 1965 for C = 2; Kairouz et al., arXiv 1602.07387, for more). It is drawn once an example and run:
    whatever is computed from labels (what is sent, losses and gradients, counts of classes, scores on test data) is
    computed from this one draw, so epsilon covers all of it, however many rounds there are. Runs add up: two with
    epsilon 1 are as one with epsilon 2. Inputs are not protected, and may well tell the label.

    Parameters
    ----------
    epsilon : float
        How much of a label may show.
    classes : int
        C.
    """

    epsilon: float
    classes: int

    def __post_init__(self) -> None:
        check_float(self.epsilon, "epsilon", above=0)
        check_int(self.classes, "classes", least=2)

    @property
    def keeps(self) -> float:
        """The probability that a label stays."""
        return 1 / (1 + (self.classes - 1) * math.exp(-self.epsilon))

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of the replaced labels, (), with what replaced them taken into account.

        The model's probabilities p are those of true labels; of told ones they are q = keeps p + (1 - keeps) (1 - p) /
        (C - 1), and the loss is -log q of the told label ("forward correction", Patrini et al., arXiv 1609.03683). So
        the outputs that it is least for, over many examples, are those of the cross-entropy of the true labels. Give
        it to whoever takes the loss: ``loss=RandomizedResponse(1, 10).loss``.

        Parameters
        ----------
        outputs : (n, C) Tensor
            Logits.
        target : (n,) int64
            Told labels.
        """
        if outputs.ndim != 2 or outputs.shape[1] != self.classes:
            raise ConfigError(f"the loss is for logits (n, {self.classes}), got {tuple(outputs.shape)}")
        other = (1 - self.keeps) / (self.classes - 1)
        true = functional.log_softmax(outputs, dim=1) + math.log(self.keeps - other)
        told = torch.logaddexp(true, torch.full_like(true, math.log(other))) if other else true
        return functional.nll_loss(told, target)

    def labels(self, labels: IntArray, examples: IntArray, secret: Secret, purpose: bytes) -> IntArray:
        """Draw them."""
        check_labels(labels, self.classes, "RandomizedResponse")
        return replaced(labels, secret.uniform(purpose, examples, 1)[:, 0], self.keeps, self.classes)


def check_labels(labels: IntArray, classes: int, defence: str) -> None:
    """Raise ConfigError unless labels are one class an example, below `classes`."""
    if labels.ndim != 1 or labels.dtype != np.int64:
        raise ConfigError(
            f"{defence} is for one class an example, int64 (n,), got {labels.dtype} {labels.shape}: leave it out"
        )
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise ConfigError(f"{defence} is for the classes 0 to {classes - 1}: there are other labels")


def replaced(labels: IntArray, drawn: FloatArray, keeps: float, classes: int) -> IntArray:
    """Return labels of which each stays with probability `keeps`, and else is any other, (n,) int64.

    Parameters
    ----------
    labels : (n,) int64
    drawn : (n,) float64
        Uniform between 0 and 1.
    """
    # what is left of a number that is no less than `keeps` is uniform again: it says which of the others
    left = np.maximum(drawn - keeps, 0) / max(1 - keeps, np.finfo(np.float64).tiny)
    other = np.minimum((left * (classes - 1)).astype(np.int64), classes - 2)
    return np.asarray(np.where(drawn < keeps, labels, (labels + 1 + other) % classes))
