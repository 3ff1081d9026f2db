"""Rows as people have them, read as batches: the right inputs and target from each, or one clear sentence."""

import random
from collections import Counter, UserDict

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset, random_split

from psl_flower.data import Batch, Examples, check_drawn_again, checksum, checksums
from psl_flower.devices import seeded
from psl_flower.errors import BadRowsError, ConfigError
from psl_flower.tree import leaves

N = 23
X = torch.arange(N * 6, dtype=torch.float32).reshape(N, 6)
Y = torch.from_numpy(np.random.default_rng(0).integers(0, 4, N))
ROWS = [7, 3, 22, 7]
CPU = torch.device("cpu")


class Rows(Dataset):
    """Any rows, one by one."""

    def __init__(self, row, n=N):
        self.row, self.n = row, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        assert type(i) is int
        return self.row(i)


class GetBatch(Rows):
    """Offers the fastest way; reading it one by one is an error."""

    def __init__(self):
        super().__init__(None)

    def get_batch(self, indices):
        assert isinstance(indices, np.ndarray)
        return X[torch.from_numpy(indices)], Y[torch.from_numpy(indices)]


class GetItems(Dataset):
    def __len__(self):
        return N

    def __getitems__(self, indices):
        assert all(type(i) is int for i in indices)
        return [(X[i], int(Y[i])) for i in indices]


class Shifted(TensorDataset):
    """A subclass with items of its own."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 100, (y + 1) % 4


class Delegating:
    """A wrapper with items of its own that passes other names on."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        return X[i], Y[i]

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Overridden(GetBatch):
    def __getitem__(self, i):
        return X[i] + 100, (Y[i] + 1) % 4


def all_of(dataset):
    return Subset(dataset, range(N))


def same(a, b):
    return type(a) is type(b) and all(map(torch.equal, leaves(a), leaves(b)))


