"""What a data_fn is and returns: taken as meant, or refused with the remedy; never taken for something else."""

import functools
import logging
import re

import datasets
import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torch.utils.data.distributed import DistributedSampler

from psl_flower.data import check_data_fn, open_data, opening
from psl_flower.errors import ConfigError

N = 10
X = torch.arange(N * 3, dtype=torch.float32).reshape(N, 3)
Y = torch.arange(N) % 2
DATA = TensorDataset(X, Y)
PART = TensorDataset(X[:4], Y[:4])


class Stream(IterableDataset):
    def __len__(self):
        return N

    def __iter__(self):
        return iter(DATA)


def first_inputs(examples):
    return examples.batch([0]).inputs


# --- what it returns -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("what", "sizes"),
    [
        (DATA, (N, None)),
        ((DATA, PART), (N, 4)),
        ([DATA, PART], (N, 4)),
        ((DATA, None), (N, None)),
        ((X.numpy()[::-1], Y.numpy().astype(">i8")), (N, None)),
        (random_split(DATA, [7, 3]), (7, 3)),
        ([(x, y) for x, y in zip(X, Y, strict=True)], (N, None)),
        ([(X[0], X[1]), (X[2], X[3])], (2, None)),  # two rows with vectors for labels
        (([(X[0], 1)], [(X[1], 0), (X[2], 0)]), (1, 2)),
        ((X, Y), (N, None)),
        ((X.numpy(), Y.numpy()), (N, None)),
        (((X, Y), (X[:4], Y[:4])), (N, 4)),
        (((X, Y), PART), (N, 4)),
        ((X, X, Y), (N, None)),
        (DataLoader(DATA), (N, None)),
        ((DataLoader(DATA), DataLoader(PART)), (N, 4)),
        ([], (0, None)),
    ],
)
def test_data_and_pairs_of_data(what, sizes):
    train, test = open_data(what)
    assert (len(train), None if test is None else len(test)) == sizes
    assert train.name == "training data"
    if test is not None:
        assert test.name == "test data"
        assert test.batch([len(test) - 1]).size == 1


def test_tensors_are_inputs_and_labels_row_by_row():
    train, _ = open_data((X, -X, Y))
    batch = train.batch([7, 2])
    assert torch.equal(batch.inputs[0], X[[7, 2]])
    assert torch.equal(batch.inputs[1], -X[[7, 2]])
    assert torch.equal(batch.target, Y[[7, 2]])


def test_options_reach_both():
    train, test = open_data((DATA, PART), target="input", collate_fn=lambda rows: torch.ones(len(rows)))
    for examples in (train, test):
        assert examples.batch([1, 2]).target.tolist() == [1, 1]
    assert torch.equal(first_inputs(open_data(X, target="input")[0]), X[:1])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (None, "of type NoneType: is a return statement missing"),
        ("/data/train", "of type str: read what is there, and return its examples"),
        (([[1.0, 2.0]] * 4, [0, 1, 0, 1]), r"or tensors \(x, y\) with a row an example, got 2 parts: list, list"),
        (Subset(DATA, torch.arange(N) > 2), r"a mask, .*examples 0 and 1: pass mask\.nonzero\(\)\.flatten\(\)"),
        (Subset(DATA, [True] * 4), "its indices are a mask"),
        ((X.to_sparse(), Y), r"its tensors must be dense: call to_dense\(\)"),
        (Stream(), r"of type Stream: .*return list\(dataset\)"),
        ((DATA, Stream()), "the test data is of type Stream"),
        ((row for row in DATA), "of type generator"),
        (DataLoader(Stream()), "of type Stream"),
        (
            {"train": DATA, "test": PART},
            r"mapping with \['test', 'train'\].*data\['train'\], data\['test'\]\)",
        ),
        ((DATA, PART, PART), r"or a pair .*got 3 parts: TensorDataset, TensorDataset, TensorDataset"),
        ((DATA, Y), "got 2 parts: TensorDataset, Tensor"),
        ((X, Y.tolist()), "got 2 parts: Tensor, list"),
        ((DATA,), "got 1 parts"),
        ((X, X[:4]), r"a row an example .* are \(10, 3\), \(4, 3\).*\(\(x, y\), \(x_test, y_test\)\)"),
        ((X, torch.tensor(3)), r"are \(10, 3\), \(\)"),
        ((np.ma.masked_less(X.numpy(), 0), Y.numpy()), r"masked arrays hold values.*training data, filled\(value\)"),
        ((X.numpy(), np.array(["cat"] * N)), "must hold numbers, .*map labels to integers"),
        (pandas.DataFrame({"x": [1.0], "y": [0]}), "of type DataFrame: of its columns"),
        (Dataset, "map-style dataset .*make an instance"),
        (3, "map-style dataset"),
        (DataLoader(DATA, batch_size=None), "batch_size=None, whose items may be batches"),
        (DataLoader(DATA, sampler=SequentialSampler(range(3))), "SequentialSampler draws 3 of 10 .*Subset"),
        (DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 0)), "DistributedSampler draws 5 of 10 .*Subset"),
    ],
)
def test_other_things_are_refused_with_the_remedy(what, message):
    with pytest.raises(ConfigError, match=message):
        open_data(what)


