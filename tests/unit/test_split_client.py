"""The client: which examples it draws, from every kind of dataset, and what it says of them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from psl_flower import SplitClient
from psl_flower.client.part import ClientPart
from psl_flower.client.process import RunState
from psl_flower.client.runtime import answer
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.methods import ParallelSplit
from psl_flower.protocol import Kind, Leaf, Orders, Request, Weights, WorkOrder

N, CLASSES = 23, 4
IMAGES = torch.arange(N * 6, dtype=torch.float32).reshape(N, 6)
LABELS = torch.from_numpy(np.random.default_rng(0).integers(0, CLASSES - 1, N))  # the last class has no example
LABELS[5] = CLASSES - 2


class GetBatch:
    """Offers the fastest way; reading it one by one is an error."""

    def __init__(self):
        self.targets = LABELS.tolist()

    def __len__(self):
        return N

    def __getitem__(self, index):
        raise AssertionError("get_batch is there to be used")

    def get_batch(self, indices):
        assert isinstance(indices, np.ndarray)
        return IMAGES[torch.from_numpy(indices)], LABELS[torch.from_numpy(indices)]


class GetItems(Dataset):
    """Offers torch's batched fetch."""

    labels = LABELS.numpy()

    def __len__(self):
        return N

    def __getitems__(self, indices):
        assert all(type(i) is int for i in indices)
        return [(IMAGES[i], int(LABELS[i])) for i in indices]


