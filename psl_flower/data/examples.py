"""A dataset as people bring it, read as batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from psl_flower.data.batch import Batch
from psl_flower.data.classes import ClassNumbers, class_numbers
from psl_flower.data.collating import collate
from psl_flower.data.labels import listed_labels, telling_rows
from psl_flower.data.padding import PadTexts
from psl_flower.data.reading import RowsError, check_map_style, is_plain, read_columns, read_rows
from psl_flower.data.rows import INPUT, divide
from psl_flower.devices import generators, seeded
from psl_flower.errors import BadRowsError, ConfigError, PSLError
from psl_flower.origin import where
from psl_flower.tree import Tree, as_tree, is_finite, leaves, map_leaves, paths, rows

_READ_ROWS = 256  # examples read at once where only their labels are wanted
_MISSING = "fill in what is missing where the data are read, with the column's mean, say"
_PROBED = 16  # examples tried to see whether none can be read


class Examples:
    """The examples of a map-style dataset.

    Rows are pairs (x, y), tuples (x1, x2, ..., y) or dicts; inputs and labels may be tensors, arrays, numbers, or
    tuples and dicts of them. A dataset is read in the fastest way that is surely the same as item by item: its own
    ``get_batch(indices)``, the tensors of a `TensorDataset` (of exactly this class), ``__getitems__``, else one by one.

    Parameters
    ----------
    dataset : map-style dataset
        With ``__len__`` and ``__getitem__``; of torch, torchvision, Hugging Face or one's own.
    target : str
        The name of the label in dict rows; the default, "label", stands for "labels" too where there is no "label".
        "input" makes the inputs the target: an autoencoder's rows, whose label, if there is one, is left out.
    collate_fn : callable, optional
        Makes a batch of a list of rows, in the form of a row, as in a `DataLoader`; torch's `default_collate` if None.
    name : str
        What data it is, for messages.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        target: str = "label",
        collate_fn: Callable[[list[Any]], Any] | None = None,
        name: str = "training data",
    ) -> None:
        check_map_style(dataset, name)
        if not isinstance(target, str) or not target:
            raise ConfigError(f"target must be the name of the label in a row, or 'input', got {target!r}")
        self.dataset, self.target, self.collate_fn, self.name = dataset, target, collate_fn, name
        # whether reading runs no code of the user's, so that it neither fails for single rows nor draws random numbers
        self.plain = is_plain(dataset) and collate_fn is None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return a row as the dataset has it."""
        return self.dataset[index]

    # --- batches -----------------------------------------------------------------------------------------------------
    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the examples at `indices`, at least one.

        What cannot be read is read once more, for a file system may fail once; rows that fail twice are refused.
        Randomness in transforms is what the caller has seeded, see `psl_flower.devices.seeded`.

        Raises
        ------
        BadRowsError
            If some examples cannot be read, or hold NaN or infinite values, while others are in order.
        ConfigError
            If no example can be read, or rows break a rule; the message says the remedy.
        """
        chosen = [int(i) for i in indices]
        back = None if self.plain else generators()
        try:
            batch = self._read(chosen)
        except MemoryError:
            raise
        except Exception as error:
            if back is None or isinstance(error, PSLError):
                raise self._explained(chosen, error) from error
            back()
            batch = self._read_again(chosen, error)
        if bad := _not_finite(batch, chosen):
            raise self._refused(bad, chosen)
        return batch

    def _read_again(self, indices: list[int], error: Exception) -> Batch:
        """Read examples again of which some failed."""
        try:
            return self._read(indices, failed=error.errors if isinstance(error, RowsError) else ())
        except MemoryError:
            raise
        except RowsError as twice:
            bad = {i: where(why) for i, why in twice.errors.items()}
            if self._all_bad(bad, indices):
                raise ConfigError(f"the {self.name} cannot be read: {next(iter(bad.values()))}") from error
            raise self._bad_rows(bad) from error
        except Exception as twice:
            raise self._explained(indices, twice) from error

    def _read(self, indices: list[int], failed: Collection[int] | None = None) -> Batch:
        if not indices:
            raise ConfigError(f"a batch of the {self.name} must hold at least one example, got none")
        found = read_columns(self.dataset, indices) if self.collate_fn is None else None
        if found is None:
            rows_read = read_rows(self.dataset, indices, failed)
            make = self.collate_fn or (lambda read: collate(read, indices, self.name))
            found = make(rows_read)
        return self.as_batch(found, len(indices))

    def as_batch(self, found: Any, size: int) -> Batch:
        """Return what was read of so many examples, in the form of a row, as a batch.

        Raises
        ------
        ConfigError
            If there is no label, or not a row an example.
        """
        inputs, target = divide(found, self.target, self.name)
        inputs = as_tree(inputs, "inputs")
        if self.target == INPUT:
            target = inputs
        elif target is not None:
            target = map_leaves(_signed, as_tree(target, "label"))
        for tree, name in ((inputs, "inputs"), (target, "label")):
            if tree is not None and (count := rows(tree, name)) != size:
                raise ConfigError(
                    f"a batch must have a row an example, batch rows first in every tensor: of {size} examples "
                    f"of the {self.name}, {name} has {count} rows"
                )
        return Batch(inputs, target, size)

    # --- bad rows ----------------------------------------------------------------------------------------------------
    def _explained(self, indices: list[int], error: Exception) -> Exception:
        """Return what to raise where reading several rows failed: each is read alone, to see which are to blame."""
        bad = self._errors_of(indices)
        if bad and not self._all_bad(bad, indices):
            return self._bad_rows(bad)
        if isinstance(error, PSLError):
            return error
        return ConfigError(f"the {self.name} cannot be read: {_said(error)}")

    def _refused(self, bad: dict[int, str], indices: list[int]) -> Exception:
        if not self._all_bad(bad, indices):
            return self._bad_rows(bad)
        return ConfigError(f"every example of the {self.name} that was tried is unusable: {next(iter(bad.values()))}")

    def _bad_rows(self, bad: dict[int, str]) -> BadRowsError:
        return BadRowsError(f"{len(bad)} of the {len(self)} examples of the {self.name} cannot be used", bad)

    def _errors_of(self, indices: list[int]) -> dict[int, str]:
        """Return what is wrong with each of these rows when it is read alone, if something is."""
        bad: dict[int, str] = {}
        for i in indices:
            for _ in range(1 if self.plain else 2):
                try:
                    found = _not_finite(self._read([i]), [i])
                except Exception as error:
                    found = {i: _said(error)}
                if not found:
                    break
            bad |= found
        return bad

    def _all_bad(self, bad: dict[int, str], indices: list[int]) -> bool:
        """Return whether it is not these rows but all: then the mistake is the dataset's."""
        if any(i not in bad for i in indices):
            return False
        spread = np.linspace(0, len(self) - 1, min(_PROBED, len(self))).astype(np.int64)
        others = [i for i in spread.tolist() if i not in bad]
        return len(self._errors_of(others)) == len(others)

    # --- labels ------------------------------------------------------------------------------------------------------
    def class_numbers(self) -> list[ClassNumbers]:
        """Return which number each class has, where the dataset, or those it is made of, say so by name."""
        kept = self.collate_fn in (None, default_collate) or isinstance(self.collate_fn, PadTexts)
        return class_numbers(self.dataset, self.target, sure=kept)

    def labels(self, without: Collection[int] = ()) -> NDArray[np.int64]:
        """Return the class of every example, (n,) int64, and leave random state as it was.

        Labels that the dataset lists (`targets`, `labels`, a column) are taken if they agree with those of some items;
        else all items are read.

        Parameters
        ----------
        without : collection of int
            Examples that cannot be read: they get -1 where labels are read item by item.

        Raises
        ------
        BadRowsError
            If labels are read item by item, and some examples cannot be; it names all of them.
        ConfigError
            If labels are not one whole number an example.
        """
        if self.target == INPUT:
            raise ConfigError("with target='input' examples have no classes: use a sampler that needs no label counts")
        listed = listed_labels(self.dataset, self.target)
        if listed is not None and self.plain:
            return listed
        with seeded(0, torch.device("cpu")):  # reading an example may augment it
            if listed is not None and self._agree(listed, without):
                return listed
            return self._read_labels([i for i in range(len(self)) if i not in without])

    def _agree(self, listed: NDArray[np.int64], without: Collection[int]) -> bool:
        checked = telling_rows(listed, without)
        try:
            return bool(np.array_equal(self._labels_at(checked), listed[checked])) if checked else True
        except PSLError:
            return False

    def _read_labels(self, indices: list[int]) -> NDArray[np.int64]:
        labels = np.full(len(self), -1, dtype=np.int64)
        bad: dict[int, str] = {}
        for start in range(0, len(indices), _READ_ROWS):
            some = indices[start : start + _READ_ROWS]
            try:
                labels[some] = self._labels_at(some)
            except BadRowsError as error:
                bad |= error.rows
        if bad:
            raise self._bad_rows(bad)
        return labels

    def _labels_at(self, indices: list[int]) -> NDArray[np.int64]:
        target = self.batch(indices).target
        if isinstance(target, torch.Tensor) and target.ndim == 1:
            array = target.cpu().numpy()
            if np.issubdtype(array.dtype, np.integer):
                return array.astype(np.int64)
        found = ", ".join(
            f"{path}: {leaf.dtype} {tuple(leaf.shape[1:])}"
            for path, leaf in zip(paths(target, "label"), leaves(target), strict=True)
        )
        raise ConfigError(
            f"this sampler plans by class: the label of an example must be one whole number, got {found}; "
            "use a sampler that needs no label counts"
        )


