"""Losses as sum and weight: parts that are added up equal the loss of all of them pooled."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from psl_flower.devices import seeded
from psl_flower.errors import ConfigError, LabelError
from psl_flower.server import Reduction, weighted

CLASSES = 4
WEIGHT = torch.tensor([0.5, 1.0, 3.0, 0.25], dtype=torch.float64)
SIZES = [3, 1, 6, 2]


def generator():
    return torch.Generator().manual_seed(0)


def rows_of(*shape):
    return torch.randn(sum(SIZES), *shape, dtype=torch.float64, generator=generator())


def classes(*shape, ignored=None, mark=-100):
    labels = torch.randint(0, CLASSES, (sum(SIZES), *shape), generator=generator())
    if ignored == "some":
        labels[torch.rand(labels.shape, generator=generator()) < 0.4] = mark
        labels[3] = mark  # a client with nothing to count
    return labels


def summed(loss, outputs, labels, **options):
    """Return the loss of the clients' parts, added up, and the weights."""
    parts = zip(outputs.split(SIZES), labels.split(SIZES), strict=True)
    found = [weighted(loss, o, y, len(y), **options) for o, y in parts]
    return sum(f.sum for f in found) / sum(f.weight for f in found), [f.weight for f in found]


def wrapped(outputs, labels):
    loss = F.cross_entropy(outputs, labels, ignore_index=-100)
    return 0.5 * loss + 0.1


def flattened(outputs, labels):
    """Classes last, as Hugging Face's models have them."""
    return F.cross_entropy(outputs.transpose(1, 2).reshape(-1, CLASSES), labels.reshape(-1), weight=WEIGHT)


def by_hand(outputs, labels):
    mask = labels != -100
    each = F.cross_entropy(outputs, labels, reduction="none")
    return (each * mask).sum() / mask.sum()


def selected(outputs, labels):
    return -F.log_softmax(outputs, 1).gather(1, labels.clamp(min=0)[:, None])[:, 0][labels != -100].mean()


def counted_in_python(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="sum") / max(1, (labels != -100).sum().item())


def clamped(outputs, labels):
    mask = (labels != -100).to(outputs)
    each = F.cross_entropy(outputs, labels, reduction="none")
    return (each * mask).sum() / mask.sum().clamp(min=1)


CASES = {
    "plain": (F.cross_entropy, (), None),
    "module": (nn.CrossEntropyLoss(), (), "some"),
    "function": (F.cross_entropy, (), "some"),
    "wrapper": (wrapped, (), "some"),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), (), None),
    "class weights, ignored": (nn.CrossEntropyLoss(weight=WEIGHT), (5,), "some"),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2, weight=WEIGHT), (), "some"),
    "nll": (lambda o, y: F.nll_loss(F.log_softmax(o, 1), y, weight=WEIGHT), (), "some"),
    "nll module": (lambda o, y: nn.NLLLoss()(o.log_softmax(1), y), (), "some"),
    "tokens": (flattened, (5,), "some"),
    "tokens by hand": (by_hand, (5,), "some"),
    "clamped": (clamped, (5,), "some"),
    "counted in Python": (lambda o, y: 3 * counted_in_python(o, y), (5,), "some"),
    "selected": (selected, (5,), "some"),
    "both by hand": (lambda o, y: 2 * by_hand(o, y) + by_hand(-o, y) / 4, (5,), "some"),
    "an auxiliary head": (lambda o, y: F.cross_entropy(o, y) + 0.3 * F.cross_entropy(-o, y), (), "some"),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_add_up_to_the_pooled_loss(case):
    loss, shape, ignored = CASES[case]
    outputs, labels = rows_of(CLASSES, *shape), classes(*shape, ignored=ignored)
    found, weights = summed(loss, outputs, labels)
    assert found == pytest.approx(loss(outputs, labels).item(), rel=1e-12)
    if ignored:
        assert weights[1] == 0
        means = [loss(o, y).item() for o, y in zip(outputs.split(SIZES), labels.split(SIZES), strict=True)]
        assert math.isnan(means[1]) or not means[1]  # the mean of means is none, or another


