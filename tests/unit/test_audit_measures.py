"""What an audit measures with: likeness of images, AUC, distance correlation, the Pareto front."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from psl_flower import privacy
from psl_flower.audit import audit
from psl_flower.audit.attacks import decoder
from psl_flower.audit.finding import Finding
from psl_flower.audit.frontier import draw_frontier, pareto_front
from psl_flower.audit.result import AuditResult, Case
from psl_flower.audit.scene import Rows, _groups
from psl_flower.audit.similarity import psnr, ssim
from psl_flower.audit.statistics import auc, interval, matched_accuracy, mean_auc, p_value
from psl_flower.privacy import corrected_distance_correlation

# --- images ----------------------------------------------------------------------------------------------------------
# structural_similarity(x, y, data_range=..., channel_axis=0) and peak_signal_noise_ratio of scikit-image 0.26.0
SSIM = [0.84656, 0.827743, 0.784884]
PSNR = [14.559658, 14.33215, 14.011911]
SSIM_OF_SMALL = [-0.140563, -0.021767]  # with win_size=5


def test_likeness_of_images_is_that_of_scikit_image():
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 2, (3, 2, 12, 9))
    others = images + rng.normal(0, 0.4, images.shape)
    pair = torch.from_numpy(images), torch.from_numpy(others)
    assert ssim(*pair, 2.0).tolist() == pytest.approx(SSIM, abs=1e-6)
    assert psnr(*pair, 2.0).tolist() == pytest.approx(PSNR, abs=1e-5)
    small = torch.from_numpy(rng.uniform(0, 1, (2, 1, 5, 6)))
    assert ssim(small, small.flip(2), 1.0).tolist() == pytest.approx(SSIM_OF_SMALL, abs=1e-6)
    assert ssim(small, small, 1.0).tolist() == pytest.approx([1, 1])
    assert psnr(small, small, 1.0).tolist() == pytest.approx([120, 120])


# --- telling apart ---------------------------------------------------------------------------------------------------
def test_auc_is_that_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, 200).astype(float), rng.random(200) < 0.3
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert auc(scores[labels], labels[labels]) == 0.5  # nothing to tell apart
    table, classes = rng.random((200, 4)), rng.integers(0, 3, 200)  # of class 3 there is none
    expected = np.mean([roc_auc_score(classes == c, table[:, c]) for c in range(3)])
    assert mean_auc(table, classes) == pytest.approx(expected)


def test_an_interval_holds_what_it_should_as_often_as_it_should():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        values = rng.normal(size=50)
        low, high = interval(lambda rows, of=values: float(of[rows].mean()), 50, rng, repeats=100)
        held += low <= 0 <= high
    assert 0.87 < held / 200 < 0.99


def test_clusters_are_named_in_the_best_way():
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert matched_accuracy(np.array([2, 2, 0, 0, 1, 1]), labels, 3) == 1.0
    assert matched_accuracy(np.array([0, 0, 0, 0, 0, 1]), labels, 3) == 0.5
    assert p_value(0.9, np.array([0.1, 0.9, 0.3])) == 0.5


# --- distance correlation --------------------------------------------------------------------------------------------
def definition(x, y):
    """Return the bias-corrected squared distance correlation, written from Szekely and Rizzo 2013, definition 2."""
    n = len(x)

    def centred(values):
        a = [[float(np.linalg.norm(values[i] - values[j])) for j in range(n)] for i in range(n)]
        rows, total = [sum(row) for row in a], sum(map(sum, a))
        return [
            [0.0 if i == j else a[i][j] - (rows[i] + rows[j]) / (n - 2) + total / ((n - 1) * (n - 2)) for j in range(n)]
            for i in range(n)
        ]

    def product(a, b):
        return sum(a[i][j] * b[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 3))

    a, b = centred(x), centred(y)
    return product(a, b) / (product(a, a) * product(b, b)) ** 0.5


def test_distance_correlation_is_what_its_definition_says():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 3))
    for y in (x[:, :2] ** 2, rng.normal(size=(30, 2)), x):
        value, _ = corrected_distance_correlation(torch.from_numpy(x), torch.from_numpy(y), rng)
        assert np.sign(value) * value**2 == pytest.approx(definition(x, y), abs=1e-9)
    constant, by_chance = corrected_distance_correlation(torch.from_numpy(x), torch.zeros(30, 2), rng, 3)
    assert constant == 0
    assert by_chance.tolist() == [0, 0, 0]


def test_independent_samples_have_none_even_in_many_dimensions_and_dependent_ones_do():
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=(100, 500)))
    value, by_chance = corrected_distance_correlation(x, torch.from_numpy(rng.normal(size=(100, 500))), rng, 99)
    assert abs(value) < 0.15
    assert p_value(value, by_chance) > 0.05
    value, by_chance = corrected_distance_correlation(x, x[:, :100], rng, 99)
    assert p_value(value, by_chance) == 0.01


@pytest.mark.parametrize(
    ("had", "wanted"), [((16, 7, 7), (1, 28, 28)), ((8, 4, 3), (3, 30, 17)), ((2, 9, 9), (1, 8, 8))]
)
def test_decoders_of_images_make_images_of_the_right_size(had, wanted):
    values, inputs = torch.zeros(2, *had), torch.zeros(2, *wanted)
    assert decoder.decoder_network(values, inputs)(values).shape == inputs.shape


def test_large_images_whose_pixels_were_only_moved_are_put_together_again(monkeypatch):
    monkeypatch.setattr(decoder, "_STEPS", 60)
    monkeypatch.setattr(decoder, "_WIDTH", 32)
    torch.manual_seed(0)
    images = torch.randn(100, 1, 18, 18)
    moved = functional.pixel_unshuffle(images, 2)  # no pixel is like another: what is smooth cannot be these
    decode = decoder._learned(decoder.decoder_network(moved, images), moved, images)
    assert functional.mse_loss(decode(moved), images) < 0.25


def test_the_front_is_what_nothing_beats():
    points = [(90, 0.5), (95, 0.9), (80, 0.5), (85, 0.3), (70, 0.4), (95, 0.95)]
    assert pareto_front(points) == [(95, 0.9), (90, 0.5), (85, 0.3)]


def test_a_frontier_has_a_panel_a_leak_and_of_gradients_at_two_cuts_the_worse():
    def case(defence, accuracy, similarity, *directions):
        ssim = Finding(attack="decoder", party="server", measure="SSIM", value=similarity, floor=0.3)
        aucs = [
            Finding(attack=f"labels from gradients ({n})", party="server", measure="direction AUC", value=v, floor=0.5)
            for n, v in enumerate(directions)
        ]
        found = [ssim, *aucs]
        return Case(
            cut="body", defence=defence, seed=0, accuracy=accuracy, bytes_a_round=1, seconds=1.0, findings=found
        )

    panels = draw_frontier(
        AuditResult([case("none", 0.9, 0.8, 0.7, 0.95), case("noise", 0.8, 0.6, 0.6, 0.55)], {})
    ).axes
    assert [panel.get_ylabel() for panel in panels] == [
        "images: SSIM of the decoder",
        "labels: AUC from gradients sent back",
    ]
    assert [panels[1].containers[n].lines[0].get_ydata().item() for n in (0, 1)] == [0.95, 0.6]


def test_the_audit_is_listed_where_it_is_found():
    assert "audit" in dir(privacy)
    assert privacy.audit is audit


# --- what crossed ----------------------------------------------------------------------------------------------------
def test_rows_are_picked_from_the_exchanges_that_they_are_of():
    generator, counts = torch.Generator().manual_seed(0), [3, 1, 5, 2]
    crossed = [(torch.randn(n, 2, 2, generator=generator), torch.randn(n, 3, generator=generator)) for n in counts]
    rows = Rows(
        where="forward",
        crossed=crossed,
        inputs=torch.zeros(11, 1),
        labels=np.zeros(11, dtype=np.int64),
        shadow=np.zeros(11, dtype=bool),
        exchanges=[SimpleNamespace(order=SimpleNamespace(count=n)) for n in counts],
    )
    whole = torch.cat([torch.cat([one.flatten(1), other], dim=1) for one, other in crossed])
    for positions in ([8, 0, 3, 3, 10, 2], list(range(11)), [4]):
        assert torch.equal(rows.seen(np.array(positions)), whole[positions])


@pytest.mark.parametrize(("many", "each"), [(1, 1), (255, 1), (257, 1), (1000, 1), (9, 64), (3, 500)])
def test_exchanges_are_grouped_evenly(many, each):
    groups = _groups(list(range(many)), many * each)
    assert [one for group in groups for one in group] == list(range(many))
    assert max(map(len, groups)) <= max(256 // each, 1)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


# --- decoders --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [7, 2500])
def test_ridge_regressions_are_those_of_scikit_learn_with_few_examples_and_with_many(width):
    generator = torch.Generator().manual_seed(0)
    values, inputs = torch.randn(60, width, generator=generator), torch.randn(60, 1, 2, 3, generator=generator)
    new = torch.randn(5, width, generator=generator)
    for made, penalty in zip(decoder._ridges(values, inputs), decoder._RIDGES, strict=True):
        x, y = values.double().numpy(), inputs.flatten(1).double().numpy()
        ridge = Ridge(alpha=60 * penalty, fit_intercept=False).fit(x, y - y.mean(axis=0))
        expected = ridge.predict(new.double().numpy()) + y.mean(axis=0)
        assert made(new).flatten(1).numpy() == pytest.approx(expected, abs=1e-5)
