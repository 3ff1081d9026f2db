"""What is told of a training beside its loss: accuracy where it is classification, and the user's own metrics."""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from psl_flower import tree
from psl_flower.errors import ConfigError
from psl_flower.origin import where
from psl_flower.precision import widened
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")

# What torch's losses leave out unless they are told otherwise.
IGNORE_INDEX = -100

MetricFn = Callable[[Any, Any], Any]

_RESERVED = ("loss", "num_examples")
_TORCHMETRICS = ("update", "compute", "reset")
_SHOWN = 5
_CLOSE = 1e-3  # rounding in half precision
_STORES = ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR")
_KEEPING_NOTHING = (ModuleType, FunctionType, BuiltinFunctionType, type, bool, int, float, str, type(None))


# --- classification --------------------------------------------------------------------------------------------------
def logits_of(outputs: Any) -> Tensor | None:
    """Return the one tensor of a model's outputs that can be its predictions; None where that is not clear.

    That is the tensor itself, what is called ``logits`` in a dict or an object (Hugging Face's, torchvision's), or the
    only tensor of a tuple.
    """
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits")
    elif not isinstance(outputs, Tensor) and hasattr(outputs, "logits"):
        outputs = outputs.logits
    elif isinstance(outputs, list | tuple) and len(outputs) == 1:
        outputs = outputs[0]
    return outputs if isinstance(outputs, Tensor) else None


def classes_of(outputs: Any, labels: Any) -> int | None:
    """Return the number of classes if outputs and labels have the shapes of classification, else None.

    Outputs are (n, C, ...), labels integers (n, ...), as in ``torch.nn.functional.cross_entropy``, with at least two
    classes. Labels of the outputs' shape (several a row), one output a row (a binary logit) and outputs that would fit
    with their classes in the last place as well are none.
    """
    logits = logits_of(outputs)
    if logits is None or not is_integer(labels) or logits.ndim < 2:
        return None
    shape, classes = tuple(logits.shape), logits.shape[1]
    if classes < 2 or shape[:1] + shape[2:] != tuple(labels.shape):
        return None
    if logits.ndim > 2 and shape[:-1] == tuple(labels.shape):
        return None
    return int(classes)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of classes, and what would have been right.

    Parameters
    ----------
    logits : (n, C, ...) Tensor
    targets : (n, ...) integer Tensor
        From 0 to C - 1, or `ignore_index`.
    ignore_index : int
        Target of what does not count.
    """

    logits: Tensor
    targets: Tensor
    ignore_index: int = IGNORE_INDEX

    @classmethod
    def of(cls, outputs: Any, labels: Any) -> Self | None:
        """Return them if outputs and labels have the shapes of classification, see `classes_of`."""
        logits = logits_of(outputs)
        return None if logits is None or classes_of(outputs, labels) is None else cls(logits.detach(), labels)

    @property
    def classes(self) -> int:
        """Their number."""
        return int(self.logits.shape[1])

    def score(self) -> tuple[int, int]:
        """Return how many are right, and how many count."""
        counted = self.targets != self.ignore_index
        right = (self.logits.argmax(dim=1) == self.targets) & counted
        return int(right.sum()), int(counted.sum())

    def class_counts(self) -> IntArray:
        """Return the targets of each class that count, (C,) int64."""
        counted = self.targets[self.targets != self.ignore_index].long()
        counts: IntArray = torch.bincount(counted, minlength=self.classes).cpu().numpy()
        return counts


def wrong_rows(labels: Tensor, classes: int, ignore_index: int = IGNORE_INDEX) -> tuple[list[int], str]:
    """Find labels that are no class indices.

    Parameters
    ----------
    labels : (n, ...) integer Tensor
    classes : int
        Labels go from 0 to one less.
    ignore_index : int
        Is no class, and allowed.

    Returns
    -------
    rows : list of int
        Positions of the examples that have such labels; empty if all are right.
    text : str
        The rule, the values found and the remedy, without a position: it holds for any client's part.
    """
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    rows = wrong.reshape(len(labels), -1).any(dim=1).nonzero().flatten().tolist()
    if not rows:
        return [], ""
    values = sorted(set(labels[wrong].tolist()))
    found = ", ".join(map(str, values[:_SHOWN])) + (", ..." if len(values) > _SHOWN else "")
    return rows, label_rule(classes, ignore_index, f", got {found}")


def label_rule(classes: int, ignore_index: int = IGNORE_INDEX, found: str = "") -> str:
    """Return what labels must be, and the remedy; without `found` it says nothing of any label."""
    return (
        f"labels must be class indices from 0 to {classes - 1}, as the model has {classes} outputs, or {ignore_index} "
        f"for what does not count{found}: number the classes from 0, or give the model an output for each"
    )


def why_no_accuracy(outputs: Any, labels: Any) -> str:
    """Return the sentence that says why there is no accuracy, and what to do."""
    logits = logits_of(outputs)
    shown = f"a {type(outputs).__name__}" if logits is None else _batch_shape(logits)
    theirs = f"{_batch_shape(labels)} of {labels.dtype}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
    return (
        f"there is no accuracy: it needs outputs (n, classes, ...) and integer labels (n, ...), or a cross-entropy of "
        f"them, got outputs {shown} and labels {theirs}: pass metrics={{'name': function of (outputs, labels)}} for "
        "your own"
    )


def _batch_shape(tensor: Tensor) -> str:
    """Return a shape that is the same for batches of any size."""
    return f"({', '.join(['n', *map(str, tensor.shape[1:])])})"


def is_integer(value: Any) -> bool:
    """Return whether it is a tensor of integers; bool is none."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


