"""A loss as a sum and a weight: parts that are added up give the loss of all of them pooled.

A loss is the mean over what counts in a batch. Means of means are wrong as soon as parts count differently: with
`ignore_index`, class weights, sequences of uneven lengths. What a mean is over cannot be read off a user's function,
but it can be seen while the function runs: torch tells a `TorchFunctionMode` of all that is called.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from psl_flower import tree
from psl_flower.checks import why_not_called
from psl_flower.errors import ConfigError, LabelError
from psl_flower.server.metrics import Predictions, is_integer, label_rule, logits_of, wrong_rows
from psl_flower.server.misfit import binary_misfit, cross_entropy_misfit, remark
from psl_flower.server.reduction import Reduction
from psl_flower.tree import Tree

Loss = Callable[[Any, Any], Tensor]

_CROSS_ENTROPIES = {f: inspect.signature(f) for f in (F.cross_entropy, F.nll_loss)}
_ENTROPIES = _CROSS_ENTROPIES | {
    f: inspect.signature(f) for f in (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
}
# Of each element, and their mean unless they are told otherwise.
_ELEMENTWISE = {
    f: inspect.signature(f)
    for f in (
        *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
        *(F.binary_cross_entropy_with_logits, F.kl_div, F.poisson_nll_loss, F.gaussian_nll_loss),
        *(F.soft_margin_loss, F.hinge_embedding_loss),
    )
}
_DIVIDED_BY_WEIGHTS = F.mse_loss, F.l1_loss
_DIVISIONS = (Tensor.div, Tensor.div_, Tensor.true_divide, torch.div, torch.true_divide)
_MEANS = (Tensor.mean, torch.mean)
_SUMS = (Tensor.sum, torch.sum)
_DIFFERENCES = (Tensor.sub, torch.sub, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


@dataclass(frozen=True, eq=False)
class WeightedLoss:
    """The loss of a batch, and how much it weighs among others.

    Parameters
    ----------
    mean : scalar Tensor
        As the user's function returned it, with its graph.
    weight : float
        What the mean is over: the targets that count, or the sum of their class weights; else the examples. 0 where
        nothing counts, and the mean is NaN.
    predictions : Predictions or None
        Of classes, and the labels; None unless it is classification.
    remark : str or None
        A sentence on what is seldom meant: outputs and labels that are spread over each other, say.
    summed : bool
        Whether it is no mean, but the sum over the batch.
    """

    mean: Tensor
    weight: float
    predictions: Predictions | None = None
    remark: str | None = None
    summed: bool = False

    @property
    def sum(self) -> float:
        """The mean times the weight, or what is the sum; 0 where nothing counts."""
        if not self.weight:
            return 0.0
        return self.mean.item() * (1.0 if self.summed else self.weight)

    def check_gradient(self) -> None:
        """Raise ConfigError unless it can be differentiated."""
        if not self.mean.requires_grad:
            raise ConfigError(
                "the loss has no gradient: compute it of the model's outputs with torch, without detach, item, numpy "
                "or no_grad"
            )


def check_loss(loss: Any) -> None:
    """Raise ConfigError unless it is a function that can be called with (outputs, labels)."""
    example = "a function of (outputs, labels), as torch.nn.functional.cross_entropy"
    if not callable(loss):
        raise ConfigError(f"loss must be callable, got {loss!r:.80}: pass {example}")
    if isinstance(loss, type):
        raise ConfigError(f"loss must be {example}, got the class {loss.__name__}: call it, loss={loss.__name__}()")
    if why := why_not_called(loss.forward if isinstance(loss, nn.Module) else loss, 2):
        raise ConfigError(f"loss must be {example}, but takes {why}")


def weighted(
    loss: Loss,
    outputs: Any,
    labels: Any,
    rows: int,
    *,
    classify: bool = True,
    reduction: Reduction | None = None,
) -> WeightedLoss:
    """Compute a user's loss of a batch, and find how much it weighs.

    The weight is, in this order,

    - where ``cross_entropy`` or ``nll_loss`` (also as modules) is called with its mean, by whatever function, and all
      such calls count the same: the targets that count, times their class weights;
    - where what is returned is a total divided by a tensor of one number (``total / mask.sum()``), or a sum divided by
      a number: that number;
    - where it is a ``mean()`` (``loss[mask].mean()``), or a loss of torch's that is the mean over elements
      (``mse_loss(outputs[mask], labels[mask])``): its elements. All may be scaled, and added if they count alike;
    - else `rows`. A sum of two losses that count differently has no weight that is right for both;
    - `rows` also where a loss takes a mean of each example by itself, in a loop, as `reduction` finds out.

    The sum of `WeightedLoss.sum` over parts, divided by that of their weights, equals the loss of all parts pooled.

    Parameters
    ----------
    loss : callable
        Takes (outputs, labels) and returns the mean over the batch.
    outputs, labels
        What the model returned, and the batch's labels. Torch's own cross-entropy takes the ``logits`` of what has
        them, as the outputs of transformers.
    rows : int
        Examples in the batch.
    classify : bool
        Whether labels may be class indices. If so, and the loss is no cross-entropy, shapes tell whether they are.
    reduction : Reduction, optional
        Asked whether the loss is a sum, and whether it goes row by row; without it, it is a mean of all at once.

    Raises
    ------
    LabelError
        If labels are no class indices. In ``cross_entropy`` that is found before torch's kernel runs, which on a GPU
        would leave the process without it.
    ConfigError
        If the loss is no scalar tensor.
    """
    outputs = logits_for(loss, outputs)
    watch = _Watch(outputs, labels)
    shaped = Predictions.of(outputs, labels) if classify else None
    try:
        with watch:
            mean = loss(outputs, labels)
    except LabelError:
        raise
    except Exception as exc:
        if not watch.targets:
            _check_labels(shaped, exc)
        raise
    if not isinstance(mean, Tensor) or mean.ndim:
        shown = f"shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
        raise ConfigError(f"the loss must be the mean over the batch, a tensor of one number, got {shown}")
    if not watch.targets:
        _check_labels(shaped, None)
    predictions = watch.predictions(outputs) if classify and watch.targets else shaped
    weight, summed = watch.weight_of(mean, rows), False
    if reduction is not None and weight:
        by_rows = reduction.goes_by_rows(loss, outputs, labels, rows, watch.terms(mean), _terms)
        weight = rows if by_rows else weight
        if by_rows or not watch.is_mean:
            summed = reduction.is_sum(loss, outputs, labels, mean.item())
    return WeightedLoss(mean, rows if summed else weight, predictions, watch.remark, summed)


def _terms(loss: Loss, outputs: Any, labels: Any) -> int:
    with (watch := _Watch(outputs, labels)):
        mean = loss(outputs, labels)
    return watch.terms(mean)


def logits_for(loss: Loss, outputs: Any) -> Any:
    """Return what a loss is given: the logits where torch's own cross-entropy could not do with what holds them."""
    if isinstance(outputs, Tensor) or not (loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)):
        return outputs
    logits = logits_of(outputs)
    return outputs if logits is None else logits