def test_another_ignore_index_and_probabilities():
    outputs, labels = rows_of(CLASSES, 5), classes(5, ignored="some", mark=255)
    found, _ = summed(nn.CrossEntropyLoss(ignore_index=255), outputs, labels)
    assert found == pytest.approx(F.cross_entropy(outputs, labels, ignore_index=255).item(), rel=1e-12)
    targets = rows_of(CLASSES).softmax(1)
    found, weights = summed(nn.CrossEntropyLoss(weight=WEIGHT), outputs[..., 0], targets)
    assert found == pytest.approx(F.cross_entropy(outputs[..., 0], targets, weight=WEIGHT).item(), rel=1e-12)
    assert weights == SIZES


def test_sequences_of_uneven_lengths_count_by_their_targets():
    lengths = [2, 7, 3, 4]
    parts = [
        (torch.randn(n, CLASSES, t, dtype=torch.float64), torch.randint(0, CLASSES, (n, t)))
        for n, t in zip(SIZES, lengths, strict=True)
    ]
    found = [weighted(F.cross_entropy, o, y, len(y)) for o, y in parts]
    logits = torch.cat([o.transpose(1, 2).reshape(-1, CLASSES) for o, _ in parts])
    pooled = F.cross_entropy(logits, torch.cat([y.flatten() for _, y in parts]))
    assert sum(f.sum for f in found) / sum(f.weight for f in found) == pytest.approx(pooled.item(), rel=1e-12)


@pytest.mark.parametrize(
    "loss", [F.mse_loss, nn.L1Loss(), lambda o, y: (o - y).square().mean(), lambda o, y: F.huber_loss(o, y) / 4]
)
def test_regression(loss):
    outputs, labels = rows_of(2), rows_of(2).flip(0)
    found, _ = summed(loss, outputs, labels)
    assert found == pytest.approx(loss(outputs, labels).item(), rel=1e-12)


def test_losses_that_count_differently_weigh_by_examples():
    def both(outputs, labels):
        return F.cross_entropy(outputs, labels) + F.cross_entropy(-outputs, labels, weight=WEIGHT)

    assert summed(both, rows_of(CLASSES), classes())[1] == SIZES
    assert summed(F.mse_loss, rows_of(2), rows_of(2))[1] == [2 * size for size in SIZES]  # elements
    # what is divided by a constant, or by a parameter, is not counted by it
    temperature = torch.tensor(2.0, requires_grad=True)
    assert summed(lambda o, y: F.mse_loss(o, y) / temperature / 2, rows_of(2), rows_of(2))[1] == SIZES


def test_a_broken_loss_stays_visible():
    found = weighted(lambda o, y: F.mse_loss(o, y).log() * math.nan, torch.ones(3, 1), torch.zeros(3, 1), 3)
    assert found.weight == 3
    assert math.isnan(found.sum)


def test_the_mean_is_the_users_own_with_its_graph():
    outputs, labels = rows_of(CLASSES).requires_grad_(), classes()
    found = weighted(wrapped, outputs, labels, len(labels))
    found.mean.backward()
    gradient, outputs.grad = outputs.grad, None
    wrapped(outputs, labels).backward()
    assert torch.equal(gradient, outputs.grad)


# --- what is classification ------------------------------------------------------------------------------------------
def test_cross_entropy_tells_what_is_predicted_whatever_the_shapes():
    outputs, labels = rows_of(CLASSES, 5), classes(5, ignored="some")
    counted = labels != -100
    expected = (int(((outputs.argmax(1) == labels) & counted).sum()), int(counted.sum()))
    assert weighted(F.cross_entropy, outputs, labels, 12).predictions.score() == expected
    last = {"logits": outputs.transpose(1, 2)}
    found = weighted(lambda o, y: F.cross_entropy(o["logits"].reshape(-1, CLASSES), y.flatten()), last, labels, 12)
    assert found.predictions.score() == expected
    assert found.predictions.class_counts().tolist() == torch.bincount(labels[counted], minlength=CLASSES).tolist()