class OneByOne(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        assert type(index) is int
        return IMAGES[index], int(LABELS[index])


DATASETS = {
    "get_batch": GetBatch(),
    "TensorDataset": TensorDataset(IMAGES, LABELS),
    "__getitems__": GetItems(),
    "map-style": OneByOne(),
    "list of tuples": [(x, int(y)) for x, y in zip(IMAGES, LABELS, strict=True)],
    "list of numpy": [(x.numpy(), np.int64(y)) for x, y in zip(IMAGES, LABELS, strict=True)],
    "Subset without labels listed": Subset(OneByOne(), range(N)),
    "Subset": Subset(TensorDataset(IMAGES.flip(0), LABELS.flip(0)), range(N - 1, -1, -1)),
}


def half():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(6, 5)


def answered(one, order, module=None, gradient=None):
    """Return what a client answers to a work order: its rows, or its gradients for a gradient of them."""
    module, state = module or half(), RunState()
    state.parts = {"head": ClientPart("head", module, torch.device("cpu"))}
    weights = Weights({n: p.detach() for n, p in module.named_parameters()}, {}, "v", "c")
    by_class = {name: getattr(order, name) for name in ("class_starts", "class_counts")}
    orders = Orders(
        clients=np.array([order.client]),
        starts=np.array([order.start]),
        counts=np.array([order.count]),
        seed=order.seed,
        epoch=order.epoch,
        step=order.step,
        test=order.test,
        **{name: None if table is None else table[None] for name, table in by_class.items()},
    )
    inputs = {} if gradient is None else {"gradient": Leaf(Kind.ROWS, gradient)}
    stage = "forward" if gradient is None else "backward"
    request = Request(stage=stage, nodes=(1,), orders=orders, weights={"head": weights}, inputs=inputs)
    reply = answer(ParallelSplit(), state, lambda node, config: one, request)
    if reply.failures:
        raise AssertionError(reply.failures[1].detail)
    return {name: leaf.value for name, leaf in reply.parts[0].outputs.items()}


def order(start=0, count=1, *, seed=11, epoch=3, step=2, client=6, by_class=None, test=False):
    starts, counts = (None, None) if by_class is None else (np.array(part) for part in by_class)
    count = count if counts is None else int(counts.sum())
    return WorkOrder(
        client=client,
        seed=seed,
        epoch=epoch,
        step=step,
        start=start,
        count=count,
        class_starts=starts,
        class_counts=counts,
        test=test,
    )


def client(train=DATASETS["TensorDataset"], test=None, cls=SplitClient, **options):
    return cls(train, test, **options)


def epoch_order(seed=11, epoch=3, k=6):
    """The rule of the protocol, written out."""
    return np.random.default_rng([seed, epoch, k]).permutation(N)


# --- drawing ---------------------------------------------------------------------------------------------------------
def test_draws_a_slice_of_the_epochs_permutation():
    drawn = client().draw(order(5, 7))
    np.testing.assert_array_equal(drawn, epoch_order()[5:12])
    assert drawn.dtype == np.int64


@pytest.mark.parametrize("other", [{"seed": 12}, {"epoch": 4}, {"client": 7}])
def test_seed_epoch_and_client_each_give_another_permutation(other):
    one = client()
    before = one.draw(order(0, N)).copy()
    after = one.draw(order(0, N, **other))
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(one.draw(order(0, N)), before)  # and back: no state
    assert sorted(after) == list(range(N))


def test_the_step_does_not_change_the_permutation():
    np.testing.assert_array_equal(client().draw(order(2, 4, step=0)), client().draw(order(2, 4, step=9)))


def test_draws_by_class_follow_the_class_subsequences():
    one, used = client(), np.zeros(CLASSES, dtype=int)
    of_class = {c: [i for i in epoch_order() if LABELS[i] == c] for c in range(CLASSES)}
    sizes = [len(of_class[c]) for c in range(CLASSES)]
    assert sizes[-1] == 0
    assert min(sizes[:-1]) > 2
    drawn = []
    for counts in ([2, 0, 1, 0], [0, 3, 1, 0], np.array(sizes) - [2, 3, 2, 0]):
        counts = np.array(counts)
        batch = one.draw(order(by_class=(used, counts)))
        expected = [i for c in range(CLASSES) for i in of_class[c][used[c] : used[c] + counts[c]]]
        np.testing.assert_array_equal(batch, expected)
        drawn += batch.tolist()
        used = used + counts
    assert sorted(drawn) == list(range(N))


def test_classes_the_client_does_not_hold_may_be_named_with_nothing_asked():
    batch = client().draw(order(by_class=([0] * 9, [1, 1, 0, 0, 0, 0, 0, 0, 0])))
    assert LABELS[batch].tolist() == [0, 1]
    assert LABELS[client().draw(order(by_class=([0], [2])))].tolist() == [0, 0]  # fewer than it holds


@pytest.mark.parametrize(("start", "count"), [(0, N + 1), (N, 1), (N - 1, 2), (0, 0), (3, -1), (-1, 1)])
def test_asking_for_more_than_there_is(start, count):
    with pytest.raises(ProtocolError, match=f"asked for {count} examples from {start} on, of {N}"):
        client().draw(order(start, count))


@pytest.mark.parametrize(
    ("starts", "counts", "message"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 1], "asked for 1 examples of class 3 from 0 on, of 0"),
        ([0, 99, 0, 0], [1, 1, 0, 0], "asked for 1 examples of class 1 from 99 on, of "),
        ([0, 0, 0, 0], [2, -1, 0, 0], "asked for -1 examples of class 1"),
        ([-1, 0, 0, 0], [1, 0, 0, 0], "asked for 1 examples of class 0 from -1"),
        ([0] * 6, [0, 0, 0, 0, 0, 1], "class 5 from 0 on, of 0"),
    ],
)
def test_asking_for_more_of_a_class_than_there_is(starts, counts, message):
    with pytest.raises(ProtocolError, match=message):
        client().draw(order(by_class=(starts, counts)))


def test_class_counts_must_add_up():
    wrong = WorkOrder(
        client=0, seed=0, epoch=0, step=0, start=0, count=3, class_starts=np.zeros(2, int), class_counts=np.ones(2, int)
    )
    with pytest.raises(ProtocolError, match="2 in all classes, 3 in the order"):
        client().draw(wrong)


# --- datasets --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", DATASETS)
def test_every_kind_of_dataset_gives_the_same_batch(kind):
    sent = answered(client(DATASETS[kind]), order(4, 6))
    rows = epoch_order()[4:10]
    torch.testing.assert_close(sent["activations"], half()(IMAGES[rows]))
    assert sent["labels"].tolist() == LABELS[rows].tolist()
    assert sent["labels"].dtype == torch.int64


