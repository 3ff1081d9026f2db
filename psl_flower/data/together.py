"""The batches of many clients read as one, where that is surely what reading each and joining them gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from psl_flower.data.batch import Batch
from psl_flower.data.examples import Examples
from psl_flower.data.reading import is_plain, offers, unwrapped
from psl_flower.devices import reseed
from psl_flower.tree import is_finite, leaves


class Seeds:
    """Where what is random for each of several clients begins.

    Calling it with a client's position seeds the global generators of Python, numpy and torch for that client; only
    within a `psl_flower.devices.seeded` block, which puts them back.

    Parameters
    ----------
    values : sequence of int
        Of each client, not negative, below 2**63.
    device : torch.device, optional
        Whose generator is seeded beside that of the CPU.
    """

    def __init__(self, values: Sequence[int], device: torch.device | None = None) -> None:
        self._values, self._device = values, device or torch.device("cpu")
        self._generator = torch.Generator()

    def __call__(self, i: int) -> None:
        """Seed the global generators for the client of that position."""
        reseed(self._values[i], self._device)

    def generator(self, i: int) -> torch.Generator:
        """Return a generator that draws what torch's own, on the CPU, would for that client; good until the next call.

        Seeding takes a seventh of what it takes for all global ones.
        """
        return self._generator.manual_seed(self._values[i])


def read_together(examples: Sequence[Examples], indices: Sequence[NDArray[np.int64]], seed: Seeds) -> Batch | None:
    """Return the examples of several clients as one batch, in their order; None where they must be read one by one.

    A dataset offers it by a static method ``get_batches(datasets, indices, seed)`` of its class, which is given
    datasets of this class and returns what joining their ``get_batch(indices)`` would give, or None. Before it draws
    random numbers for the i-th it calls ``seed(i)``, or it draws them from ``seed.generator(i)``. `TensorDataset` needs
    no such method.

    Parameters
    ----------
    examples : sequence of Examples
    indices : sequence of (n,) int64
        Of each.
    seed : Seeds
    """
    first = examples[0]
    if any(each.collate_fn is not None or each.target != first.target for each in examples):
        return None
    pairs = [unwrapped(each.dataset, some) for each, some in zip(examples, indices, strict=True)]
    found = _columns([dataset for dataset, _ in pairs], [np.asarray(some, np.int64) for _, some in pairs], seed)
    if found is None:
        return None
    batch = first.as_batch(found, sum(map(len, indices)))
    # else reading each tells whose fault it is
    return batch if all(map(is_finite, leaves((batch.inputs, batch.target)))) else None


def _columns(datasets: Sequence[Any], indices: Sequence[NDArray[np.int64]], seed: Seeds) -> Any:
    kind = type(datasets[0])
    if any(type(dataset) is not kind for dataset in datasets):
        return None
    if offers(datasets[0], "get_batches"):
        return kind.get_batches(datasets, indices, seed)
    if is_plain(datasets[0]):
        columns = zip(*(dataset.tensors for dataset in datasets), strict=True)
        chosen = [torch.from_numpy(some) for some in indices]
        return tuple(torch.cat([t[i] for t, i in zip(column, chosen, strict=True)]) for column in columns)
    return None