def _signed(label: torch.Tensor) -> torch.Tensor:
    """Return a label of numpy's larger unsigned types as int64: torch computes with those hardly at all."""
    return label.long() if label.dtype in (torch.uint16, torch.uint32, torch.uint64) else label


def _said(error: Exception) -> str:
    """Return what to say of an error in reading."""
    if isinstance(error, RowsError):
        error = next(iter(error.errors.values()))
    return str(error) if isinstance(error, PSLError) else where(error)


def _not_finite(batch: Batch, indices: list[int]) -> dict[int, str]:
    """Return which examples have an input or a label that is NaN or infinite."""
    bad: dict[int, str] = {}
    named = [(batch.inputs, "inputs", f"{_MISSING}; in a mask, use torch.finfo(dtype).min in place of -inf")]
    if batch.target is not batch.inputs:
        named.append((batch.target, "label", "mark what is missing with a number, and leave it out in the loss"))
    for tree, name, remedy in named:
        bad = _not_finite_rows(tree, name, remedy, indices) | bad
    return bad


def _not_finite_rows(tree: Tree, name: str, remedy: str, indices: list[int]) -> dict[int, str]:
    bad: dict[int, str] = {}
    for path, leaf in zip(paths(tree, name), leaves(tree), strict=True):
        if is_finite(leaf):
            continue
        for row in (~leaf.isfinite().reshape(len(indices), -1).all(dim=1)).nonzero().flatten().tolist():
            bad[indices[row]] = f"{path} holds NaN or infinite values ({remedy})"
    return bad
