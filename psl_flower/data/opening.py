"""What a `data_fn` is, and what it may return."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from psl_flower.data.examples import Examples
from psl_flower.data.rows import INPUT, TEST
from psl_flower.data.telling import tell_once
from psl_flower.errors import ConfigError
from psl_flower.tree import native

_FORMS = "return a map-style dataset, or a pair (training data, test data)"
_OFFERED = ("context", "config")  # what a data_fn is called with, in this order
# Flower's examples have functions of these; in node_config they stand under the names at the right
_NODE_CONFIG = {
    "partition_id": "partition-id",
    "cid": "partition-id",
    "client_id": "partition-id",
    "num_partitions": "num-partitions",
}

# samplers that draw from all examples, however many they draw
_OF_ALL = (RandomSampler, WeightedRandomSampler)

Collate = Callable[[list[Any]], Any]


def check_data_fn(function: Callable[..., Any]) -> None:
    """Raise ConfigError unless `function` can be called with (context), (context, config) or nothing.

    Its parameters without a default get these in order, whatever their names. A function of (partition_id,
    num_partitions), common in Flower apps, would take the context for a number: it is refused by these names, with a
    default as well, which would give every client the same data.
    """
    if not callable(function):
        raise ConfigError(f"data_fn must be a function that returns a client's data, got {function!r:.80}: {_FORMS}")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some callables written in C do not tell
        return
    name = getattr(getattr(function, "func", function), "__name__", "load_data").replace("<lambda>", "load_data")
    bound = function.keywords if isinstance(function, functools.partial) else {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters.values() if p.default is p.empty and p.kind not in variadic]
    needed = {p.name for p in required}
    for p in parameters:
        # the number of partitions may well have a default; this client's own may not
        if p in _NODE_CONFIG and p not in bound and (p in needed or p != "num_partitions"):
            given = [f"context.node_config[{_NODE_CONFIG[q]!r}]" for q in parameters if q in _NODE_CONFIG]
            given += [f"{q}=..." for q in parameters if q in needed - _NODE_CONFIG.keys()]
            raise ConfigError(
                f"data_fn is called with the client's context, but {name} is a function of ({', '.join(parameters)}): "
                f"pass data_fn=lambda context: {name}({', '.join(given)})"
            )
    by_position = [p for p in required if p.kind is not p.KEYWORD_ONLY]
    beyond = [*by_position[len(_OFFERED) :], *(p for p in required if p.kind is p.KEYWORD_ONLY)]
    if beyond:
        raise ConfigError(
            f"data_fn is called with ({', '.join(_OFFERED)}) at most, {name} also needs {beyond[0].name!r}: give it a "
            f"default, or pass functools.partial({name}, {beyond[0].name}=...)"
        )


def open_data(
    what: Any, *, target: str = "label", collate_fn: Collate | None = None
) -> tuple[Examples, Examples | None]:
    """Return a client's training and test examples, given what its `data_fn` returned.

    Parameters
    ----------
    what : object
        A map-style dataset; tensors or arrays (x, y) or (x1, x2, ..., y), one row an example; a `DataLoader`, whose
        dataset and collate_fn are used; or a pair (training data, test data or None) of these.
    target : str
        See `Examples`.
    collate_fn : callable, optional
        Used where a `DataLoader` has none of its own.

    Raises
    ------
    ConfigError
        If it is something else; the message says the remedy.
    """
    if target == INPUT and _is_table(what):
        raise ConfigError(
            f"with target='input' data_fn must {_FORMS}: of {len(what)} tensors it is not clear whether they are "
            "inputs and labels, or training and test data. Return TensorDataset(x), or a pair of these"
        )
    train, test = _pair(what)
    options: dict[str, Any] = {"target": target, "collate_fn": collate_fn}
    return _open(train, "training data", **options), None if test is None else _open(test, TEST, **options)


def _pair(what: Any) -> tuple[Any, Any]:
    if not isinstance(what, tuple | list) or _is_table(what):
        return what, None
    if isinstance(what, list) and (not what or not _is_data(what[0]) or isinstance(what[0], tuple | list)):
        return what, None  # a list of rows is a dataset, random_split's list of two is a pair
    if len(what) == 2 and _is_data(what[0]) and (what[1] is None or _is_data(what[1])):
        return what[0], what[1]
    kinds = ", ".join("None" if part is None else type(part).__name__ for part in what)
    raise ConfigError(
        f"data_fn must {_FORMS}, or tensors (x, y) with a row an example, got {len(what)} parts: {kinds:.200}"
    )


def _is_table(what: Any) -> bool:
    """Return whether this is (x, y) or (x1, x2, ..., y): tensors or arrays, one row an example."""
    return isinstance(what, tuple) and len(what) > 1 and all(map(_is_tensor, what))


def _is_tensor(what: Any) -> bool:
    return isinstance(what, torch.Tensor | np.ndarray)


def _is_data(what: Any) -> bool:
    """Return whether this can be one of a pair: a dataset, a loader, or a table, but no row and no tensor."""
    if isinstance(what, tuple):
        return _is_table(what) and all(part.ndim > 0 for part in what)
    if isinstance(what, Mapping | str | bytes) or _is_tensor(what):
        return False
    if isinstance(what, list) and what and isinstance(what[0], int | float | np.generic | str):
        return False  # a list of labels
    # an iterable counts, to be refused later in a better sentence
    return hasattr(what, "__getitem__") or hasattr(what, "__iter__")


def _open(what: Any, name: str, target: str, collate_fn: Collate | None) -> Examples:
    if isinstance(what, DataLoader):
        dataset, collate_fn = _of_loader(what, name, collate_fn)
        return Examples(_checked(dataset, name, collate_fn), target=target, collate_fn=collate_fn, name=name)
    if _is_tensor(what):
        what = (what,)  # without labels: for an autoencoder
    if isinstance(what, tuple) and what and all(map(_is_tensor, what)):
        what = _table(what, name)
    return Examples(_checked(what, name, collate_fn), target=target, collate_fn=collate_fn, name=name)


def _checked(what: Any, name: str, collate_fn: Collate | None) -> Any:
    """Refuse what has a length and items, perhaps, but is no map-style dataset."""
    remedy = ""
    if isinstance(what, IterableDataset) or (hasattr(what, "__iter__") and not hasattr(what, "__getitem__")):
        remedy = (
            "examples are drawn by their number, so an iterable does not do. Where it fits into memory, return "
            "list(dataset); of Hugging Face, load it without streaming=True"
        )
    elif isinstance(what, Mapping):
        remedy = (
            f"it is a mapping with {sorted(map(str, what))[:8]}. Of splits, return (data['train'], data['test']); of "
            "columns, datasets.Dataset.from_dict(data).with_format('torch')"
        )
    elif hasattr(type(what), "iloc"):
        remedy = "of its columns, return (torch.tensor(frame[names].values), torch.tensor(frame[label].values))"
    elif what is None:
        remedy = "is a return statement missing?"
    elif isinstance(what, str | bytes | Path):
        remedy = "read what is there, and return its examples"
    elif type(what) is TensorDataset and collate_fn is None and not all(map(_is_dense, what.tensors)):
        remedy = "its tensors must be dense: call to_dense() on them, or on those of the rows in a collate_fn"
    elif type(what) is Subset and _is_mask(what.indices):
        remedy = "its indices are a mask, which would be taken for examples 0 and 1: pass mask.nonzero().flatten()"
    if remedy:
        raise ConfigError(f"data_fn must {_FORMS}; the {name} is of type {type(what).__name__}: {remedy}")
    return what


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _is_mask(indices: Any) -> bool:
    kind = getattr(indices, "dtype", None) if _is_tensor(indices) else type(indices[0]) if len(indices) else None
    return kind in (torch.bool, np.dtype(bool), bool, np.bool_)


def _table(parts: tuple[Any, ...], name: str) -> TensorDataset:
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        raise ConfigError(
            f"masked arrays hold values where they are masked, too: fill those of the {name}, filled(value)"
        )
    try:
        tensors = [torch.as_tensor(native(part)) for part in parts]
    except TypeError as error:
        raise ConfigError(
            f"arrays returned by data_fn must hold numbers, not so in the {name} ({error}): map labels to integers"
        ) from error
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    if any(t.ndim == 0 for t in tensors) or len({len(t) for t in tensors}) != 1:
        raise ConfigError(
            "tensors returned by data_fn must have a row an example each, as in (x, y); "
            f"those of the {name} are {shapes}. For training and test data return ((x, y), (x_test, y_test))"
        )
    return TensorDataset(*tensors)


# --- loaders ---------------------------------------------------------------------------------------------------------
def _of_loader(loader: DataLoader[Any], name: str, collate_fn: Collate | None) -> tuple[Any, Collate | None]:
    """Return a loader's dataset and collate_fn, for torch's own the other one; tell that the rest of it is not used."""
    if loader.collate_fn is not default_collate:
        collate_fn = loader.collate_fn
    dataset = _checked(loader.dataset, name, collate_fn)
    if loader.batch_sampler is None:
        raise ConfigError(
            f"the {name} is a DataLoader with batch_size=None, whose items may be batches: return the dataset of its "
            "single examples"
        )
    # torch types samplers loosely: a batch sampler of one's own need not have a sampler
    batches: Any = loader.batch_sampler
    sampler: Any = getattr(batches, "sampler", loader.sampler)
    ignored = [f"its batch size ({loader.batch_size})" if loader.batch_size else type(batches).__name__]
    if type(sampler) is SubsetRandomSampler:
        dataset = Subset(dataset, list(sampler.indices))
    elif type(sampler) not in _OF_ALL and _leaves_out(sampler, dataset):
        raise ConfigError(
            f"the {name} is a DataLoader whose {type(sampler).__name__} draws {len(sampler)} of {len(dataset)} "
            "examples: return torch.utils.data.Subset(dataset, indices) with those that are this client's"
        )
    if type(sampler) is not SequentialSampler:
        ignored.append(f"the order of its {type(sampler).__name__}")
    if type(batches) is not BatchSampler and type(batches).__name__ not in ignored:
        ignored.append(type(batches).__name__)
    tell_once(
        f"The {name} is a DataLoader: its dataset and collate_fn are used, {' and '.join(ignored)} not. Which examples "
        "a step takes is decided by the strategy's sampler, and an epoch uses each once."
    )
    return dataset, collate_fn


def _leaves_out(sampler: Any, dataset: Any) -> bool:
    try:
        return len(sampler) != len(dataset)
    except TypeError:  # it has no length
        return False