# --- pairs, however they are read ------------------------------------------------------------------------------------
PAIRS = {
    "get_batch": GetBatch(),
    "__getitems__": GetItems(),
    "one by one": Rows(lambda i: (X[i], int(Y[i]))),
    "TensorDataset": TensorDataset(X, Y),
    "list of tuples": [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "list of lists": [[x, y] for x, y in zip(X, Y, strict=True)],
    "numpy rows": [(x.numpy(), np.int64(y)) for x, y in zip(X, Y, strict=True)],
    "numpy rows, reversed": [(np.flip(x.flip(0).numpy()), int(y)) for x, y in zip(X, Y, strict=True)],
    "numpy rows of another machine": [(x.numpy().astype(">f4"), int(y)) for x, y in zip(X, Y, strict=True)],
    "Subset": Subset(TensorDataset(X.flip(0), Y.flip(0)), range(N - 1, -1, -1)),
    "Subset of tensors as indices": Subset(TensorDataset(X.flip(0), Y.flip(0)), torch.arange(N).flip(0)),
    "Subset of a Subset": Subset(Subset(GetItems(), list(range(N))[::-1]), list(range(N))[::-1]),
    "Subset of get_batch": Subset(GetBatch(), range(N)),
    "ConcatDataset": ConcatDataset([TensorDataset(X[:9], Y[:9]), Rows(lambda i: (X[i + 9], Y[i + 9]), N - 9)]),
    "StackDataset": StackDataset(Rows(lambda i: X[i]), Rows(lambda i: int(Y[i]))),
    "delegating": Delegating(Shifted(X, Y)),
}


@pytest.mark.parametrize("dataset", PAIRS.values(), ids=PAIRS)
def test_pairs_from_every_kind_of_dataset(dataset):
    examples = Examples(dataset)
    batch = examples.batch(np.array(ROWS))
    assert same(batch.inputs, X[ROWS])
    assert same(batch.target, Y[ROWS])
    assert (batch.size, len(examples)) == (4, N)
    labels = examples.labels()
    assert labels.dtype == np.int64
    assert labels.tolist() == Y.tolist()


@pytest.mark.parametrize("dataset", [Shifted(X, Y), Overridden()], ids=["TensorDataset", "get_batch"])
@pytest.mark.parametrize(
    "within",
    [
        lambda d: d,
        lambda d: Subset(d, range(N)),
        lambda d: ConcatDataset([d]),
        lambda d: Subset(ConcatDataset([d]), range(N)),
    ],
    ids=["itself", "Subset", "ConcatDataset", "Subset of a Subset"],
)
def test_a_subclass_own_items_are_not_gone_around(dataset, within):
    examples = Examples(within(dataset))
    assert same(examples.batch(ROWS).inputs, X[ROWS] + 100)
    assert examples.labels().tolist() == ((Y + 1) % 4).tolist()


def test_random_split_behaves_as_the_whole():
    whole = Shifted(X, Y)
    for part in random_split(whole, [0.5, 0.5], torch.Generator().manual_seed(0)):
        expected = [whole[i] for i in part.indices]
        batch = Examples(part).batch(range(len(part)))
        assert same(batch.inputs, torch.stack([x for x, _ in expected]))
        assert Examples(part).labels().tolist() == [int(y) for _, y in expected]


# --- other rows ------------------------------------------------------------------------------------------------------
def test_a_row_of_several_inputs():
    for dataset in (TensorDataset(X, X[:, :1], Y), Rows(lambda i: (X[i], X[i, :1], Y[i]))):
        batch = Examples(dataset).batch(ROWS)
        assert same(batch.inputs, (X[ROWS], X[ROWS, :1]))
        assert same(batch.target, Y[ROWS])


@pytest.mark.parametrize(
    ("row", "target", "inputs"),
    [
        (lambda i: {"img": X[i], "label": Y[i]}, "label", ["img"]),
        (lambda i: {"labels": int(Y[i]), "ids": X[i], "a mask": X[i] > 3}, "label", ["a mask", "ids"]),
        (lambda i: {"fine": Y[i], "label": X[i]}, "fine", ["label"]),
        (lambda i: UserDict(img=X[i], label=Y[i]), "label", ["img"]),
    ],
)
def test_dict_rows(row, target, inputs):
    batch = Examples(Rows(row), target=target).batch(ROWS)
    assert list(batch.inputs) == inputs
    assert same(batch.inputs[inputs[-1]], X[ROWS])
    assert same(batch.target, Y[ROWS])
    assert Examples(Rows(row), target=target).labels().tolist() == Y.tolist()


def test_labels_that_are_pictures_and_dicts():
    masks = Examples(Rows(lambda i: (X[i], X[i].reshape(2, 3) > 4))).batch(ROWS)
    assert masks.target.shape == (4, 2, 3)
    boxes = Examples(Rows(lambda i: {"img": X[i], "label": {"box": X[i, :4], "class": Y[i]}})).batch(ROWS)
    assert same(boxes.target, {"box": X[ROWS, :4], "class": Y[ROWS]})


@pytest.mark.parametrize(
    "dataset",
    [TensorDataset(X), Rows(lambda i: X[i]), Rows(lambda i: (X[i],)), TensorDataset(X, Y), Rows(lambda i: (X[i], i))],
)
def test_an_autoencoder_has_its_inputs_for_target(dataset):
    batch = Examples(dataset, target="input").batch(ROWS)
    assert same(batch.inputs, X[ROWS])
    assert batch.target is batch.inputs
    with pytest.raises(ConfigError, match="no classes"):
        Examples(dataset, target="input").labels()


# --- collate_fn ------------------------------------------------------------------------------------------------------
def ragged(i):
    return {"ids": [1] * (1 + i % 3), "label": int(Y[i])}


def padded(rows):
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([row["ids"] + [0] * (longest - len(row["ids"])) for row in rows])
    return ids, [row["label"] for row in rows]


@pytest.mark.parametrize(
    ("form", "inputs"),
    [
        (lambda ids, y: (ids, y), lambda ids: ids),
        (lambda ids, y: (ids, ids > 0, y), lambda ids: (ids, ids > 0)),
        (lambda ids, y: UserDict(label=y, ids=ids), lambda ids: {"ids": ids}),
    ],
)
def test_a_collate_fn_makes_what_a_row_may_be(form, inputs):
    examples = Examples(Rows(ragged), collate_fn=lambda rows: form(*padded(rows)))
    batch = examples.batch([0, 1, 5])
    ids = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    assert same(batch.inputs, inputs(ids))
    assert same(batch.target, Y[[0, 1, 5]])
    assert examples.labels().tolist() == Y.tolist()


def negated(rows):
    return torch.stack([-x for x, _ in rows]), [int(y) for _, y in rows]


def test_a_collate_fn_is_given_the_rows_of_a_tensor_dataset():
    for dataset in (TensorDataset(X, Y), Subset(TensorDataset(X, Y), range(N)), GetItems()):
        batch = Examples(
            dataset, collate_fn=lambda rows: (torch.stack([-x for x, _ in rows]), [int(y) for _, y in rows])
        )
        assert same(batch.batch(ROWS).inputs, -X[ROWS])
        assert not batch.plain


# --- Hugging Face ----------------------------------------------------------------------------------------------------
HF = datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()})


