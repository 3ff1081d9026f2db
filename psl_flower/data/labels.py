"""The labels that a dataset lists apart from its items."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from psl_flower.data.rows import label_name

_SPREAD = 16  # examples from the first to the last that listed labels are compared with
_CLASSES = 64  # and as many of different listed labels: target transforms change some of them


def listed_labels(dataset: Any, target: str) -> NDArray[np.int64] | None:
    """Return one whole number an item, as listed in the dataset, (n,); None if nothing of this kind is.

    They may differ from what items give, for they are taken before any transform.
    """
    try:
        found = np.asarray(_find(dataset, target))
    except Exception:  # whatever an attribute of somebody's class does: the items will tell
        return None
    if found.shape != (len(dataset),) or found.dtype.kind not in "iu":
        return None
    return found.astype(np.int64)


def _find(dataset: Any, target: str) -> Any:
    if type(dataset) is TensorDataset:
        return dataset.tensors[-1] if len(dataset.tensors) > 1 else None
    if type(dataset) is Subset:
        whole = listed_labels(dataset.dataset, target)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if type(dataset) is ConcatDataset:
        parts = [listed_labels(part, target) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate([p for p in parts if p is not None])
    if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):  # Hugging Face: a column read by itself
        name = label_name(dataset.column_names, target)
        return None if name is None else dataset.with_format("numpy")[name][:]
    return getattr(dataset, "targets", getattr(dataset, "labels", None))


def telling_rows(labels: NDArray[np.int64], but: Collection[int]) -> list[int]:
    """Return which items tell whether listed labels are theirs: some from first to last, and one of every label."""
    spread = np.linspace(0, len(labels) - 1, min(_SPREAD, len(labels))).astype(np.int64)
    firsts = np.unique(labels, return_index=True)[1][:_CLASSES]
    return [i for i in np.union1d(spread, firsts).tolist() if i not in but]