def test_of_two_heads_the_main_one_is_scored():
    outputs, labels = rows_of(CLASSES), classes()
    found = weighted(lambda o, y: 0.3 * F.cross_entropy(-o, y) + F.cross_entropy(o, y), outputs, labels, 12)
    assert found.predictions.score() == (int((outputs.argmax(1) == labels).sum()), 12)


def test_targets_that_are_not_the_labels_are_not_scored():
    """In-batch contrast: which row belongs to which is no class of the data."""

    def contrast(outputs, labels):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    found = weighted(contrast, rows_of(sum(SIZES)), classes(), 12)
    assert found.predictions is None
    assert found.weight == 12


def test_other_losses_are_told_by_shapes():
    def focal(outputs, labels):
        p = outputs.softmax(1).gather(1, labels[:, None])[:, 0]
        return -((1 - p) ** 2 * p.log()).mean()

    outputs, labels = rows_of(CLASSES), classes()
    assert weighted(focal, outputs, labels, 12).predictions.score()[1] == 12
    assert weighted(focal, outputs, labels, 12, classify=False).predictions is None


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [((12, 5), (12, 5)), ((5, 5), (5, 5)), ((12, 1), (12, 1)), ((12, 1), (12,)), ((12,), (12,))],
    ids=["labels of several classes", "as many rows as classes", "one logit", "one logit, flat labels", "flat"],
)
def test_binary_cross_entropy_is_not_scored_by_classes(outputs, labels):
    def loss(o, y):
        return F.binary_cross_entropy_with_logits(o.reshape(y.shape), y.float())

    ones = torch.ones(labels, dtype=torch.long)
    assert weighted(loss, torch.randn(outputs), ones, labels[0]).predictions is None


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("loss", "outputs", "labels", "rows"),
    [
        (F.cross_entropy, (4, 3), [0, 3, 1, -1], (1, 3)),
        (nn.CrossEntropyLoss(ignore_index=7), (4, 3), [7, 0, -100, 2], (2,)),
        (lambda o, y: F.cross_entropy(o.view(-1, 3), y.view(-1)), (2, 2, 3), [[0, 1], [1, 5]], (1,)),
        (lambda o, y: o.log_softmax(1)[range(len(y)), y].neg().mean(), (3, 3), [0, -1, 1], (1,)),  # -1: the last
        (lambda o, y: o.gather(1, y[:, None]).mean(), (3, 3), [0, 3, 1], (1,)),  # raises by itself
    ],
)
def test_labels_out_of_range_are_named_by_their_rows(loss, outputs, labels, rows):
    labels = torch.tensor(labels)
    with pytest.raises(LabelError, match="class indices from 0 to 2, as the model has 3 outputs") as error:
        weighted(loss, torch.randn(outputs), labels, len(labels))
    assert error.value.rows == rows


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), r"got shape \(3,\)"),
        (lambda o, y: 0.5, "got float"),
    ],
)
def test_a_loss_that_is_no_mean_is_refused(loss, expected):
    with pytest.raises(ConfigError, match=f"the loss must be the mean over the batch.*{expected}"):
        weighted(loss, torch.randn(3, 4), torch.zeros(3, dtype=torch.long), 3)


def test_what_a_loss_raises_by_itself_comes_through():
    with pytest.raises(KeyError, match="mine"):
        weighted(lambda o, y: {}["mine"], torch.randn(3, 4), torch.zeros(3, dtype=torch.long), 3)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    "loss", [F.mse_loss, lambda o, y: F.l1_loss(input=o, target=y), lambda o, y: (y - o).square().mean()]
)
def test_outputs_and_labels_that_torch_spreads_over_each_other_are_told(loss):
    outputs, labels = torch.randn(5, 1), torch.randn(5)
    assert "spreads to (5, 5)" in weighted(loss, outputs, labels, 5).remark
    assert weighted(loss, outputs, labels[:, None], 5).remark is None
    assert weighted(lambda o, y: loss(o[:, 0], y), outputs, labels, 5).remark is None
    assert weighted(loss, outputs[:1], labels[:1], 1).remark is None