def changed(rows):
    return {"x": [torch.tensor(x) for x in rows["x"]], "label": [(y + 1) % 4 for y in rows["label"]]}


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [(HF.with_format("torch"), Y), (HF.with_format("numpy"), Y), (HF.with_transform(changed), (Y + 1) % 4)],
    ids=["set_format", "numpy", "with_transform"],
)
def test_hugging_face(dataset, expected):
    batch = Examples(dataset).batch(ROWS)
    assert same(batch.inputs["x"].float(), X[ROWS])
    assert same(batch.target, expected[ROWS])
    assert Examples(dataset).labels().tolist() == expected.tolist()
    some = dataset.select([5, 1, 2])
    assert Examples(some).labels().tolist() == expected[[5, 1, 2]].tolist()


def test_hugging_face_without_a_format_is_told_what_to_do():
    with pytest.raises(ConfigError, match=r"row\['x'\] is a list of 6 numbers .*with_format\('torch'\)"):
        Examples(HF).batch(ROWS)


# --- errors ----------------------------------------------------------------------------------------------------------
PICTURE = Image.new("RGB", (2, 2))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (TensorDataset(X), r"rows of the training data have no label \(found a tuple of 1\).*target='input'"),
        (Rows(lambda i: X[i]), r"no label \(found a Tensor\)"),
        (Rows(lambda i: {"img": X[i], "y": 1}), r"under the name 'label' or 'labels', .* hold 'img', 'y'"),
        (Rows(lambda i: {"label": 1}), "must hold an input beside its label, .* only 'label'"),
        (Rows(lambda i: (PICTURE, 1)), r"row\[0\] is a PIL image in example 7 .*ToTensor\(\)"),
        (Rows(lambda i: {"img": PICTURE, "label": 1}), r"row\['img'\] is a PIL image .*with_transform"),
        (Rows(lambda i: (X[i], "cat")), r"row\[1\] is the string 'cat'.*map labels to integers"),
        (
            Rows(lambda i: (np.zeros((i, 2)), 1)),
            r"row\[0\] is \(7, 2\) in example 7 .*, \(3, 2\) in example 3.*collate_fn",
        ),
        (Rows(lambda i: (X[i], {str(i): 1})), r"example 7 .* holds row\[0\], row\[1\]\['7'\], example 3 row\[0\]"),
        (Rows(lambda i: (np.ma.masked_less(np.arange(3), 1), 1)), r"row\[0\] is a masked array.*filled"),
        (Rows(lambda i: ([1.0, 2.0], 1)), r"row\[0\] is a list of 2 numbers.*make it a tensor"),
        (
            Rows(lambda i: (X[i], object())),
            r"cannot make a batch of the training data: TypeError.*object",
        ),
    ],
)
def test_rows_that_cannot_be_used_say_what_to_do(dataset, message):
    with pytest.raises(ConfigError, match=message):
        Examples(dataset).batch(ROWS)


