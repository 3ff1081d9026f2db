"""Losses that are means over elements, of all rows at once or row by row: what they weigh."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from psl_flower.errors import ConfigError
from psl_flower.server import Reduction, adds_up, example_gradients, weighted

TAKE_WEIGHTS = [f for f in (F.mse_loss, F.l1_loss, F.huber_loss) if "weight" in inspect.signature(f).parameters]
SIZES = [1, 3, 6, 2]


def rows_of(*shape):
    return torch.randn(sum(SIZES), *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def of_some(loss, **options):
    """Return a loss of the outputs whose label is above 0, and how many those are."""
    return lambda o, y: loss(o[y > 0], y[y > 0], **options)


def of_above(loss, outputs, labels):
    return loss(outputs, labels, weight=(labels > 0).float())


@pytest.mark.parametrize(
    ("loss", "counts"),
    [
        (of_some(F.mse_loss), True),
        (of_some(F.l1_loss, reduction="mean"), True),
        (of_some(F.binary_cross_entropy_with_logits, weight=torch.tensor(2.0)), True),
        (of_some(nn.SmoothL1Loss(beta=0.5)), True),
        (of_some(lambda o, y: F.mse_loss(o, y) + F.huber_loss(o, y) / 2), True),
        (lambda o, y: F.poisson_nll_loss(input=o[y > 0], target=y[y > 0]), True),
        (of_some(F.mse_loss, reduction="sum"), False),
        (of_some(F.mse_loss, size_average=False), False),
        (of_some(F.kl_div, reduction="batchmean"), True),
        (of_some(lambda o, y: F.gaussian_nll_loss(o, y, torch.ones_like(y))), True),
        (of_some(lambda o, y: F.soft_margin_loss(target=y.sign(), input=o)), True),
        *[(partial(of_above, each), True) for each in (F.mse_loss, F.l1_loss) if each in TAKE_WEIGHTS],
        (of_some(lambda o, y: torch.stack([F.mse_loss(o, y), F.l1_loss(o, y)]).mean()), True),
        (of_some(lambda o, y: torch.stack(dim=0, tensors=(F.mse_loss(o, y), F.l1_loss(o, y))).sum()), True),
        (of_some(lambda o, y: F.mse_loss(o, y).mean()), True),
    ],
)
def test_a_mean_over_elements_weighs_by_them(loss, counts):
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.rand(9, 2, generator=generator), torch.rand(9, 2, generator=generator) - 0.5
    parts = [weighted(loss, outputs[part], labels[part], len(labels[part])) for part in (slice(2), slice(2, 9))]
    assert [part.weight for part in parts] == (
        [int((labels[s] > 0).sum()) for s in (slice(2), slice(2, 9))] if counts else [2, 7]
    )
    if counts:
        pooled = sum(part.sum for part in parts) / sum(part.weight for part in parts)
        assert pooled == pytest.approx(loss(outputs, labels).item())
        assert weighted(loss, outputs, -labels.abs(), 9).weight == 0  # nothing counts


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("least", [-1, 0.5])
@pytest.mark.parametrize(
    "each",
    [
        F.mse_loss,
        lambda o, y: (o - y).square().mean(),
        lambda o, y: F.cross_entropy(torch.stack([o.sum(), -o.sum()])[None], y[:1].round().long()),
    ],
)
def test_means_of_single_examples_weigh_by_these(each, divide, least):
    def by_rows(outputs, labels):
        some = [y > least for y in labels]
        for one, y in zip(some, labels, strict=True):
            one[y.argmax()] = True
        terms = [each(o[one], y[one]) for o, y, one in zip(outputs, labels, some, strict=True)]
        return sum(terms) / (len(terms) if divide else 1)

    outputs, labels, reduction = rows_of(3), rows_of(3).roll(1, 0).sigmoid(), Reduction()
    parts = zip(outputs.split(SIZES), labels.split(SIZES), strict=True)
    found = [weighted(by_rows, o, y, len(y), reduction=reduction, classify=False) for o, y in parts]
    assert [part.weight for part in found] == SIZES
    assert {part.summed for part in found} == {not divide}
    total = sum(part.sum for part in found) / (sum(SIZES) if divide else 1)
    assert total == pytest.approx(by_rows(outputs, labels).item())
    assert adds_up(by_rows, outputs, labels, 12, found[0], reduction=reduction, classify=False)


def test_a_loss_of_zero_of_one_element_counts():
    nothing = torch.zeros(1, 1)
    assert weighted(F.mse_loss, nothing, nothing, 1).weight == 1
    assert weighted(lambda o, y: (o - y).abs().mean(), nothing, nothing, 1).weight == 1


def test_losses_are_what_they_are_without_being_watched():
    """Torch's l1_loss forgets its weight when a mode watches."""
    outputs, labels, weight = rows_of(2), rows_of(2).roll(1, 0), rows_of(2).square()
    for loss in TAKE_WEIGHTS:
        for options in ({"weight": weight}, {"weight": weight, "reduction": "sum"}, {}):
            found = weighted(lambda o, y: loss(o, y, **options), outputs, labels, 12)  # noqa: B023
            assert torch.equal(found.mean, loss(outputs, labels, **options))


def test_examples_alone_may_have_as_many_elements_each_and_no_more():
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.rand(4, 2, generator=generator).requires_grad_(), torch.rand(4, 2, generator=generator)
    whole = weighted(F.mse_loss, outputs, labels, 4)
    mean, gradients = example_gradients(F.mse_loss, outputs, labels, 4, whole)
    assert mean.mean.item() == pytest.approx(whole.mean.item())
    assert (whole.weight, mean.weight) == (8, 4)  # by examples, as clipping and noise do
    assert torch.allclose(gradients[0], torch.autograd.grad(whole.mean, outputs)[0])
    some = of_some(F.mse_loss)
    for signs in ([[1, 1], [1, -1], [1, -1]], [[1, 1], [1, 1], [1, 1], [1, -1], [-1, -1], [1, -1], [-1, -1], [1, 1]]):
        chosen, of = torch.tensor(signs).float(), torch.rand(len(signs), 2, generator=generator).requires_grad_()
        found = weighted(some, of, chosen, len(signs))  # 4 of 3 examples; 10 of 8
        with pytest.raises(ConfigError, match=r"the mean over the examples, got a mean over \d+ targets"):
            example_gradients(some, of, chosen, len(signs), found)
    chosen = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])  # 4 of 2, a multiple: one has none
    of = torch.rand(2, 4, generator=generator).requires_grad_()
    with pytest.raises(ConfigError, match="got a mean over 4 targets of 2 examples"):
        example_gradients(some, of, chosen, 2, weighted(some, of, chosen, 2))
    chosen[1, 0], chosen[0, 0] = 1.0, -1.0  # 3 and 1
    with pytest.raises(ConfigError, match="that of a batch differs from the mean"):
        example_gradients(some, of, chosen, 2, weighted(some, of, chosen, 2))