# --- sums ------------------------------------------------------------------------------------------------------------
SUMS = {
    "cross-entropy": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "module": nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
    "by hand": lambda o, y: F.cross_entropy(o, y, reduction="none").sum(),
    "scaled": lambda o, y: F.cross_entropy(o, y, reduction="sum") / 1000,
    "regression": lambda o, y: F.mse_loss(o[:, 0], y.to(o), reduction="sum"),
}


@pytest.mark.parametrize("case", SUMS)
def test_sums_are_told_from_means(case):
    loss, outputs, labels, reduction = SUMS[case], rows_of(CLASSES), classes(), Reduction()
    parts = list(zip(outputs.split(SIZES), labels.split(SIZES), strict=True))
    found = [weighted(loss, o, y, len(y), reduction=reduction) for o, y in parts]
    assert all(each.summed for each in found)
    assert sum(each.sum for each in found) == pytest.approx(loss(outputs, labels).item(), rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda o, y: (o[:, 0] - y).square().mean(),
        lambda o, y: (o[:, 0] - y).abs().sum() / len(y),
        lambda o, y: -torch.log_softmax(o @ o.T, 1).diagonal().mean(),  # contrastive: it is of the batch
        lambda o, y: F.cross_entropy(o, y, reduction="sum") + 1.0,
    ],
)
def test_means_are_no_sums(loss):
    assert not weighted(loss, rows_of(CLASSES), classes(), sum(SIZES), reduction=Reduction()).summed


def test_what_asking_draws_is_put_back():
    def loss(outputs, labels):
        kept = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return (outputs[:, 0] - labels).square().sum() * (1 + 1e-9 * kept)

    following = []
    for reduction in (None, Reduction()):
        with seeded(0, torch.device("cpu")):
            found = weighted(loss, rows_of(CLASSES), classes(), sum(SIZES), reduction=reduction)
            following.append((torch.rand(()).item(), random.random(), np.random.rand()))  # noqa: NPY002
    assert found.summed
    assert following[0] == following[1]


def test_what_a_loss_does_is_asked_once():
    sizes, reduction = [], Reduction()

    def loss(outputs, labels):
        sizes.append(len(outputs))
        return (outputs[:, 0] - labels).square().sum()

    zero = torch.zeros(2, CLASSES)
    assert not weighted(loss, zero, zero[:, 0], 2, reduction=reduction).summed  # 0 tells nothing
    for _ in range(2):
        assert weighted(loss, zero + 1, zero[:, 0], 2, reduction=reduction).summed
    assert sizes == [2, 2, 2]  # a copy was


def test_a_loss_that_takes_no_other_batch_is_a_mean():
    def loss(outputs, labels):
        assert len(outputs) == 5
        return (outputs[:, 0] - labels).square().sum()

    assert not weighted(loss, torch.ones(5, 2), torch.zeros(5), 5, reduction=Reduction()).summed


@pytest.mark.parametrize(
    ("labels", "outputs", "options", "remedy"),
    [
        (classes().double(), rows_of(CLASSES), {}, r"labels.long\(\)"),
        (classes() > 1, rows_of(CLASSES), {}, r"labels.long\(\)"),
        (classes(1), rows_of(CLASSES), {}, r"labels.squeeze\(1\)"),
        (classes(1, 2, 2), rows_of(CLASSES, 2, 2), {}, r"labels.squeeze\(1\)"),
        (F.one_hot(classes(), CLASSES), rows_of(CLASSES), {}, r"labels.float\(\), or class indices"),
        (rows_of(1), rows_of(1), {}, "Over one class it is 0, .*mse_loss"),
        (classes(), rows_of(CLASSES), {"weight": WEIGHT.float()}, r"weight.to\(torch.float64\)"),
        (classes(), rows_of(CLASSES), {"weight": WEIGHT[:3]}, "a weight for each of the 4 classes"),
    ],
)
def test_what_cross_entropy_cannot_take(labels, outputs, options, remedy):
    with pytest.raises(ConfigError, match=f"cross_entropy cannot take these: outputs are .*{remedy}"):
        weighted(nn.CrossEntropyLoss(**options), outputs, labels, len(labels))