# --- sums over examples ----------------------------------------------------------------------------------------------
class Scores:
    """What is told of a round, or of an evaluation: sums over its parts, so that it equals what is told of all at once.

    Parameters
    ----------
    metrics : dict of str to callable
        The user's own. A function of (outputs, labels) that returns the mean over the examples it is given; where that
        is NaN, there was nothing to count. Or an object with ``update``, ``compute`` and ``reset``, as torchmetrics has
        them: it is copied. A metric called "accuracy" is told in place of ours.

    one_model : bool
        Whether all parts are of one model, so that functions should tell what they would of all parts at once. One that
        is no mean over examples is warned of, once.

    Raises
    ------
    ConfigError
        If one is neither, or its name is taken.
    """

    def __init__(self, metrics: Mapping[str, Any] | None = None, *, one_model: bool = False) -> None:
        mine = check_metrics(metrics or {})
        self._one_model = one_model
        self._objects = {name: copy.deepcopy(m) for name, m in mine.items() if _is_torchmetric(m)}
        self._functions: dict[str, MetricFn] = {n: m for n, m in mine.items() if n not in self._objects}
        self._ours = "accuracy" not in mine
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._parts, self._looks = 0, self._one_model
        self._sums: dict[str, tuple[float, float]] = {}  # of each metric: the sum, and the weight it is divided by
        self._scored = self._ours
        for metric in self._objects.values():
            metric.reset()

    def add(
        self,
        outputs: Any,
        labels: Any,
        rows: int,
        *,
        loss: tuple[float, float],
        score: tuple[int, int] | None,
        summed: bool = False,
    ) -> None:
        """Count a part in.

        Parameters
        ----------
        outputs, labels
            The part's; without a graph. Metrics are given outputs in bfloat16 as float32.
        rows : int
            Examples.
        loss : (float, float)
            Sum and weight, as `psl_flower.server.weighted` finds them.
        score : (int, int), optional
            Right predictions, and those that count; None where it is no classification: there is no accuracy then.
        summed : bool
            Whether the loss of all is their sum, and no mean.

        Raises
        ------
        ConfigError
            If a metric of the user's fails, or returns no number.
        """
        self._add("loss", *loss)
        if summed:
            self._sums["loss"] = (self._sums["loss"][0], 1.0)
        self._scored &= score is not None
        if self._ours and score is not None:
            self._add("accuracy", *score)
        if (self._functions or self._objects) and isinstance(outputs, Tensor | tuple | dict):
            outputs = widened(outputs)
        with torch.no_grad():
            for name, function in self._functions.items():
                mean = _number(_call(name, function, outputs, labels), name)
                self._add(name, *((0.0, 0.0) if math.isnan(mean) else (mean * rows, rows)))
                if self._looks and self._parts and not _is_mean(function, outputs, labels, rows, mean):
                    _tell_no_mean(name)
            logits = logits_of(outputs)
            preds = outputs if logits is None else logits
            for name, metric in self._objects.items():
                if isinstance(labels, Tensor) and hasattr(metric, "to"):
                    metric = self._objects[name] = metric.to(labels.device)
                _call(name, metric.update, preds, labels)
        self._parts += 1
        self._looks &= self._parts < 2 or rows < 2  # the second part tells, if it can be halved

    def result(self) -> dict[str, float]:
        """Return the means; without "accuracy" where a part was no classification, NaN where nothing counted."""
        if not self._sums:
            return {}
        found = {name: total / weight if weight else math.nan for name, (total, weight) in self._sums.items()}
        if self._ours and not self._scored:
            found.pop("accuracy", None)
        return {**found, **{name: _number(metric.compute(), name) for name, metric in self._objects.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a checkpoint within a round."""
        return {
            "sums": {name: list(pair) for name, pair in self._sums.items()},
            "scored": self._scored,
            "objects": {name: _state_of(metric) for name, metric in self._objects.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.reset()
        self._sums = {name: (pair[0], pair[1]) for name, pair in state["sums"].items()}
        self._scored = bool(state["scored"])
        for name, metric in self._objects.items():
            for key, value in state["objects"].get(name, {}).items():
                setattr(metric, key, value)

    def _add(self, name: str, total: float, weight: float) -> None:
        before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before[0] + total, before[1] + weight)


def check_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's metrics, or raise ConfigError if one is none or its name is taken."""
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics must be a dict of names to functions of (outputs, labels), got {metrics!r:.80}")
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name or name in _RESERVED:
            raise ConfigError(f"a metric's name must be text other than {' and '.join(_RESERVED)}, got {name!r:.80}")
        if isinstance(metric, type) or not (callable(metric) or _is_torchmetric(metric)):
            raise ConfigError(
                f"metrics[{name!r}] must be a function of (outputs, labels), or an object with "
                f"{', '.join(_TORCHMETRICS)}, got {metric!r:.80}"
            )
    return dict(metrics)


def _is_mean(function: MetricFn, outputs: Any, labels: Any, rows: int, value: float) -> bool:
    """Return whether a metric of a batch is the mean of those of its halves; True as well where that cannot be told."""
    if not _can_be_asked_again(function):
        return True
    half = rows // 2

    def of(part: slice) -> float:
        return float(function(*(tree.map_leaves(lambda t: t[part], each) for each in (outputs, labels))))

    try:
        mean = (of(slice(0, half)) * half + of(slice(half, None)) * (rows - half)) / rows
    except Exception:  # the user's code, with less than it was made for, or what is no tree of rows
        return True
    return math.isnan(mean) or math.isclose(mean, value, rel_tol=_CLOSE, abs_tol=_CLOSE)


def _can_be_asked_again(function: MetricFn) -> bool:
    """Return whether a metric is a function that keeps nothing of what it is given: others may collect it."""
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(function, FunctionType) or any(step.opname in _STORES for step in dis.get_instructions(function)):
        return False
    names = inspect.getclosurevars(function)
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    held = (*names.nonlocals.values(), *names.globals.values(), *defaults)
    return all(isinstance(value, _KEEPING_NOTHING) for value in held)


@functools.cache
def _tell_no_mean(name: str) -> None:
    """Warn once of a metric."""
    log.warning(
        "metrics[%r] is no mean over examples: what is told of an evaluation is the mean of its batches' values, not "
        "the value for all test data. Pass an object with %s, as torchmetrics has them, or an evaluate_batch_size that "
        "holds all test data",
        name,
        ", ".join(_TORCHMETRICS),
    )


def _is_torchmetric(metric: Any) -> bool:
    return all(callable(getattr(metric, name, None)) for name in _TORCHMETRICS)


def _state_of(metric: Any) -> dict[str, Any]:
    """Return the state of an object of torchmetrics; empty for others, of which it is not known."""
    state = getattr(metric, "metric_state", None)
    if not isinstance(state, Mapping):
        return {}
    return {**copy.deepcopy(dict(state)), "_update_count": metric._update_count}


def _call(name: str, function: Callable[..., Any], outputs: Any, labels: Any) -> Any:
    try:
        return function(outputs, labels)
    except Exception as exc:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (outputs, labels)]
        raise ConfigError(
            f"metrics[{name!r}] failed on outputs {shapes[0]} and labels {shapes[1]}: {where(exc)}"
        ) from exc


def _number(value: Any, name: str) -> float:
    try:
        return float(value)  # a number of Python's, torch's or numpy's
    except (TypeError, ValueError, RuntimeError):
        shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        remedy = "name each by itself, metrics=dict(collection)" if isinstance(value, dict) else "return its mean"
        raise ConfigError(f"metrics[{name!r}] must return one number, got {shape}: {remedy}") from None
