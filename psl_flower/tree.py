"""Trees: what a batch, what crosses a cut, and its gradient are made of.

A tree is a tensor (a leaf), a tuple of trees, or a dict of trees with string keys. None stands where there is no
tensor: the gradient of what has none, say. In a tree of rows, batch rows come first: a leaf of n rows is (n, ...).

The leaves of a dict come in ascending order of its keys, whatever the order in which it was filled. Both ends of a wire
therefore see the same leaves in the same places, and the batches of two clients join if they hold the same keys.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from psl_flower.errors import ConfigError

Tree: TypeAlias = Any  # Tensor | None | tuple[Tree, ...] | dict[str, Tree]
# The same without tensors, fit for JSON: None for a leaf, a list for a tuple, a dict for a dict, False for None.
Structure: TypeAlias = Any  # None | False | list[Structure] | dict[str, Structure]


# --- building --------------------------------------------------------------------------------------------------------
def native(value: Any) -> Any:
    """Return an array as torch takes it, without negative strides (``x[::-1]``) and in this machine's byte order."""
    if not isinstance(value, np.ndarray):
        return value
    return np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")


def as_tree(value: Any, name: str) -> Tree:
    """Return what people's code returns as a tree.

    Parameters
    ----------
    value : Tensor, array, sequence or mapping
        Lists become tuples, mappings (a ``BatchEncoding``, a ``ModelOutput``) dicts, arrays tensors; a list of numbers
        becomes a tensor, too.
    name : str
        What the value is, for messages: "inputs" gives paths such as ``inputs['mask'][0]``.

    Raises
    ------
    ConfigError
        If a leaf is something else, or a key is no string; the message names its path.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        # torch takes no array that runs backwards, and warns of one that it must not write to
        return torch.as_tensor(np.require(native(value), requirements=["C", "W"]))
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"the keys of {name} must be strings, got {key!r}: rename it")
        return {key: as_tree(value[key], f"{name}[{key!r}]") for key in sorted(value)}
    if isinstance(value, list | tuple):
        if value and all(isinstance(x, int | float | np.number | np.bool_) for x in value):
            return torch.as_tensor(np.asarray(value)) if isinstance(value[0], np.generic) else torch.tensor(value)
        return tuple(as_tree(part, f"{name}[{i}]") for i, part in enumerate(value))
    raise ConfigError(f"{name} must be a tensor, or a tuple or dict of tensors, got {value!r:.60} ({_kind(value)})")


def structure(tree: Tree) -> Structure:
    """Return a tree's structure: equal for trees that hold leaves in the same places, and fit for JSON."""
    if isinstance(tree, tuple):
        return [structure(part) for part in tree]
    if isinstance(tree, dict):
        return {key: structure(tree[key]) for key in sorted(tree)}
    return False if tree is None else None


def build(structure: Structure, leaves: Sequence[Tensor]) -> Tree:
    """Return the tree of a structure and its leaves, in their order.

    Raises
    ------
    ConfigError
        If there are more leaves, or fewer, or the structure is none.
    """
    rest = iter(leaves)
    tree = _build(structure, rest)
    if next(rest, None) is not None:
        raise ConfigError(f"the structure {structure!r:.200} has fewer leaves than the {len(leaves)} given")
    return tree


def _build(structure: Structure, rest: Iterator[Tensor]) -> Tree:
    if structure is None:
        leaf = next(rest, None)
        if leaf is None:
            raise ConfigError("the structure has more leaves than were given")
        return leaf
    if structure is False:
        return None
    if isinstance(structure, list):
        return tuple(_build(part, rest) for part in structure)
    if isinstance(structure, dict):
        return {key: _build(structure[key], rest) for key in sorted(structure)}
    raise ConfigError(f"a tree is made of leaves, tuples and dicts, its structure holds {structure!r:.60}")


# --- walking ---------------------------------------------------------------------------------------------------------
def leaves(tree: Tree) -> list[Tensor]:
    """Return the leaves of a tree, those of a dict in ascending order of its keys."""
    if isinstance(tree, Tensor):
        return [tree]
    if tree is None:
        return []
    parts = tree if isinstance(tree, tuple) else [tree[key] for key in sorted(tree)]
    return [leaf for part in parts for leaf in leaves(part)]


def paths(tree: Tree, name: str) -> list[str]:
    """Return where each leaf stands, in the order of `leaves`: ``name['mask'][0]``."""
    if isinstance(tree, Tensor):
        return [name]
    if tree is None:
        return []
    parts = list(enumerate(tree)) if isinstance(tree, tuple) else [(key, tree[key]) for key in sorted(tree)]
    return [path for key, part in parts for path in paths(part, f"{name}[{key!r}]")]