def test_of_two_tensors_an_autoencoder_cannot_tell_labels_from_test_data():
    with pytest.raises(ConfigError, match="of 2 tensors it is not clear whether"):
        open_data((X, X + 1), target="input")
    train, test = open_data((TensorDataset(X), TensorDataset(X + 1)), target="input")
    assert torch.equal(first_inputs(train) + 1, first_inputs(test))


def test_a_single_tensor_has_no_labels():
    with pytest.raises(ConfigError, match=r"no label.*target='input'"):
        first_inputs(open_data(X)[0])


# --- loaders ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def told(caplog):
    opening.tell_once.cache_clear()
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        yield lambda: [record.getMessage() for record in caplog.records]
    opening.tell_once.cache_clear()


class Halves:
    """A batch sampler of one's own."""

    def __iter__(self):
        yield from (list(range(5)), list(range(5, 10)))


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({"batch_size": 4}, r"its batch size \(4\) not"),
        ({"batch_size": 4, "shuffle": True}, r"its batch size \(4\) and the order of its RandomSampler not"),
        ({"sampler": RandomSampler(DATA, num_samples=3)}, "RandomSampler not"),
        ({"sampler": WeightedRandomSampler([1.0] * N, 5)}, "the order of its WeightedRandomSampler not"),
        ({"batch_sampler": Halves()}, "used, Halves not"),
        (
            {"batch_sampler": BatchSampler(RandomSampler(DATA), 3, True)},
            "BatchSampler and the order of its RandomSampler",
        ),
    ],
)
def test_a_loader_gives_its_dataset_and_tells_once_what_is_not_used(options, ignored, told):
    for _ in range(2):
        train, _ = open_data(DataLoader(DATA, **options))
        assert train.dataset is DATA
        assert train.collate_fn is None
    (sentence,) = told()
    assert re.search(ignored, sentence), sentence
    assert sentence.startswith("The training data is a DataLoader")


def test_a_loaders_collate_fn_goes_before_the_general_one():
    def own(rows):
        return torch.ones(len(rows)), torch.zeros(len(rows))

    def general(rows):
        raise AssertionError

    train, _ = open_data(DataLoader(DATA, collate_fn=own), collate_fn=general)
    assert train.batch([0, 1]).inputs.tolist() == [1, 1]
    assert open_data(DataLoader(DATA), collate_fn=general)[0].collate_fn is general


