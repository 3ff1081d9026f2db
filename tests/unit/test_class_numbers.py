"""What data say of the numbers of their classes, and what becomes of data of one client that contradict each other."""

import logging

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from psl_flower.client import SplitClient
from psl_flower.data import Examples
from psl_flower.data.classes import MAX_NAMED, ClassNumbers
from psl_flower.data.telling import tell_once
from psl_flower.errors import ConfigError
from psl_flower.torchvision_compat import import_torchvision

import_torchvision()
from torchvision.datasets import ImageFolder, wrap_dataset_for_transforms_v2  # noqa: E402

ALL, TWO = ("cat", "dog", "owl"), ("cat", "owl")
NUMBERS, OTHERS = {"cat": 0, "dog": 1, "owl": 2}, {"cat": 0, "owl": 1}


@pytest.fixture
def folder(tmp_path):
    def make(names, kind=ImageFolder, **options):
        for name in names:
            (tmp_path / "-".join(names) / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2)).save(tmp_path / "-".join(names) / name / "1.png")
        return kind(tmp_path / "-".join(names), **options)

    return make


class OwnItems(ImageFolder):
    """Its items may have any labels."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, NUMBERS[self.classes[label]]


class OwnClasses(ImageFolder):
    """A class has the same number wherever it is."""

    def find_classes(self, directory):
        classes, _ = super().find_classes(directory)
        return classes, {name: NUMBERS[name] for name in classes}


class Transformed(Dataset):
    """Passes on what it wraps, as many a tutorial does."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def column(names, feature=datasets.ClassLabel):
    rows = {"x": [0.0] * len(names), "label": list(range(len(names)))}
    return datasets.Dataset.from_dict(rows).cast_column("label", feature(names=list(names)))


def tags(names):
    of_a_word = datasets.ClassLabel(names=list(names))
    rows = {"x": [0.0], "label": [list(range(len(names)))]}
    return datasets.Dataset.from_dict(rows).cast_column("label", datasets.Sequence(of_a_word))


def renumbered(dataset):
    dataset.samples = [(path, NUMBERS[dataset.classes[n]]) for path, n in dataset.samples]
    return dataset


SAY = {
    "a folder": (lambda folder: folder(TWO), OTHERS, True),
    "a subset": (lambda folder: Subset(Subset(folder(TWO), [0, 1]), [0]), OTHERS, True),
    "parts": (lambda folder: ConcatDataset([folder(TWO), folder(TWO)]), OTHERS, True),
    "torchvision's wrapper": (lambda folder: wrap_dataset_for_transforms_v2(folder(TWO)), OTHERS, True),
    "numbers by one's own rule": (lambda folder: folder(TWO, OwnClasses), {"cat": 0, "owl": 2}, True),
    "items of one's own": (lambda folder: folder(TWO, OwnItems), OTHERS, False),
    "a wrapper": (lambda folder: Transformed(Subset(folder(TWO), [0])), OTHERS, False),
    "a target_transform": (lambda folder: folder(TWO, target_transform=lambda y: 2 * y), None, None),
    "samples numbered anew": (lambda folder: renumbered(folder(TWO)), None, None),
    "a column": (lambda _: column(TWO).with_format("torch"), OTHERS, True),
    "a column with a transform": (lambda _: column(TWO).with_transform(lambda rows: rows), OTHERS, False),
    "tags": (lambda _: tags(TWO), OTHERS, True),
    "a column of numbers": (lambda _: datasets.Dataset.from_dict({"x": [0.0], "label": [1]}), None, None),
    "rows": (lambda _: [(torch.zeros(2), 1)], None, None),
}


@pytest.mark.parametrize("case", SAY)
def test_data_say_which_number_a_class_has_where_they_know(case, folder):
    make, numbers, sure = SAY[case]
    expected = None if numbers is None else ClassNumbers(numbers, sure)
    assert SplitClient(make(folder)).class_numbers() == expected


def test_code_that_may_change_labels_leaves_nothing_sure(folder):
    class Own(SplitClient):
        def batch(self, dataset, indices):
            raise NotImplementedError

    assert Own(folder(TWO)).class_numbers() == ClassNumbers(OTHERS, sure=False)
    collated = Examples(folder(TWO), collate_fn=lambda rows: rows)
    assert SplitClient(collated).class_numbers() == ClassNumbers(OTHERS, sure=False)
    assert SplitClient(Examples(folder(TWO), target="input")).class_numbers() is None


def test_data_of_one_client_that_contradict_each_other_are_refused(folder):
    both = r"class 'owl' is 1 in the test data, 2 in the training data; number all classes .*allow_empty=True"
    with pytest.raises(ConfigError, match=both):
        SplitClient(folder(ALL), folder(TWO)).class_numbers()
    with pytest.raises(ConfigError, match="'owl' is 1 in the training data, 2 in the training data"):
        SplitClient(ConcatDataset([folder(ALL), folder(TWO)])).class_numbers()


def test_data_of_one_client_that_may_contradict_each_other_are_told_once(folder, caplog):
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        for _ in range(2):
            assert SplitClient(folder(ALL), Transformed(folder(TWO))).class_numbers().numbers == NUMBERS
            assert SplitClient(folder(("cat",)), folder(("Katze",))).class_numbers() is not None
        assert SplitClient(folder(ALL), folder(("cat", "dog"))).class_numbers().numbers == NUMBERS
    assert [record.getMessage().split(". ")[0] for record in caplog.records] == [
        "class 'owl' is 1 in the test data, 2 in the training data",
        "class 0 is 'Katze' in the test data, 'cat' in the training data",
    ]


def test_of_many_classes_all_clients_tell_digests_of_the_same():
    names = [f"n{i}" for i in range(3 * MAX_NAMED)]
    told, lacking = (
        ClassNumbers({name: i for i, name in enumerate(n for n in names if n != but)}).digests()
        for but in (None, "n500")
    )
    assert len(told.numbers) == MAX_NAMED
    shared = told.numbers.keys() & lacking.numbers.keys()
    assert len(shared) >= MAX_NAMED - 1
    assert any(told.numbers[name] != lacking.numbers[name] for name in shared)