def named_leaves(tree: Tree, name: str) -> list[tuple[str, Tensor]]:
    """Return the tensors of a tree with their paths."""
    return list(zip(paths(tree, name), leaves(tree), strict=True))


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a tensor are finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # A sum is finite only if all its terms are, and takes a tenth of the time. It may overflow by itself: then look.
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def map_leaves(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Return a tree of what `function` makes of the leaves at each place of trees of one structure."""
    if isinstance(tree, tuple):
        return tuple(map_leaves(function, *parts) for parts in zip(tree, *others, strict=True))
    if isinstance(tree, dict):
        return {key: map_leaves(function, tree[key], *(other[key] for other in others)) for key in sorted(tree)}
    return None if tree is None else function(tree, *others)


def add(one: Tree, other: Tree) -> Tree:
    """Return the sum of two trees of one structure, but for None, which is zero."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, tuple):
        return tuple(add(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return {key: add(one[key], other[key]) for key in sorted(one)}
    return one + other


def norm(tree: Tree) -> float:
    """Return the L2 norm of all tensors as one vector; 0 where there are none."""
    found = [torch.linalg.vector_norm(leaf.detach(), dtype=torch.float64) for leaf in leaves(tree)]
    return float(torch.linalg.vector_norm(torch.stack(found))) if found else 0.0


def num_bytes(tree: Tree) -> int:
    """Return the bytes of all leaves."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Return the tree on a device."""
    return map_leaves(lambda leaf: leaf.to(device), tree)


# --- rows ------------------------------------------------------------------------------------------------------------
def rows(tree: Tree, name: str) -> int:
    """Return how many rows every leaf has.

    Raises
    ------
    ConfigError
        If there is no leaf, a leaf has no dimension, or two leaves disagree.
    """
    found = leaves(tree)
    if not found:
        raise ConfigError(f"{name} must hold at least one tensor, got {tree!r:.60}")
    for i, leaf in enumerate(found):
        if leaf.ndim == 0:
            raise ConfigError(f"batch rows come first in every tensor: {paths(tree, name)[i]} has no dimension")
        if leaf.shape[0] != found[0].shape[0]:
            where = paths(tree, name)
            raise ConfigError(
                f"batch rows come first in every tensor: {where[0]} has {found[0].shape[0]} rows, "
                f"{where[i]} has {leaf.shape[0]} {_spec(leaf)}"
            )
    return int(found[0].shape[0])


def join(trees: Sequence[Tree], name: str, of: Sequence[str] | None = None, *, fill: int | None = None) -> Tree:
    """Return one tree with the rows of all, one after the other; that of a single tree is the tree itself.

    Parameters
    ----------
    trees : sequence of trees
        At least one.
    name : str
        What they are, for messages.
    of : sequence of str, optional
        Whose each of them is, for messages: "client 3".
    fill : int, optional
        Where rows are not equally long (they differ in the second size), pad them with this at their end.

    Raises
    ------
    ConfigError
        If two trees differ in structure, or a leaf in its dtype or its shape beyond the rows (and their length); the
        message names the leaf and both owners.
    """
    if not trees:
        raise ConfigError(f"there must be at least one tree of {name} to join, got none")
    if len(trees) == 1:
        return trees[0]
    whose = [f"part {i}" for i in range(len(trees))] if of is None else of
    first, shape = leaves(trees[0]), structure(trees[0])
    columns = [[leaf] for leaf in first]
    for tree, owner in zip(trees[1:], whose[1:], strict=True):
        if structure(tree) != shape:
            raise ConfigError(
                f"{name} must hold the same names and parts everywhere: {whose[0]} has "
                f"{', '.join(paths(trees[0], name))}; {owner} has {', '.join(paths(tree, name))}"
            )
        for i, leaf in enumerate(leaves(tree)):
            alike = leaf.shape[1:] == first[i].shape[1:] or (fill is not None and _but_for_length(leaf, first[i], fill))
            if not alike or leaf.dtype != first[i].dtype:
                raise ConfigError(
                    f"{paths(tree, name)[i]} must be alike everywhere but for the number of rows: "
                    f"{whose[0]} has {_spec(first[i])}, {owner} has {_spec(leaf)}; "
                    "where lengths vary, pad them all to one"
                )
            columns[i].append(leaf)
    return build(shape, [torch.cat(column if fill is None else _padded(column, fill)) for column in columns])


def _but_for_length(one: Tensor, other: Tensor, fill: int) -> bool:
    """Return whether two leaves are alike but for rows and length, and may be padded with a number."""
    lengths = one.ndim == other.ndim > 1 and one.shape[2:] == other.shape[2:]
    return lengths and not (fill and (one.is_floating_point() or one.dtype == torch.bool))


def _padded(column: Sequence[Tensor], fill: int) -> list[Tensor]:
    """Return leaves that are equally long."""
    longest = max((leaf.shape[1] for leaf in column if leaf.ndim > 1), default=0)
    short = [(leaf, longest - leaf.shape[1] if leaf.ndim > 1 else 0) for leaf in column]
    return [
        torch.cat([leaf, leaf.new_full((len(leaf), missing, *leaf.shape[2:]), fill)], 1) if missing else leaf
        for leaf, missing in short
    ]


def split(tree: Tree, counts: Sequence[int], name: str) -> list[Tree]:
    """Return trees of `counts` rows each, one after the other: the inverse of `join`. Their leaves are views.

    Raises
    ------
    ConfigError
        If the counts do not add up to the rows there are.
    """
    if (total := sum(counts)) != (held := rows(tree, name)) or min(counts, default=0) < 0:
        raise ConfigError(f"{name} of {held} rows cannot be split into {list(counts)}, which add up to {total}")
    pieces = [torch.split(leaf, list(counts)) for leaf in leaves(tree)]
    shape = structure(tree)
    return [build(shape, part) for part in zip(*pieces, strict=True)]


def take(tree: Tree, indices: Tensor) -> Tree:
    """Return the rows at `indices`, (n,) int64."""
    return map_leaves(lambda leaf: leaf.index_select(0, indices.to(leaf.device)), tree)


def _spec(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__name__}".replace(" builtins.", " ")
