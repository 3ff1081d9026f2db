"""The default app's learning task, shared by its server and its clients: data, data split, model and test.

Flower hands the ClientApp to a process anew with every message, so nothing survives in the app's own objects. This
module is imported, not handed over: what its functions cache stays for as long as the process lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from psl_flower.app.datasets import SPECS, Split, load_arrays
from psl_flower.app.images import ImageSet, crop_flip
from psl_flower.app.models import build_model, default_cut
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.methods import ParallelSplit, UShapedSplit, make_method
from psl_flower.partition.split import (
    Rows,
    check_classes,
    check_partitions,
    extended_dirichlet_split,
    iid_split,
)
from psl_flower.split import check_client_half, cut_model, replace_batch_norm

# keeps the data split apart from every other use of the seed, see Note [Sampler streams] in samplers/base.py
_SPLIT_STREAM = 3
_TEST_BATCH = 1000  # examples in one forward pass of the central test


def cut_of(config: RunConfig) -> str:
    """Return the first server-side module: the one configured, or the model's usual one."""
    return config.cut or default_cut(config.model)


def make_model(config: RunConfig) -> nn.Module:
    """Build the whole model of a run; server and clients build the same one.

    Layers with batch statistics are replaced in the client half, where each client sees only its own examples, and with
    differential privacy everywhere, for an example's gradient must be its own.
    """
    spec = SPECS[config.dataset]
    model = build_model(config.model, in_channels=spec.shape[0], num_classes=spec.num_classes, seed=config.seed)
    if config.target_epsilon:
        return replace_batch_norm(model)
    return replace_batch_norm(model, before=cut_of(config), tail=config.tail or None)


def method_of(config: RunConfig) -> str:
    """Return the way of splitting: with a tail it is the U shape, unless another is named."""
    return UShapedSplit.name if config.tail and config.method == ParallelSplit.name else config.method


def check_model(config: RunConfig) -> None:
    """Refuse a model that cannot be cut where it shall be.

    Raises
    ------
    CutError
        If there is no such cut, or it cannot be made.
    """
    parts = make_method(method_of(config)).assign(
        cut_model(make_model(config), cut_of(config), config.tail or None).parts
    )
    check_client_half(next(iter(parts.values())))


def make_optimizer(config: RunConfig, params: Iterable[Any]) -> torch.optim.Optimizer:
    """Build the optimizer over both halves' parameters."""
    if config.optimizer == "adam":
        return torch.optim.Adam(params, lr=config.learning_rate)
    return torch.optim.SGD(params, lr=config.learning_rate, momentum=config.momentum)


def augmentation(config: RunConfig) -> str:
    """Return how training images are augmented: as configured, or as suits the dataset."""
    return config.augment or ("crop-flip" if SPECS[config.dataset].mirrored else "none")


def load_images(config: RunConfig, split: Split, indices: Rows | None = None) -> ImageSet:
    """Return the examples at `indices` (all, if not given) of a dataset's split; training data may be augmented."""
    spec = SPECS[config.dataset]
    images, labels = load_arrays(config.dataset, split, config.data_path)
    return ImageSet(
        images,
        labels,
        mean=spec.mean,
        std=spec.std,
        indices=indices,
        augment=crop_flip if split == "train" and augmentation(config) == "crop-flip" else None,
    )


def load_partition(context: Context) -> tuple[ImageSet, ImageSet]:
    """Return the training and test data of the client that `context` belongs to.

    The training data is split as configured. The test data is split evenly, so that testing on all clients is testing
    on the whole of it.

    Raises
    ------
    ConfigError
        If the node's configuration does not say which partition it holds, or the configuration or data is refused.
    """
    config = RunConfig.read(context.run_config)
    partition, num_partitions = _partition_of(context)
    train, test = (split_indices(config, split, num_partitions)[partition] for split in ("train", "test"))
    return load_images(config, "train", train), load_images(config, "test", test)


def _partition_of(context: Context) -> tuple[int, int]:
    node = context.node_config
    partition, num_partitions = node.get("partition-id"), node.get("num-partitions")
    if not isinstance(partition, int) or not isinstance(num_partitions, int):
        raise ConfigError(
            f"the node's configuration must hold partition-id and num-partitions, got {dict(node)}: start the "
            'SuperNode with --node-config "partition-id=0 num-partitions=2"'
        )
    if not 0 <= partition < num_partitions:
        raise ConfigError(f"partition-id must be 0 to num-partitions - 1, got {partition} of {num_partitions}")
    return partition, num_partitions


@lru_cache(maxsize=4)
def split_indices(config: RunConfig, split: Split, num_partitions: int) -> list[Rows]:
    """Return the examples of every client, each in exactly one; a function of the configuration alone."""
    return split_labels(config, load_arrays(config.dataset, split, config.data_path)[1], split, num_partitions)


def check_split(config: RunConfig, num_clients: int) -> None:
    """Refuse to split the whole of a dataset among more or fewer clients than it can be, without reading it.

    Raises
    ------
    ConfigError
        If some client could have no example, or some class no client.
    """
    spec, skew = SPECS[config.dataset], config.label_skew()
    check_partitions(num_clients, spec.num_examples)
    if skew is not None:
        check_classes(num_clients, skew[0], spec.num_classes)


def split_labels(config: RunConfig, labels: NDArray[np.int64], split: Split, num_partitions: int) -> list[Rows]:
    """Return the positions in `labels` that each client gets, split as configured; test data is split evenly."""
    stream = (_SPLIT_STREAM, int(split == "test"))
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=stream))
    skew = config.label_skew()
    if split == "test":  # a client without test data is no harm, unlike one without training data
        return np.array_split(rng.permutation(len(labels)), num_partitions)
    if skew is None:
        return iid_split(len(labels), num_partitions, rng)
    return extended_dirichlet_split(labels, num_partitions, *skew, rng)


def central_test(config: RunConfig) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Return an ``evaluate_fn``: loss and accuracy of the whole model on the dataset's own test split."""
    test, model = load_images(config, "test"), make_model(config)
    batches = np.array_split(np.arange(len(test)), -(-len(test) // _TEST_BATCH))

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        model.eval()
        loss = correct = 0.0
        with torch.inference_mode():
            for batch in batches:
                inputs, targets = test.get_batch(batch)
                outputs = model(inputs)
                loss += functional.cross_entropy(outputs, targets, reduction="sum").item()
                correct += (outputs.argmax(dim=1) == targets).sum().item()
        return MetricRecord({"loss": loss / len(test), "accuracy": correct / len(test)})

    return evaluate
