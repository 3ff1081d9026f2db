"""What a server part made of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from psl_flower import tree
from psl_flower.server.metrics import Scores
from psl_flower.tree import Tree
from psl_flower.typing import IntArray


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a server part made of a batch.

    Parameters
    ----------
    loss : float
        Mean over the batch; its sum, if the loss is one.
    weight : float
        What the mean was taken over: examples, or what the loss counts of them; 0 where nothing counts.
    outputs, target
        Of the model, without a graph; the target as the loss was given it. None where they stay with the clients.
    rows : int
        Examples.
    score : (int, int) or None
        Right predictions, and those that count; None unless it is classification.
    class_counts : (C,) int64 or None
        Labels of each class in the batch; None unless it is classification.
    gradient : tree or None
        Of the inputs, None for what is not differentiable. None in evaluation.
    parameter_gradients : dict of str to Tensor or None
        Of the part, by whole-model name.
    summed : bool
        Whether the loss is the sum over the batch.
    """

    loss: float
    weight: float
    outputs: Any
    target: Any
    rows: int
    score: tuple[int, int] | None
    class_counts: IntArray | None
    gradient: Tree = None
    parameter_gradients: Mapping[str, Tensor | None] | None = None
    summed: bool = False

    @property
    def accuracy(self) -> float | None:
        """Share of right predictions, where it is classification and some count."""
        return None if self.score is None or not self.score[1] else self.score[0] / self.score[1]

    def add_to(self, scores: Scores) -> None:
        """Count it in."""
        loss = (self._total, self.weight)
        scores.add(self.outputs, self.target, self.rows, loss=loss, score=self.score, summed=self.summed)

    @property
    def _total(self) -> float:
        return self.loss * (1.0 if self.summed else self.weight) if self.weight else 0.0

    def join(self, others: Sequence[Outcome]) -> Outcome:
        """Return what became of this batch and others as of one, without gradients."""
        outcomes = [self, *others]
        weight, total = sum(each.weight for each in outcomes), sum(each._total for each in outcomes)
        summed = any(each.summed for each in outcomes)
        scores = [each.score for each in outcomes if each.score is not None]
        counts = [each.class_counts for each in outcomes if each.class_counts is not None]
        outputs, targets = [each.outputs for each in outcomes], [each.target for each in outcomes]
        trees = all(isinstance(each, Tensor | tuple | dict) for each in outputs)
        return Outcome(
            loss=total / (1.0 if summed else weight) if weight else math.nan,
            summed=summed,
            weight=weight,
            outputs=tree.join(outputs, "outputs") if trees else outputs,
            target=tree.join(targets, "targets"),
            rows=sum(each.rows for each in outcomes),
            score=(sum(right for right, _ in scores), sum(of for _, of in scores)) if scores else None,
            class_counts=sum(counts[1:], start=counts[0]) if counts else None,
        )