def loss_target(target: Tree, device: torch.device, *, classify: bool) -> Any:
    """Return a batch's target as a loss takes it: on its device, and class indices as int64 only.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if target is None:
        raise ConfigError(
            "the test data have no labels, and an evaluation compares with them: add a label to the rows, name it with "
            "target=, or pass evaluate_every=0 (predict needs none)"
        )
    labels = tree.to_device(target, device)
    return labels.long() if classify and is_integer(labels) else labels


def _check_labels(predictions: Predictions | None, cause: Exception | None) -> None:
    if predictions is None:
        return
    rows, text = wrong_rows(predictions.targets, predictions.classes)
    if rows:
        more = "; pass classification=False if they are none"
        raise LabelError(text + more, rows, rule=label_rule(predictions.classes) + more) from cause


class _Watch(TorchFunctionMode):
    """Sees the functions of torch that a loss calls, as far as they tell what its mean is over."""

    def __init__(self, outputs: Any, labels: Any) -> None:
        super().__init__()
        self._labels, self._logits = labels, logits_of(outputs)
        self._weights: list[float] = []  # of cross-entropies that are means
        self._counted: list[int] = []  # targets that count in cross-entropies, means or not
        self._totals: dict[int, Tensor] = {}  # sums that are one number, by id
        # by the id of a tensor that is a mean, it, which keeps the id its own, and what gives the number it is over
        self._means: dict[int, tuple[Tensor, list[Callable[[], float]]]] = {}
        self.targets: list[Predictions] = []  # of cross-entropies with class indices
        self.remark: str | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.l1_loss:
            kwargs = {**kwargs, **_weight_of_l1()}
        if func in _CROSS_ENTROPIES:
            given = _arguments(_CROSS_ENTROPIES[func], args, kwargs)
            input, target, weight = (given[name] for name in ("input", "target", "weight"))
            whole = isinstance(input, Tensor) and self._logits is not None and input.numel() == self._logits.numel()
            if misfit := cross_entropy_misfit(func.__name__, input, target, weight, whole=whole):
                raise ConfigError(misfit)
            self._cross_entropy(**given)
        elif func in _DIFFERENCES and self.remark is None:
            self.remark = _spread([*args, *kwargs.values()])
        result = self._called(func, args, kwargs)
        if isinstance(result, Tensor) and (result.ndim == 0 or func is torch.stack):
            operands = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
            divisors = self._divisors(func, operands) or self._number(func, args) or _elements(func, args, kwargs)
            if divisors:
                self._means[id(result)] = (result, divisors)
            elif func in _SUMS or kwargs.get("reduction") == "sum" or self._of_totals(operands):
                self._totals[id(result)] = result
        return result

    def _called(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch, and say of a cross-entropy what is wrong with what it is given."""
        if func not in _ENTROPIES:
            return func(*args, **kwargs)
        given = _arguments(_ENTROPIES[func], args, kwargs)
        name, input, target = func.__name__, given["input"], given["target"]
        try:
            result = func(*args, **kwargs)
        except Exception as exc:
            if func in _CROSS_ENTROPIES or not (misfit := binary_misfit(name, input, target)):
                raise
            raise ConfigError(misfit) from exc
        if self.remark is None and (func in _CROSS_ENTROPIES or given["reduction"] != "none"):  # or some are left out
            self.remark = remark(name, input, target)
        return result

    @property
    def is_mean(self) -> bool:
        """Whether it was seen that the loss is a mean."""
        return bool(self._weights)

    def weight_of(self, mean: Tensor, rows: int) -> float:
        """Return what a loss is the mean over."""
        if self._counted and not any(self._counted) and not self._weights and not mean.item():
            return 0.0
        if self._weights and all(math.isclose(w, self._weights[0]) for w in self._weights):
            return self._weights[0]
        if self._weights or id(mean) not in self._means:
            return rows
        first, *others = (float(divisor()) for divisor in self._means[id(mean)][1])
        sound = math.isfinite(first) and first >= 0 and all(math.isclose(other, first) for other in others)
        return first if sound else rows

    def terms(self, mean: Tensor) -> int:
        """Return how many means a loss is made of."""
        return len(self._weights) or len(self._means.get(id(mean), (mean, []))[1])

    def predictions(self, outputs: Any) -> Predictions | None:
        """Return what cross-entropy was given, where its targets are the labels; None where that is not clear."""
        of_labels = [seen for seen in self.targets if _same(seen.targets, self._labels)]
        if len(of_labels) > 1:  # an auxiliary head beside the main one
            logits = logits_of(outputs)
            of_labels = [seen for seen in of_labels if logits is not None and _same(seen.logits, logits)]
        return of_labels[0] if len(of_labels) == 1 else None

    def _divisors(self, func: Any, operands: list[Tensor]) -> list[Callable[[], float]]:
        """Return what gives the numbers that the scalar result of a function is the mean over; empty if it is none."""
        known = [self._means[id(t)][1] for t in operands if id(t) in self._means]
        if known and len(known) == len(operands):  # means that are scaled or added
            return [divisor for each in known for divisor in each]
        if func in _MEANS and operands[0].ndim:
            return [operands[0].numel]
        if func in _DIVISIONS and len(operands) == 2 and not known and not operands[1].requires_grad:
            return [partial(_divisor, *operands)]
        return []

    def _of_totals(self, operands: Sequence[Tensor]) -> bool:
        return bool(operands) and all(id(t) in self._totals for t in operands)

    def _number(self, func: Any, args: Sequence[Any]) -> list[Callable[[], float]]:
        """Return what gives the number, no tensor, that a sum is divided by."""
        if func in _DIVISIONS and len(args) == 2 and self._of_totals(args[:1]) and isinstance(args[1], int | float):
            return [partial(_divisor, *args)]
        return []

    def _cross_entropy(
        self, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, **legacy: Any
    ) -> None:
        if input.ndim == 1:  # one example without a batch
            input, target = input[None], target[None]
        if is_integer(target):
            self._check_range(target, input.shape[1], ignore_index)
            self.targets.append(Predictions(input.detach(), target, ignore_index))
            self._counted.append(int((target != ignore_index).sum()))
        if reduction != "mean" or legacy.get("size_average") is False or legacy.get("reduce") is False:
            return
        if not is_integer(target):  # probabilities: all of them count, whatever the class weights
            self._weights.append(input.numel() / input.shape[1])
            return
        counted = target[target != ignore_index]
        self._weights.append(float(counted.numel() if weight is None else weight.detach()[counted].sum()))

    def _check_range(self, target: Tensor, classes: int, ignore_index: int) -> None:
        positions, text = wrong_rows(target, classes, ignore_index)
        if positions:
            rows = wrong_rows(self._labels, classes, ignore_index)[0] if _same(target, self._labels) else []
            raise LabelError(text, rows, rule=label_rule(classes, ignore_index))