def test_the_loaders_of_flowers_quickstart(told):
    """Rows are dicts of a Hugging Face dataset with transforms, in loaders for training and test data."""
    whole = datasets.Dataset.from_dict({"img": X.tolist(), "label": Y.tolist()}).train_test_split(0.2, seed=42)
    whole = whole.with_transform(lambda rows: {**rows, "img": [torch.tensor(img) / 2 for img in rows["img"]]})
    train, test = open_data((DataLoader(whole["train"], batch_size=4, shuffle=True), DataLoader(whole["test"])))
    for examples, part in ((train, whole["train"]), (test, whole["test"])):
        batch = examples.batch([1, 0])
        assert torch.equal(batch.inputs["img"], torch.stack([part[1]["img"], part[0]["img"]]))
        assert batch.target.tolist() == [part[1]["label"], part[0]["label"]]
    assert sorted(train.labels().tolist() + test.labels().tolist()) == sorted(Y.tolist())
    assert len(told()) == 2  # one for each, for they differ


@pytest.mark.parametrize("how", ["sampler", "batch_sampler"])
def test_a_loader_of_some_examples_gives_those_only(how, told):
    sampler = SubsetRandomSampler([8, 1, 3])
    options = {"sampler": sampler} if how == "sampler" else {"batch_sampler": BatchSampler(sampler, 2, False)}
    train, _ = open_data(DataLoader(DATA, **options))
    assert isinstance(train.dataset, Subset)
    assert torch.equal(train.batch(range(3)).inputs, X[[8, 1, 3]])
    assert "SubsetRandomSampler" in told()[0]


# --- what it is ------------------------------------------------------------------------------------------------------
def by_partition(partition_id, num_partitions, batch_size):
    raise AssertionError


class Loads:
    def __call__(self, context):
        raise AssertionError


@pytest.mark.parametrize(
    "function",
    [
        lambda: None,
        lambda context: None,
        lambda anything: None,
        lambda context, config: None,
        lambda context, config=None, *, seed=3: None,
        lambda *args, **options: None,
        lambda context, num_partitions=10: None,
        functools.partial(lambda folder, context: None, "data"),
        functools.partial(by_partition, partition_id=3, num_partitions=4, batch_size=1),
        Loads(),
        dict,
    ],
)
def test_functions_of_the_context_are_taken(function):
    check_data_fn(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            by_partition,
            r"by_partition is a function of \(partition_id, num_partitions, batch_size\): pass data_fn=lambda context: "
            r"by_partition\(context.node_config\['partition-id'\], context.node_config\['num-partitions'\], "
            r"batch_size=...\)",
        ),
        (
            functools.partial(by_partition, num_partitions=4, batch_size=2),
            r"by_partition\(context.node_config\['partition",
        ),
        (lambda partition_id=0, num_partitions=4: None, "is a function of"),
        (lambda num_partitions: None, "is a function of"),
        (lambda cid: None, r"load_data\(context.node_config\['partition-id'\]\)"),
        (lambda context, config, folder: None, r"also needs 'folder': .*functools.partial\(load_data, folder=...\)"),
        (lambda context, *, folder: None, "also needs 'folder'"),
        (DATA, "must be a function that returns"),
    ],
)
def test_other_functions_are_refused_by_their_names(function, message):
    with pytest.raises(ConfigError, match=message):
        check_data_fn(function)


def test_sparse_rows_that_a_collate_fn_makes_dense():
    def dense(rows):
        return torch.stack([x.to_dense() for x, _ in rows]), torch.stack([y for _, y in rows])

    sparse = TensorDataset(X.to_sparse(), Y)
    for what, collate_fn in (
        (sparse, dense),
        (DataLoader(sparse), dense),
        (DataLoader(sparse, collate_fn=dense), None),
    ):
        train, _ = open_data(what, collate_fn=collate_fn)
        assert torch.equal(train.batch([3, 1]).inputs, X[[3, 1]])
    with pytest.raises(
        ConfigError, match=r"must be dense: call to_dense\(\) on them, or on those of the rows in a coll"
    ):
        open_data(DataLoader(sparse))