@pytest.mark.parametrize("kind", DATASETS)
def test_every_kind_of_dataset_tells_its_labels(kind):
    one = client(DATASETS[kind])
    np.testing.assert_array_equal(one.labels(one.train), LABELS)
    description = one.describe(label_counts=True)
    np.testing.assert_array_equal(description.labels, np.unique(LABELS))
    np.testing.assert_array_equal(description.counts, np.bincount(LABELS)[np.unique(LABELS)])
    description.check(label_counts=True)


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, a, b):
            return self.linear(a) + b

    module, extra = Two(), torch.randn(N, 5)
    rows = epoch_order()[:3]
    for dataset in (
        TensorDataset(IMAGES, extra, LABELS),
        [((IMAGES[i], extra[i]), int(LABELS[i])) for i in range(N)],
    ):
        sent = answered(client(dataset), order(0, 3), module)
        torch.testing.assert_close(sent["activations"], module(IMAGES[rows], extra[rows]))
        assert sent["labels"].tolist() == LABELS[rows].tolist()


@pytest.mark.parametrize("data", [None, 3, iter([1]), (x for x in [])])
def test_what_is_no_dataset_is_refused(data):
    rule = r"must be a map-style dataset \(with __len__ and __getitem__\)"
    with pytest.raises(ConfigError, match=f"the training data {rule}"):
        client(data)
    if data is not None:
        with pytest.raises(ConfigError, match=f"the test data {rule}"):
            client(test=data)


def test_rows_of_dicts_are_arguments_by_name():
    """What other forms there are is the business of the tests of `Examples`."""
    batch = client([{"img": IMAGES[i], "id": i, "label": int(LABELS[i])} for i in range(N)]).draw_batch(order(0, 3))
    rows = epoch_order()[:3]
    assert torch.equal(batch.inputs["img"], IMAGES[rows])
    assert batch.inputs["id"].tolist() == rows.tolist()
    assert batch.target.tolist() == LABELS[rows].tolist()


@pytest.mark.parametrize(
    "labels", [LABELS.float(), torch.stack([LABELS, LABELS], dim=1), LABELS[:-1].tolist(), ["cat"] * N, [-1] * N]
)
def test_listed_labels_that_are_not_the_examples_are_not_believed(labels):
    dataset = GetBatch()
    dataset.targets = labels
    assert client(dataset).describe(label_counts=False).labels is None
    np.testing.assert_array_equal(client(dataset).describe(label_counts=True).labels, np.unique(LABELS))


@pytest.mark.parametrize("labels", [LABELS.float(), torch.stack([LABELS, LABELS], dim=1)])
def test_labels_that_are_no_classes_are_refused_where_classes_are_needed(labels):
    dataset = TensorDataset(IMAGES, labels)
    assert client(dataset).describe(label_counts=False).labels is None
    with pytest.raises(ConfigError, match=r"this sampler plans by class: .* one whole number"):
        client(dataset).describe(label_counts=True)


def test_negative_labels_are_refused_where_classes_are_needed():
    with pytest.raises(ConfigError, match="labels must not be negative, got -1"):
        client(TensorDataset(IMAGES, LABELS * 0 - 1)).describe(label_counts=True)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((IMAGES[:2], LABELS[:2]), "Short.batch was asked for 3 examples, it returned 2"),
        ((IMAGES[:3], LABELS[:2]), "batch rows come first in every tensor"),
        (("text", LABELS[:3]), "inputs must be a tensor, or a tuple or dict of tensors, got 'text'"),
    ],
)
def test_a_batch_of_ones_own_is_looked_at(returned, message):
    class Short(SplitClient):
        def batch(self, dataset, indices):
            return returned

    with pytest.raises(ConfigError, match=message):
        client(cls=Short).draw_batch(order(0, 3))


def test_reading_labels_leaves_torchs_generator_alone():
    class Noisy(OneByOne):
        def __getitem__(self, index):
            return IMAGES[index] + torch.randn(6), int(LABELS[index])

    state = torch.get_rng_state()
    client(Noisy()).describe(label_counts=True)
    assert torch.equal(torch.get_rng_state(), state)


# --- describe --------------------------------------------------------------------------------------------------------
def test_description_says_what_was_asked_for_and_no_more():
    description = client(test=TensorDataset(IMAGES[:4], LABELS[:4]), partition_id=6).describe(label_counts=False)
    assert (description.partition_id, description.num_examples, description.num_test_examples) == (6, N, 4)
    assert description.labels is description.counts is None