@pytest.mark.parametrize(
    ("collate_fn", "message"),
    [
        (
            lambda rows: ([x for x, _ in rows], torch.zeros(len(rows))),
            "of 4 examples of the training data, inputs has 6 rows",
        ),
        (lambda rows: (torch.zeros(len(rows)), torch.tensor(1)), "label has no dimension"),
        (lambda rows: (torch.zeros(len(rows)), ["cat"] * len(rows)), r"label\[0\] must be a tensor, .* got 'cat'"),
        (lambda rows: torch.zeros(len(rows)), "have no label"),
    ],
)
def test_a_collate_fn_that_returns_something_else(collate_fn, message):
    with pytest.raises(ConfigError, match=message):
        Examples(TensorDataset(X, Y), collate_fn=collate_fn, name="training data").batch(ROWS)


@pytest.mark.parametrize("dataset", [{1, 2}, 3, Rows, iter([])])
def test_what_is_no_dataset(dataset):
    with pytest.raises(ConfigError, match="the training data must be a map-style dataset"):
        Examples(dataset)


def test_no_examples_and_no_target():
    with pytest.raises(ConfigError, match="at least one example, got none"):
        Examples(TensorDataset(X, Y)).batch([])
    with pytest.raises(ConfigError, match="target must be the name"):
        Examples(TensorDataset(X, Y), target="")


# --- one bad row -----------------------------------------------------------------------------------------------------
def broken(*bad, kind="raises"):
    def row(i):
        if i not in bad:
            return X[i], Y[i]
        if kind == "raises":
            raise OSError(f"cannot identify image file 'img_{i:04}.png'")
        return None if kind == "None" else (X[i] * float(kind), Y[i])

    return Examples(Rows(row))


def test_rows_that_raise_are_found_with_their_errors_and_the_others_are_usable():
    examples = broken(7, 22)
    with pytest.raises(BadRowsError, match="2 of the 23 examples of the training data cannot be used") as caught:
        examples.batch(ROWS)
    assert sorted(caught.value.rows) == [7, 22]
    assert "test_data_examples.py:" in caught.value.rows[7]
    assert "in row: OSError: cannot identify image file 'img_0007.png'" in caught.value.rows[7]
    assert "example 22: " in str(caught.value)
    assert same(examples.batch([3]).inputs, X[[3]])


@pytest.mark.parametrize(("kind", "message"), [("nan", "NaN"), ("inf", "infinite"), ("None", "is None")])
def test_rows_that_hold_no_numbers_are_bad(kind, message):
    for rows in (ROWS, [7]):  # a batch of the bad row alone is no other matter
        with pytest.raises(BadRowsError) as caught:
            broken(7, kind=kind).batch(rows)
        assert list(caught.value.rows) == [7]
        assert message in caught.value.rows[7]


def test_a_nan_in_a_tensor_dataset_is_found_but_large_numbers_are_none():
    x = X.clone()
    x[3, 2] = float("nan")
    with pytest.raises(BadRowsError) as caught:
        Examples(TensorDataset(x, X, Y)).batch(ROWS)
    assert list(caught.value.rows) == [3]
    assert caught.value.rows[3].startswith("inputs[0] holds NaN")
    assert "fill in what is missing where the data are read" in caught.value.rows[3]
    huge = torch.full((N, 6), 3e38)
    assert same(Examples(TensorDataset(huge, Y)).batch(ROWS).inputs, huge[ROWS])


def test_a_batched_fetch_that_fails_for_one_row():
    class Fetches(GetItems):
        def __getitems__(self, indices):
            if 22 in indices:
                raise ValueError("bad shard")
            return super().__getitems__(indices)

    with pytest.raises(BadRowsError) as caught:
        Examples(Fetches()).batch(ROWS)
    assert list(caught.value.rows) == [22]