def test_one_class_of_a_part_of_the_outputs():
    """Groups of classes with a loss each: that of a group of one is rightly 0."""

    def loss(outputs, labels):
        alone, others = outputs.split([1, CLASSES - 1], 1)
        return F.cross_entropy(alone, torch.zeros_like(labels)) + F.cross_entropy(others, labels % (CLASSES - 1))

    outputs, labels = rows_of(CLASSES), classes()
    expected = F.cross_entropy(outputs[:, 1:], labels % (CLASSES - 1))
    torch.testing.assert_close(weighted(loss, outputs, labels, sum(SIZES)).mean, expected, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="Over one class it is 0"):
        weighted(lambda o, y: F.cross_entropy(o["logits"].float(), y), {"logits": rows_of(1)}, classes(), sum(SIZES))


def test_cross_entropy_of_several_outputs():
    pair = rows_of(CLASSES), rows_of(CLASSES)
    with pytest.raises(ConfigError, match=r"outputs are a tuple of 2 and labels int64 \(12,\): pick them"):
        weighted(F.cross_entropy, pair, classes(), sum(SIZES))
    with pytest.raises(ConfigError, match="the model returns None: is a return statement missing"):
        weighted(F.cross_entropy, None, classes(), sum(SIZES))
    with pytest.raises(ConfigError, match=r"outputs are int64 \(12,\) .*Return a number a class \(logits\)"):
        weighted(F.cross_entropy, classes(), classes(), sum(SIZES))


def test_class_weights_under_autocast():
    """It turns both into float32."""
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted(
            lambda o, y: F.cross_entropy(o, y, WEIGHT.float()), rows_of(CLASSES).bfloat16(), classes(), sum(SIZES)
        )
    assert found.mean.dtype is torch.float32


HALF = torch.full((4, 1), 0.5)


@pytest.mark.parametrize(
    ("loss", "outputs", "labels", "remedy"),
    [
        (F.binary_cross_entropy_with_logits, HALF, HALF[:, 0], r"labels\[:, None\], or outputs\.squeeze\(1\)"),
        (F.binary_cross_entropy_with_logits, HALF.repeat(1, 2), HALF, "one shape: a label an output"),
        (torch.nn.BCEWithLogitsLoss(), HALF, torch.ones(4, 1, dtype=torch.long), r"labels\.to\(torch\.float32\)"),
        (F.binary_cross_entropy, 4 * HALF, HALF, r"from 0 to 1: outputs\.sigmoid\(\), or .*_with_logits"),
    ],
)
def test_what_a_binary_cross_entropy_cannot_take_is_told_with_the_remedy(loss, outputs, labels, remedy):
    with pytest.raises(ConfigError, match=rf"binary_cross_entropy\w* cannot take these: outputs are .*{remedy}"):
        weighted(loss, outputs, labels, 4)


@pytest.mark.parametrize(
    ("loss", "meant", "seldom_meant", "told"),
    [
        (F.cross_entropy, 2 * torch.eye(4), torch.eye(4).softmax(1), "takes logits"),
        (torch.nn.NLLLoss(), torch.eye(4).log_softmax(1), torch.eye(4), "takes log-probabilities"),
        (lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], (y > 0).float()), torch.eye(4), None, ""),
        (lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.float()), None, torch.eye(4), "labels from 0 to 1"),
        (
            lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y - 1.0, reduction="none")[y > 0][:1].mean(),
            torch.eye(4),
            None,
            "",
        ),
    ],
)
def test_what_is_seldom_meant_is_told(loss, meant, seldom_meant, told):
    for outputs in (meant, seldom_meant):
        if outputs is not None:
            remark = weighted(loss, outputs, torch.arange(4), 4).remark
            assert (told in remark) if outputs is seldom_meant else remark is None
