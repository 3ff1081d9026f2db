"""Batches of many clients read as one: the same to the last bit as each by itself, or not at all."""

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from psl_flower.app.images import ImageSet, crop_flip
from psl_flower.data import Examples, Seeds, read_together

COUNTS = (3, 1, 4)
SEEDS = (11, 5, 7)
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (30, 3, 8, 8), dtype=np.uint8), RNG.integers(0, 4, 30)
INDICES = [RNG.integers(0, 10, count) for count in COUNTS]


def image_sets(augment):
    rows = np.split(RNG.permutation(30), 3)
    return [ImageSet(IMAGES, LABELS, mean=[0.5] * 3, std=[0.25] * 3, indices=each, augment=augment) for each in rows]


def tensor_sets():
    return [TensorDataset(torch.randn(10, 2), torch.randn(10), torch.arange(10) + i) for i in range(3)]


def one_by_one(datasets):
    batches = []
    for dataset, indices, seed in zip(datasets, INDICES, SEEDS, strict=True):
        torch.manual_seed(seed)
        batches.append(Examples(dataset).batch(indices))
    inputs = [batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,) for batch in batches]
    return [torch.cat(column) for column in zip(*inputs, strict=True)], torch.cat([b.target for b in batches])


def together(datasets, **options):
    found = [Examples(dataset, **options) for dataset in datasets]
    return read_together(found, INDICES, Seeds(SEEDS))


@pytest.mark.parametrize(
    "datasets",
    [
        image_sets(crop_flip),
        image_sets(None),
        tensor_sets(),
        [Subset(each, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]) for each in tensor_sets()],
    ],
    ids=["augmented", "images", "tensors", "subsets"],
)
def test_it_is_what_each_reads_joined(datasets):
    inputs, target = one_by_one(datasets)
    batch = together(datasets)
    found = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
    assert all(torch.equal(a, b) for a, b in zip(found, inputs, strict=True))
    assert torch.equal(batch.target, target)
    assert batch.size == sum(COUNTS)


@pytest.mark.torch("2.10")
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_unsigned_types_are_what_they_are_for_one_client(dtype):
    datasets = [TensorDataset(torch.randn(10, 2), torch.from_numpy(np.arange(10)).to(dtype)) for _ in COUNTS]
    _, target = one_by_one(datasets)
    batch = together(datasets)
    assert batch.target.dtype == target.dtype == torch.int64
    assert torch.equal(batch.target, target)


def test_augmentation_is_each_clients_own():
    examples, indices = [Examples(image_sets(crop_flip)[0])] * 2, [np.arange(10)] * 2
    for seeds, alike in (((5, 5), True), ((5, 6), False)):
        batch = read_together(examples, indices, Seeds(seeds))
        assert torch.equal(*batch.inputs.split(10)) is alike


class Own(TensorDataset):
    def __getitem__(self, index):
        return self.tensors[0][index] * 2, self.tensors[1][index]


def with_nan():
    sets = tensor_sets()
    sets[1].tensors[0][:] = torch.nan
    return sets


def of_other_images():
    return [*image_sets(None)[:2], ImageSet(IMAGES.copy(), LABELS, mean=[0.5] * 3, std=[0.25] * 3)]


@pytest.mark.parametrize(
    "datasets",
    [
        [*tensor_sets()[:2], Own(torch.zeros(10, 2), torch.zeros(10))],
        [Own(torch.zeros(10, 2), torch.zeros(10))] * 3,
        with_nan(),
        of_other_images(),
        image_sets(lambda pixels: pixels),
        [*image_sets(None)[:2], image_sets(crop_flip)[2]],
        [[(torch.zeros(2), i) for i in range(10)]] * 3,
    ],
    ids=["mixed", "own items", "nan", "other images", "other augmentation", "some augmented", "lists"],
)
def test_what_may_differ_is_left_to_each(datasets):
    assert together(datasets) is None


def test_rows_of_ones_own_collate_fn_are_left_to_each():
    assert together(tensor_sets(), collate_fn=torch.utils.data.default_collate) is None