class Flaky:
    """Rows with noise, of which some fail the first times that they are read."""

    def __init__(self, **fails):
        self.fails, self.reads = {int(i[1:]): n for i, n in fails.items()}, Counter()

    def __call__(self, i):
        noise = torch.rand(6) + random.random()
        self.reads[i] += 1
        if self.reads[i] <= self.fails.get(i, 0):
            raise OSError(f"img_{i}.png: input/output error")
        return X[i] + noise, Y[i]


def test_a_read_that_fails_once_changes_nothing():
    with seeded(5, CPU):
        expected = Examples(Rows(Flaky())).batch(ROWS)
        after = random.random(), torch.rand(1)
    flaky = Flaky(_3=1, _22=1)
    with seeded(5, CPU):
        batch = Examples(Rows(flaky)).batch(ROWS)
        assert (random.random(), torch.rand(1)) == after
    assert torch.equal(batch.inputs, expected.inputs)  # with the same random numbers
    assert max(flaky.reads.values()) <= 4


def test_a_row_that_fails_twice_is_bad():
    flaky = Flaky(_3=1, _7=2, _22=2)
    with pytest.raises(BadRowsError) as caught:
        Examples(Subset(Rows(flaky), range(2, 23))).batch([1, 5, 20])
    assert sorted(caught.value.rows) == [5, 20]  # in the subset
    assert "img_7.png" in caught.value.rows[5]


def test_a_batched_fetch_that_fails_once():
    class Fetches(GetItems):
        failed = False

        def __getitems__(self, indices):
            if not self.failed:
                self.failed = True
                raise OSError("connection reset")
            return super().__getitems__(indices)

    assert Examples(Fetches()).batch(ROWS).size == len(ROWS)


def test_what_fails_for_all_rows_is_a_mistake_of_the_dataset():
    def row(i):
        return {}["missing"]

    for rows in (ROWS, [7]):
        with pytest.raises(ConfigError, match=r"training data cannot be read: test_data_ex.*py:\d+ in row: KeyError"):
            Examples(Rows(row)).batch(rows)
    with pytest.raises(ConfigError, match=r"every example .* unusable: inputs holds NaN"):
        Examples(TensorDataset(X * float("nan"), Y)).batch([7])


def test_what_fails_only_for_several_rows_is_no_bad_row():
    class Fetches(GetItems):
        def __getitems__(self, indices):
            if len(indices) > 1:
                raise ValueError("one at a time")
            return super().__getitems__(indices)

    with pytest.raises(ConfigError, match=r"cannot be read: test_data_examples.py:\d+ in __getitems__: ValueError"):
        Examples(Fetches()).batch(ROWS)


def test_memory_that_runs_out_is_not_sought_in_rows():
    def row(i):
        raise MemoryError

    with pytest.raises(MemoryError):
        Examples(Rows(row)).batch(ROWS)


# --- labels ----------------------------------------------------------------------------------------------------------
class Listing(Rows):
    def __init__(self, row, targets):
        super().__init__(row)
        self.targets = targets


def test_listed_labels_are_used_if_items_have_them():
    read = []

    def row(i):
        read.append(i)
        return X[0], i % 3

    dataset = Listing(row, [i % 3 for i in range(500)])
    dataset.n = 500
    assert Examples(dataset).labels().tolist() == dataset.targets
    assert len(set(read)) < 20
    assert {0, 499} <= set(read)


@pytest.mark.parametrize(
    "targets",
    [
        [(int(y) + 1) % 4 for y in Y],
        [3 if y == 2 else int(y) for y in Y],  # but for one class
        [*Y.tolist()[:-1], 9],
        Y.tolist()[:-1],
        ["a"] * N,
        None,
    ],
)
def test_listed_labels_that_differ_from_the_items_are_not(targets):
    assert Examples(Listing(lambda i: (X[i], Y[i]), targets)).labels().tolist() == Y.tolist()


