"""Which part of a batch is its inputs, and which its target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from psl_flower.errors import ConfigError

LABEL_NAMES = ("label", "labels")  # of a dict row, where none is named
INPUT = "input"  # as `target`: the inputs themselves
TEST = "test data"  # as the name of data: what is evaluated, or predicted


def divide(batch: Any, target: str, name: str) -> tuple[Any, Any]:
    """Return the inputs and the target of a batch, which has the form of a row.

    A row is a pair (x, y), a tuple (x1, x2, ..., y), or a dict with the label under a name of its own. With
    ``target="input"``, labels are left out, rows without a label are taken, and the inputs are the target. Test data
    need no label, for they may be there to be predicted: the target is None.

    Raises
    ------
    ConfigError
        If there is no label.
    """
    inputs, label = _inputs_and_label(batch, target, name)
    if target != INPUT:
        return inputs, label
    if isinstance(inputs, Mapping) and len(inputs) == 1:  # the model has one input, and one output
        (inputs,) = inputs.values()
    return inputs, inputs


def label_name(names: Any, target: str) -> str | None:
    """Return which of the names of a dict row is the label's, or None."""
    candidates = LABEL_NAMES if target in (*LABEL_NAMES[:1], INPUT) else (target,)
    return next((candidate for candidate in candidates if candidate in names), None)


def _inputs_and_label(batch: Any, target: str, name: str) -> tuple[Any, Any]:
    optional = target == INPUT or name == TEST
    if isinstance(batch, Mapping):
        key = label_name(batch, target)
        if key is None and not optional:
            asked = " or ".join(map(repr, LABEL_NAMES if target == LABEL_NAMES[0] else (target,)))
            raise ConfigError(
                f"the label of a dict row must be under the name {asked}, the rows of the {name} hold "
                f"{', '.join(sorted(map(repr, batch)))}: name it, e.g. target='fine_label'; target='input' trains an "
                "autoencoder"
            )
        inputs = {other: batch[other] for other in batch if other != key}
        if not inputs:
            raise ConfigError(f"a row must hold an input beside its label, the {name} has only {key!r}")
        return inputs, None if key is None else batch[key]
    if isinstance(batch, tuple | list) and len(batch) > 1:
        *several, label = batch
        return several[0] if len(several) == 1 else tuple(several), label
    if optional and isinstance(batch, tuple | list) and batch:
        return batch[0], None
    if optional and isinstance(batch, Tensor):
        return batch, None
    kind = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
    raise ConfigError(
        f"rows must be pairs (input, label), tuples (input, ..., label) or dicts with a label, the rows of the {name} "
        f"have no label (found a {kind}): add one, or pass target='input', which trains an autoencoder"
    )