def _divisor(total: Tensor, number: Tensor | float) -> float:
    """Return what a total is divided by; 0 where that is a number of nothing, raised to 1 as by ``clamp(min=1)``."""
    found = float(number)
    return 0.0 if found == 1 and not total.item() else found


def _elements(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Callable[[], float]]:
    """Return what gives the number of elements that a loss of torch's is the mean over, or the sum of their weights."""
    if func not in _ELEMENTWISE:
        return []
    given = _arguments(_ELEMENTWISE[func], args, kwargs)
    if given["reduction"] == "batchmean":
        return [partial(len, given["input"])]
    if given["reduction"] != "mean" or given.get("size_average") is False or given.get("reduce") is False:
        return []
    if func in _DIVIDED_BY_WEIGHTS and (weight := given.get("weight")) is not None:  # which not all versions take
        return [weight.detach().sum().item]
    return [torch.broadcast_tensors(given["input"], given["target"])[0].numel]  # type: ignore[no-untyped-call]


def _weight_of_l1() -> dict[str, Any]:
    """Return the weight that ``l1_loss`` was called with, which torch, 2.13 at least, does not tell who watches it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    return {} if weight is None else {"weight": weight}


def _arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _same(one: Any, other: Any) -> bool:
    """Return whether two tensors hold the same values, in whatever shape."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.numel() != other.numel():
        return False
    if one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
        return True
    return torch.equal(one.detach().flatten(), other.detach().flatten().to(one))


def _spread(operands: Sequence[Any]) -> str | None:
    """Return a sentence if (n,) and (n, 1) meet, which torch spreads to (n, n)."""
    shapes = [tuple(t.shape) for t in operands[:2] if isinstance(t, Tensor)]
    if len(shapes) < 2 or sorted(map(len, shapes)) != [1, 2]:
        return None
    flat, column = sorted(shapes, key=len)
    if column != (flat[0], 1) or flat[0] == 1:
        return None
    return (
        f"the loss compares {shapes[0]} with {shapes[1]}, which torch spreads to {(flat[0], flat[0])}: every output is "
        "compared with every label. Give both one shape: labels (n, 1), or outputs.squeeze(1)"
    )
