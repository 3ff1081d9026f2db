"""From rows to a batch, with torch's `default_collate`; and what to do about rows that it does not take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from psl_flower.errors import ConfigError
from psl_flower.tree import native


def collate(rows: Sequence[Any], indices: Sequence[int], name: str) -> Any:
    """Return rows as one batch in the form of a row.

    Parameters
    ----------
    rows : sequence
        At least one.
    indices : sequence of int
        Theirs in the dataset, for messages.
    name : str
        What data they are of, for messages: "training data".

    Raises
    ------
    ConfigError
        If rows hold what cannot become a tensor, or differ in form; the message says what to do.
    """
    _check_leaves(rows[0], indices[0], name)
    try:
        return default_collate(list(rows))
    except Exception as error:
        for index, row in zip(indices, rows, strict=True):
            _check_leaves(row, index, name)
        _check_alike(rows, indices, name)
        try:
            return default_collate([tree_map(native, row) for row in rows])
        except Exception:
            raise ConfigError(
                f"torch's default_collate cannot make a batch of the {name}: {type(error).__name__}: {error}; "
                "pass a collate_fn that can"
            ) from error


def _check_leaves(row: Any, index: int, name: str) -> None:
    """Refuse what default_collate does not take, or takes for something else than is meant."""
    for path, value in _walk(row, "row"):
        if found := _refused(value):
            what, remedy = found
            raise ConfigError(
                f"rows must hold tensors, arrays or numbers: {path} {what} in {_at(index, name)}; {remedy}"
            )


def _refused(value: Any) -> tuple[str, str] | None:
    """Return what is wrong with a leaf of a row, and the remedy; None if nothing is."""
    if isinstance(value, str | bytes):
        return f"is the string {value!r:.40}", "map labels to integers, texts to tokens, and leave other columns out"
    if value is None:
        return "is None", "leave such rows or columns out"
    if isinstance(value, np.ma.MaskedArray):
        return "is a masked array, of which torch takes the masked values, too", "fill it: filled(value)"
    if type(value).__module__.split(".")[0] == "PIL":
        return "is a PIL image", (
            "give the dataset a transform that makes tensors, e.g. transform=torchvision.transforms.ToTensor() "
            "(a datasets.Dataset: with_transform)"
        )
    if isinstance(value, list | tuple):  # default_collate would make a tensor of every position
        return f"is a {type(value).__name__} of {len(value)} numbers", (
            "make it a tensor (a datasets.Dataset: with_format('torch')), or pass a collate_fn (for texts PadTexts)"
        )
    return None


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Give the leaves of a row with their paths; a sequence of numbers is a leaf, unless it is the row itself."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(part, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple) and (path == "row" or not all(isinstance(x, Number) for x in value)):
        for i, part in enumerate(value):
            yield from _walk(part, f"{path}[{i}]")
    else:
        yield path, value


def _check_alike(rows: Sequence[Any], indices: Sequence[int], name: str) -> None:
    """Raise ConfigError if a row differs from the first in its names or a shape."""
    first = {path: _shape(value) for path, value in _walk(rows[0], "row")}
    for index, row in zip(indices[1:], rows[1:], strict=True):
        other = {path: _shape(value) for path, value in _walk(row, "row")}
        if other.keys() != first.keys():
            raise ConfigError(
                f"rows must be alike: {_at(indices[0], name)} holds {_listed(first)}, example {index} {_listed(other)}"
            )
        for path, shape in first.items():
            if other[path] != shape:
                raise ConfigError(
                    f"rows must be alike in shape: {path} is {shape} in {_at(indices[0], name)}, {other[path]} in "
                    f"example {index}; bring all to one shape in a transform, or pass a collate_fn that pads"
                )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _listed(paths: Mapping[str, Any]) -> str:
    return ", ".join(paths) or "nothing"


def _at(index: int, name: str) -> str:
    return f"example {index} of the {name}"
