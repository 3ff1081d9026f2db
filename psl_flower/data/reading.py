"""How a dataset is read: in the fastest way that is surely what reading it item by item gives."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset, TensorDataset

from psl_flower.devices import generators
from psl_flower.errors import ConfigError

log = logging.getLogger("flwr.psl_flower")

Indices = Sequence[int] | NDArray[np.int64]


def check_map_style(dataset: Any, name: str) -> None:
    """Raise ConfigError unless a dataset has a length and items."""
    if isinstance(dataset, type) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"the {name} must be a map-style dataset (with __len__ and __getitem__), got {dataset!r:.80}"
            + (": make an instance of it" if isinstance(dataset, type) else "")
        )


def read_columns(dataset: Any, indices: Indices) -> Any:
    """Return the examples at `indices` as one batch, in the form of a row, or None if the dataset offers no such way.

    It is offered by a method ``get_batch(indices)``, which is given an (n,) int64 array, and by a `TensorDataset`, not
    a subclass: that may have items of its own.
    """
    dataset, indices = unwrapped(dataset, indices)
    if offers(dataset, "get_batch"):
        return dataset.get_batch(np.asarray(indices, dtype=np.int64))
    if is_plain(dataset):
        chosen = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        return tuple(tensor[chosen] for tensor in dataset.tensors)
    return None


class RowsError(Exception):
    """Items of a dataset cannot be read.

    Parameters
    ----------
    errors : dict of int to Exception
        What each raised, by its index.
    """

    def __init__(self, errors: Mapping[int, Exception]) -> None:
        super().__init__(f"{len(errors)} items cannot be read")
        self.errors = dict(errors)


def read_rows(dataset: Any, indices: Indices, failed: Collection[int] | None = None) -> list[Any]:
    """Return the examples at `indices`, by torch's batched fetch (``__getitems__``) if offered, else one at a time.

    Parameters
    ----------
    dataset : map-style dataset
    indices : sequence of int
    failed : collection of int, optional
        None: the first that fails ends it. Else this is a second reading, of rows among which these have failed once:
        others that fail now are read once more, with the same random numbers, for a file system may fail once.

    Raises
    ------
    RowsError
        If items are read one at a time, and some fail.
    """
    outer = indices
    dataset, indices = unwrapped(dataset, indices)
    if offers(dataset, "__getitems__"):
        found = dataset.__getitems__(list(indices))
        if not isinstance(found, list) or len(found) != len(indices):
            what = f"a {type(found).__name__}" + (f" of {len(found)}" if hasattr(found, "__len__") else "")
            raise ConfigError(
                f"{type(dataset).__name__}.__getitems__ must return a list with a row for each of {len(indices)} "
                f"indices, got {what}: to return a batch, call the method get_batch"
            )
        return found
    found, errors = [], dict[int, Exception]()
    for name, i in zip(outer, indices, strict=True):
        back = None if failed is None or name in failed else generators()
        try:
            found.append(_read_row(dataset, i, back))
        except MemoryError:
            raise
        except Exception as error:
            errors[name] = error
            if failed is None:
                break
    if errors:
        raise RowsError(errors)
    return found


def _read_row(dataset: Any, index: int, back: Callable[[], None] | None) -> Any:
    """Return an item, at the second try if need be and `back` is given."""
    if back is not None:
        try:
            return dataset[index]
        except Exception as error:
            log.info("example %s was read again: %s: %s", index, type(error).__name__, error)
            back()
    return dataset[index]


def is_plain(dataset: Any) -> bool:
    """Return whether a dataset is a `TensorDataset`, or a `Subset` of one: reading it runs no code of its user's."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) is TensorDataset


def unwrapped(dataset: Any, indices: Indices) -> tuple[Any, Indices]:
    """Return what a `Subset` (or one of another) is part of, with the indices there."""
    while type(dataset) is Subset:
        indices = [_whole(dataset.indices[i]) for i in indices]
        dataset = dataset.dataset
    return dataset, indices


def _whole(index: Any) -> Any:
    try:
        return operator.index(index)  # lists of tensors or numpy integers are common
    except TypeError:
        return index


def offers(dataset: Any, method: str) -> bool:
    """Return whether the class of a dataset has a method to read many items that knows of its ``__getitem__``.

    A subclass that overrides ``__getitem__`` alone does not; nor does a wrapper that passes unknown names on to the
    dataset within.
    """
    for cls in type(dataset).__mro__:
        if callable(cls.__dict__.get(method)):
            return True
        if "__getitem__" in cls.__dict__:
            return False
    return False
