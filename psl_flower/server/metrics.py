"""What is told of a training beside its loss: accuracy where it is classification, and the user's own metrics."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from psl_flower import tree
from psl_flower.devices import generators
from psl_flower.errors import ConfigError
from psl_flower.origin import where
from psl_flower.precision import widened
from psl_flower.server.apart import apart
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")

# What torch's losses leave out unless they are told otherwise.
IGNORE_INDEX = -100

MetricFn = Callable[[Any, Any], Any]

_RESERVED = ("loss", "num_examples")
_TORCHMETRICS = ("update", "compute", "reset")
_SHOWN = 5
_CLOSE = 1e-3  # rounding in half precision
_MOST_HELD = 2**26  # bytes of outputs and labels that a metric is given at once
_FAILURES: set[tuple[str, str]] = set()  # of metrics, by name and place, that this process has told of


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
    if classes_of(outputs, labels) is not None:
        return (
            "there is no accuracy: the loss's cross-entropy is of other targets than the labels, or of some of them: "
            "pass metrics={'name': function of (outputs, labels)} for your own"
        )
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
        them: it is copied. A metric called "accuracy" is told in place of ours. One that fails for a part is NaN for
        all, which is warned of.

    one_model : bool
        Whether all parts are of one model, so that metrics should tell what they would of all parts at once. They are
        given as many as `_MOST_HELD` allows; where those are not all, one that is no mean over examples is warned of.

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
        self._failed: set[str] = set()  # metrics of the user's that could not be computed for a part
        self._held: list[tuple[Any, Any, int]] = []  # parts that metrics are still to be given
        self._bytes = 0  # of these
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
        """
        self._add("loss", *loss)
        if summed:
            self._sums["loss"] = (self._sums["loss"][0], 1.0)
        self._scored &= score is not None
        if self._ours and score is not None:
            self._add("accuracy", *score)
        if not self._functions and not self._objects:
            return
        self._held.append((outputs, labels, rows))
        self._bytes += sum(t.nbytes for t in tree_leaves((outputs, labels)) if isinstance(t, Tensor))
        if not self._one_model or self._bytes > _MOST_HELD:
            self._measure()

    def _measure(self) -> None:
        """Give metrics the parts that are held, as one if they can be joined."""
        for outputs, labels, rows in _joined(self._held):
            self._measure_part(outputs, labels, rows)
        self._held, self._bytes = [], 0

    def _measure_part(self, outputs: Any, labels: Any, rows: int) -> None:
        if isinstance(outputs, Tensor | tuple | dict):
            outputs = widened(outputs)
        with torch.no_grad():
            for name in self._working(self._functions):
                function = self._functions[name]
                with self._told(name, outputs, labels):
                    mean = _number(function(outputs, labels))
                    self._add(name, *((0.0, 0.0) if math.isnan(mean) else (mean * rows, rows)))
                    if self._looks and self._parts and not _is_mean(function, outputs, labels, rows, mean):
                        _tell_no_mean(name)
            logits = logits_of(outputs)
            preds = outputs if logits is None else logits
            for name in self._working(self._objects):
                metric = self._objects[name]
                with self._told(name, preds, labels):
                    if isinstance(labels, Tensor) and hasattr(metric, "to"):
                        metric = self._objects[name] = metric.to(labels.device)
                    metric.update(preds, labels)
        self._parts += 1
        self._looks &= self._parts < 2 or rows < 2  # the second part tells, if it can be halved

    def result(self) -> dict[str, float]:
        """Return the means; without "accuracy" where a part was no classification, NaN where nothing counted."""
        if not self._sums:
            return {}
        self._measure()
        found = {name: total / weight if weight else math.nan for name, (total, weight) in self._sums.items()}
        if self._ours and not self._scored:
            found.pop("accuracy", None)
        for name in self._working(self._objects):
            with self._told(name):
                found[name] = _number(self._objects[name].compute())
        return found | dict.fromkeys(self._failed, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a checkpoint within a round."""
        return {
            "sums": {name: list(pair) for name, pair in self._sums.items()},
            "scored": self._scored,
            "objects": {name: _state_of(metric) for name, metric in self._objects.items()},
            "failed": sorted(self._failed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.reset()
        self._sums = {name: (pair[0], pair[1]) for name, pair in state["sums"].items()}
        self._scored, self._failed = bool(state["scored"]), set(state["failed"])
        for name, metric in self._objects.items():
            for key, value in state["objects"].get(name, {}).items():
                setattr(metric, key, value)

    def _working(self, metrics: Mapping[str, Any]) -> list[str]:
        return [name for name in metrics if name not in self._failed]

    @contextmanager
    def _told(self, name: str, *given: Any) -> Iterator[None]:
        """Let what goes wrong in a metric cost the metric, not the run."""
        try:
            yield
        except Exception as exc:  # the user's code
            self._failed.add(name)
            key = (name, where(exc, text=False))
            if key in _FAILURES:
                return
            _FAILURES.add(key)
            shapes = [str(tuple(t.shape)) if isinstance(t, Tensor) else f"a {type(t).__name__}" for t in given]
            log.warning(
                "metrics[%r] failed%s: %s. It is told as nan of this round or evaluation, and wherever it fails. Of "
                "batches in which it has no value, let it return nan; pass an object with %s for what is computed of "
                "all examples at once",
                name,
                f" on outputs {' and labels '.join(shapes)}" if shapes else "",
                exc if isinstance(exc, ConfigError) else where(exc),
                ", ".join(_TORCHMETRICS),
            )

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
    asked = apart(function)
    if asked is None:
        return True
    half, put_back = rows // 2, generators()

    def of(part: slice) -> float:
        return float(asked(*(tree.map_leaves(lambda t: t[part], each) for each in (outputs, labels))))

    try:
        mean = (of(slice(0, half)) * half + of(slice(half, None)) * (rows - half)) / rows
    except Exception:  # the user's code, with less than it was made for, or what is no tree of rows
        return True
    finally:
        put_back()
    return math.isnan(mean) or math.isclose(mean, value, rel_tol=_CLOSE, abs_tol=_CLOSE)


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


def _joined(parts: Sequence[tuple[Any, Any, int]]) -> Sequence[tuple[Any, Any, int]]:
    """Return parts as one; as they are if their outputs are no rows, or of several lengths."""
    if len(parts) < 2:
        return parts
    outputs, labels, rows = zip(*parts, strict=True)
    try:
        whole = tree.join(outputs, "outputs"), tree.join(labels, "labels"), sum(rows)
        return [whole] if tree.rows(whole[:2], "outputs") == sum(rows) else parts
    except (ConfigError, AttributeError, RuntimeError, TypeError):
        return parts


def _number(value: Any) -> float:
    try:
        return float(value)  # a number of Python's, torch's or numpy's
    except (TypeError, ValueError, RuntimeError):
        shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        remedy = "name each by itself, metrics=dict(collection)" if isinstance(value, dict) else "return its mean"
        raise ConfigError(f"it must return one number, got {shape}: {remedy}") from None