def test_reading_labels_leaves_random_state_alone():
    def row(i):
        random.random(), np.random.rand()  # noqa: NPY002
        return X[i] + torch.rand(()), Y[i]

    with seeded(0, CPU):
        expected = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    with seeded(0, CPU):
        Examples(Rows(row)).labels()
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected  # noqa: NPY002


def test_labels_name_all_bad_rows_at_once_and_go_without_them():
    row = broken(1, 299).dataset.row
    examples = Examples(Rows(lambda i: (X[0], row(i % 300) and 2) if i in (1, 299) else (X[0], 2), n=300))
    with pytest.raises(BadRowsError) as caught:
        examples.labels()
    assert sorted(caught.value.rows) == [1, 299]
    labels = examples.labels(without=caught.value.rows)
    assert labels[[1, 299]].tolist() == [-1, -1]
    assert (labels == 2).sum() == 298


@pytest.mark.parametrize(
    ("target", "message"),
    [(Y.float(), r"label: torch.float32 \(\)"), (X.long(), r"label: torch.int64 \(6,\)"), (Y > 1, "torch.bool")],
)
def test_labels_must_be_whole_numbers(target, message):
    with pytest.raises(ConfigError, match=f"must be one whole number, got .*{message}.*needs no label counts"):
        Examples(TensorDataset(X, target)).labels()


def test_no_examples_have_no_labels():
    assert Examples(TensorDataset(X[:0], Y[:0])).labels().shape == (0,)
    assert Examples(Rows(None, n=0)).labels().shape == (0,)


# --- drawn again -----------------------------------------------------------------------------------------------------
def test_a_checksum_tells_whether_a_batch_is_the_same():
    images = torch.rand(32, 3, 64, 64)
    one = Batch((images, Y), {"y": Y}, 32)
    before = checksum(one)
    assert before == checksum(Batch((images.clone(), Y.clone()), {"y": Y.clone()}, 32))
    check_drawn_again(checksum(one), before, "training data")
    for other in (
        Batch((images.flip(3), Y), {"y": Y}, 32),  # mirrored
        Batch((images.roll(1, 0), Y), {"y": Y}, 32),
        Batch((images, Y), {"y": Y + 1}, 32),
        Batch((images, Y), None, 32),
        Batch((images.reshape(32, 3, 32, 128), Y), {"y": Y}, 32),
        Batch((torch.cat([images[:-1], images[-1:] + 0.1]), Y), {"y": Y}, 32),
    ):
        with pytest.raises(ConfigError, match=r"twice gave different data.*generator of its own.*global generators"):
            check_drawn_again(checksum(other), before, "training data")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int8, torch.complex64, torch.float64])
def test_a_checksum_of_every_dtype(dtype):
    values = torch.tensor([1, 0, 1]).to(dtype)
    assert checksum(Batch(values, None, 3)) != checksum(Batch(values.flip(0) == 0, None, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float32])
def test_the_checksum_of_a_part_is_that_of_the_part_alone(dtype):
    x, y = (torch.rand(9, 200, 300) * 3).to(dtype), {"label": torch.arange(9), "empty": torch.zeros(9, 0)}
    counts, begin, alone = [1, 5, 3], 0, []
    for count in counts:
        rows = slice(begin, begin + count)
        alone.append(checksum(Batch(x[rows], {name: each[rows] for name, each in y.items()}, count)))
        begin += count
    assert checksums(Batch(x, y, 9), counts) == alone
    assert len(set(alone)) == 3


@pytest.mark.parametrize(
    ("draw", "same_again"),
    [
        (random.random, True),
        (np.random.rand, True),
        (lambda: torch.rand(()).item(), True),
        (np.random.default_rng().random, False),
    ],
)
def test_augmentation_by_the_global_generators_is_drawn_alike_in_any_process(draw, same_again):
    examples = Examples(Rows(lambda i: (X[i] + draw(), Y[i])))
    sums = []
    for _ in range(2):
        draw()
        with seeded(5, CPU):
            sums.append(checksum(examples.batch(ROWS)))
    assert (sums[0] == sums[1]) is same_again
