"""The extended Dirichlet split as a partitioner of Flower Datasets."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import Partitioner
from numpy.typing import NDArray

from psl_flower.checks import check_choice, check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.partition.split import extended_dirichlet_split
from psl_flower.typing import IndexArray


class ExtendedDirichletPartitioner(Partitioner):  # type: ignore[misc]  # the base class is not typed
    """Give each partition a few classes, and spread each class over its holders in Dirichlet proportions.

    The split is made when the first partition is loaded, and is a function of the arguments and the labels alone, so
    that every process finds the same one.

    Parameters
    ----------
    num_partitions : int
        K, at least 1 and at most the number of examples.
    partition_by : str
        Name of the label column; labels may be any whole numbers or strings, none missing.
    num_classes_per_partition : int
        C, at least 1 and at most the number of classes; K * C must reach the number of classes.
    alpha : float
        Concentration, greater than 0: the smaller, the more uneven the sizes.
    seed : int
        Not negative. There is no unseeded split: processes would disagree on it.
    shuffle : bool
        Whether a partition's examples come in random order; otherwise in the dataset's.

    Raises
    ------
    ConfigError
        If an argument is out of range; when the first partition is loaded, if there is no such column, a label is
        missing, or no partition or class can be served (the error says which and why).

    See Also
    --------
    psl_flower.partition.split.extended_dirichlet_split : the split itself, for labels in memory.

    References
    ----------
    Extended Dirichlet strategy of arXiv 2302.01633; C = 2, alpha = 3 is the severe split of arXiv 2407.15738, C = 5 the
    mild one.

    Examples
    --------
    >>> from flwr_datasets import FederatedDataset
    >>> partitioner = ExtendedDirichletPartitioner(
    ...     num_partitions=64, partition_by="label", num_classes_per_partition=2, alpha=3.0, seed=0
    ... )
    >>> dataset = FederatedDataset(dataset="cifar10", partitioners={"train": partitioner})  # doctest: +SKIP
    >>> partition = dataset.load_partition(0)  # doctest: +SKIP
    """

    def __init__(
        self,
        num_partitions: int,
        partition_by: str,
        num_classes_per_partition: int,
        alpha: float,
        seed: int = 42,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        self._num_partitions = check_int(num_partitions, "num_partitions", least=1)
        self._partition_by = partition_by
        self._num_classes = check_int(num_classes_per_partition, "num_classes_per_partition", least=1)
        self._alpha = check_float(alpha, "alpha", above=0)
        self._seed = check_int(seed, "seed", least=0)
        self._shuffle = shuffle

    @property
    def num_partitions(self) -> int:
        """Total number of partitions."""
        return self._num_partitions

    def load_partition(self, partition_id: int) -> Dataset:
        """Load one partition.

        Parameters
        ----------
        partition_id : int
            From 0 to ``num_partitions - 1``.

        Returns
        -------
        datasets.Dataset
            The rows of the partition.

        Raises
        ------
        ConfigError
            If there is no such partition, or the split cannot be made.
        """
        partition_id = check_int(partition_id, "partition_id", least=0)
        if partition_id >= self._num_partitions:
            raise ConfigError(f"partition_id must be less than {self._num_partitions}, got {partition_id}")
        return self.dataset.select(self._partitions[partition_id])

    @cached_property
    def _partitions(self) -> list[IndexArray]:
        check_choice(self._partition_by, "partition_by", self.dataset.column_names)
        # Arrow keeps a missing label missing (as NaN or None), and reads a shuffled column faster than lists do
        column = self.dataset.select_columns(self._partition_by).with_format("arrow")[:][self._partition_by]
        labels: NDArray[Any] = column.to_numpy()
        rng = np.random.default_rng(self._seed)
        rows = extended_dirichlet_split(labels, self._num_partitions, self._num_classes, self._alpha, rng)
        return [rng.permutation(part) for part in rows] if self._shuffle else rows
