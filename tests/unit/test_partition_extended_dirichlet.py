"""The partitioner as Flower Datasets uses it: lazily, through FederatedDataset, and on plain datasets."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from flwr_datasets import FederatedDataset

from psl_flower import partition
from psl_flower.errors import ConfigError
from psl_flower.partition import ExtendedDirichletPartitioner, IidPartitioner, extended_dirichlet_split

LABELS = np.random.default_rng(0).integers(5, size=600)
NAMES = ["ant", "bee", "cat", "dog", "eel"]


def make_dataset(labels=LABELS, feature=None):
    features = None if feature is None else Features({"x": Value("int64"), "label": feature})
    return Dataset.from_dict({"x": list(range(len(labels))), "label": list(labels)}, features=features)


def make_partitioner(dataset=None, **changes):
    arguments = {"num_partitions": 8, "partition_by": "label", "num_classes_per_partition": 2, "alpha": 3.0}
    partitioner = ExtendedDirichletPartitioner(**{**arguments, **changes})
    if dataset is not None:
        partitioner.dataset = dataset
    return partitioner


def rows(partitioner):
    return [partitioner.load_partition(k)["x"][:] for k in range(partitioner.num_partitions)]


@pytest.mark.parametrize(
    "dataset",
    [
        make_dataset(),
        make_dataset(feature=ClassLabel(names=NAMES)),
        make_dataset([NAMES[label] for label in LABELS]),
        make_dataset(LABELS * 1000 - 7),
        make_dataset(feature=Value("int8")),
        make_dataset(LABELS / 2),
    ],
    ids=["integers", "ClassLabel", "strings", "gaps", "bytes", "floats"],
)
def test_any_labels_are_split_as_their_array_is(dataset):
    parts = rows(make_partitioner(dataset, shuffle=False))
    expected = extended_dirichlet_split(LABELS, 8, 2, 3.0, np.random.default_rng(42))
    assert parts == [part.tolist() for part in expected]


def test_partitions_are_datasets_of_all_columns():
    dataset = make_dataset(feature=ClassLabel(names=NAMES))
    part = make_partitioner(dataset).load_partition(3)
    assert isinstance(part, Dataset)
    assert part.features == dataset.features
    assert len(set(part["label"])) == 2
    assert [LABELS[x] for x in part["x"]] == part["label"][:]


def test_shuffled_and_filtered_datasets_are_split_by_the_rows_they_show():
    dataset = make_dataset().shuffle(seed=3).select(range(400))
    parts = rows(make_partitioner(dataset))
    assert sorted(sum(parts, start=[])) == sorted(dataset["x"])  # noqa: RUF017 - eight short lists
    assert all(len({LABELS[x] for x in part}) <= 2 for part in parts)


def test_every_process_finds_the_same_split():
    assert rows(make_partitioner(make_dataset())) == rows(make_partitioner(make_dataset()))
    one, other = (make_partitioner(make_dataset(), seed=seed) for seed in (1, 2))
    assert rows(one) != rows(other)


def test_the_order_of_loading_does_not_matter():
    one, other = make_partitioner(make_dataset()), make_partitioner(make_dataset())
    assert other.load_partition(7)["x"][:] == rows(one)[7]
    assert rows(one) == rows(other)


def test_shuffle_changes_the_order_within_partitions_only():
    plain, shuffled = (rows(make_partitioner(make_dataset(), shuffle=shuffle)) for shuffle in (False, True))
    assert [sorted(part) for part in shuffled] == plain
    assert shuffled != plain


def test_number_of_partitions_is_known_before_the_dataset():
    partitioner = make_partitioner()
    assert partitioner.num_partitions == 8
    with pytest.raises(AttributeError, match="dataset field should be set"):
        partitioner.load_partition(0)


@pytest.mark.parametrize("strings", [False, True])
def test_through_federated_dataset(tmp_path, strings):
    path = tmp_path / "train.parquet"
    make_dataset([NAMES[label] for label in LABELS] if strings else LABELS).to_parquet(path)
    federated = FederatedDataset(
        dataset="parquet",
        partitioners={"train": make_partitioner()},
        data_files={"train": str(path)},
        cache_dir=str(tmp_path / "cache"),
    )
    parts = [federated.load_partition(k) for k in range(8)]
    assert sorted(x for part in parts for x in part["x"]) == list(range(600))
    assert {len(set(part["label"])) for part in parts} == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_partitions": 0}, "num_partitions must be at least 1, got 0"),
        ({"num_classes_per_partition": 0}, "num_classes_per_partition must be at least 1, got 0"),
        ({"alpha": -1.0}, "alpha must be greater than 0, got -1.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": None}, "seed must be a whole number, got None"),
    ],
)
def test_arguments_are_checked_at_construction(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_partitioner(**changes)


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        (LABELS, {"partition_by": "labels"}, r"partition_by must be one of 'x', 'label', .*did you mean 'label'"),
        (LABELS, {"num_classes_per_partition": 6}, "must not exceed the number of classes, got 6 for 5"),
        (LABELS, {"num_partitions": 2}, "2 partitions of 2 classes each hold at most 4 of 5 classes"),
        (LABELS, {"num_partitions": 601}, "got 600 examples for 601 partitions"),
        ([1, 2, None, 4], {}, "every example needs a label, got nan for 1 of 4, first at index 2"),
        (["a", None, "b"], {}, "every example needs a label, got None for 1 of 3, first at index 1"),
        ([[1, 2], [3, 4]], {"num_partitions": 1}, "labels must be"),
    ],
)
def test_data_that_cannot_be_split_is_refused(labels, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_partitioner(make_dataset(labels), **changes).load_partition(0)


@pytest.mark.parametrize(
    ("partition_id", "message"),
    [(8, "partition_id must be less than 8, got 8"), (-1, "partition_id must be at least 0, got -1")],
)
def test_there_are_no_more_partitions(partition_id, message):
    with pytest.raises(ConfigError, match=message):
        make_partitioner(make_dataset()).load_partition(partition_id)


def test_iid_partitioner_is_at_hand():
    partitioner = IidPartitioner(num_partitions=4)
    partitioner.dataset = make_dataset()
    assert [len(partitioner.load_partition(k)) for k in range(4)] == [150] * 4


def test_the_package_has_nothing_else():
    with pytest.raises(AttributeError, match=r"module 'psl_flower\.partition' has no attribute 'Missing'"):
        partition.Missing  # noqa: B018 - reading it is the test
