"""Splits of a dataset among clients: arrays of indices (pure numpy), and partitioners for Flower Datasets.

`IidPartitioner` is flwr-datasets' own: it cuts the dataset into contiguous shards, so data that lie in the order of
their classes must be shuffled first (``FederatedDataset`` does so by default, ``dataset.shuffle(seed=...)`` otherwise).
"""

from typing import TYPE_CHECKING, Any

from psl_flower.extras import extra
from psl_flower.partition.split import extended_dirichlet_split, iid_split

if TYPE_CHECKING:
    from flwr_datasets.partitioner import IidPartitioner

    from psl_flower.partition.extended_dirichlet import ExtendedDirichletPartitioner

__all__ = ["ExtendedDirichletPartitioner", "IidPartitioner", "extended_dirichlet_split", "iid_split"]


def __getattr__(name: str) -> Any:
    """Import the partitioners when they are first used: the dataset library takes seconds, splits need only numpy."""
    if name == "ExtendedDirichletPartitioner":
        with extra("vision", name):
            from psl_flower.partition.extended_dirichlet import ExtendedDirichletPartitioner

        return ExtendedDirichletPartitioner
    if name == "IidPartitioner":
        with extra("vision", name):
            from flwr_datasets.partitioner import IidPartitioner

        return IidPartitioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