def test_a_client_without_data_describes_itself():
    description = client([], partition_id=0).describe(label_counts=True)
    assert (description.num_examples, description.num_test_examples) == (0, 0)
    assert description.labels.tolist() == description.counts.tolist() == []
    description.check(label_counts=True)


# --- a step ----------------------------------------------------------------------------------------------------------
class Augmented(OneByOne):
    """Every fetch is another draw from torch's generator."""

    def __getitem__(self, index):
        return IMAGES[index] + torch.randn(6), int(LABELS[index])


def test_augmentation_follows_the_order_alone():
    made = [answered(client(Augmented()), order(0, 4))["activations"] for _ in range(2)]
    assert torch.equal(*made)
    plain = answered(client(), order(0, 4))["activations"]
    assert not torch.equal(made[0], plain)
    for other in ({"seed": 12}, {"epoch": 4}, {"step": 3}, {"client": 7}):
        noise = answered(client(Augmented()), order(0, 4, **other))["activations"]
        clean = answered(client(), order(0, 4, **other))["activations"]
        assert not torch.allclose(noise - clean, made[0] - plain, atol=1e-3), other


def test_torchs_generator_is_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = client(Augmented(), Augmented())
    answered(one, order(0, 4))
    answered(one, order(0, 4, test=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_by_name_are_arguments_by_name():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, mask, image):
            return self.linear(image) * mask

    module, masks = ByName(), torch.rand(N, 1)
    dataset = [({"image": IMAGES[i], "mask": masks[i]}, int(LABELS[i])) for i in range(N)]
    rows = epoch_order()[:3]
    torch.testing.assert_close(
        answered(client(dataset), order(0, 3), module)["activations"], module(masks[rows], IMAGES[rows])
    )


def test_gradients_are_those_of_the_examples():
    g = torch.randn(4, 5)
    gradients = answered(client(), order(0, 4), gradient=g)["head"]
    torch.testing.assert_close(gradients["weight"], g.T @ IMAGES[epoch_order()[:4]])
    torch.testing.assert_close(gradients["bias"], g.sum(0))


# --- evaluation ------------------------------------------------------------------------------------------------------
def test_evaluation_takes_test_examples_in_their_own_order():
    module = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5))
    one = client(test=TensorDataset(IMAGES[10:], LABELS[10:]))
    sent = answered(one, order(2, 5, test=True), module)
    assert sent["labels"].tolist() == LABELS[12:17].tolist()
    torch.testing.assert_close(sent["activations"], module[0](IMAGES[12:17]))
    assert not sent["activations"].requires_grad


@pytest.mark.parametrize(("start", "count"), [(0, 5), (4, 1), (3, 2)])
def test_asking_for_test_examples_that_are_not_there(start, count):
    with pytest.raises(ProtocolError, match=f"asked for {count} test examples from {start} on, of 4"):
        client(test=TensorDataset(IMAGES[:4], LABELS[:4])).draw_batch(order(start, count, test=True))
    with pytest.raises(ProtocolError, match="of 0"):
        client().draw_batch(order(0, 1, test=True))


# --- subclassing -----------------------------------------------------------------------------------------------------
class Negative(SplitClient):
    """Makes its own batches and runs its own forward pass."""

    def batch(self, dataset, indices):
        batch = super().batch(dataset, indices)
        return -batch.inputs, batch.target + 1

    def forward(self, half, inputs):
        return half(inputs), half(inputs * 2)

    def labels(self, dataset):
        return np.asarray(LABELS) + 1


def test_a_subclass_overrides_batch_labels_and_forward():
    one, rows = client(cls=Negative), epoch_order()[:3]
    sent = answered(one, order(0, 3))
    torch.testing.assert_close(sent["activations"][0], half()(-IMAGES[rows]))
    torch.testing.assert_close(sent["activations"][1], half()(-2 * IMAGES[rows]))
    assert sent["labels"].tolist() == (LABELS[rows] + 1).tolist()
    assert one.describe(label_counts=True).labels[0] == 1
    g = torch.ones(3, 5)
    gradients = answered(one, order(0, 3), gradient=(g, g))["head"]
    torch.testing.assert_close(gradients["weight"], -3 * g.T @ IMAGES[rows])


def test_a_subclass_sees_its_config():
    assert client(config={"lr": 1}, cls=Negative).config == {"lr": 1}
