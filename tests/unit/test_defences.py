"""What each defence does to rows, gradients and labels, by itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from psl_flower.errors import ConfigError
from psl_flower.exchange.tensors import Packer, Unpacker
from psl_flower.privacy import (
    ClipCutGradient,
    DistanceCorrelation,
    GaussianNoise,
    LaplaceNoise,
    Quantize,
    RandomizedResponse,
    Secret,
    TopK,
    distance_correlation,
    parse_defences,
)
from psl_flower.privacy.defences import OutgoingRows

SECRETS = [Secret(bytes([i] * 32)) for i in range(2)]


def leaving(examples, counts, secrets=SECRETS, weights=b"some"):
    return OutgoingRows(
        secrets=secrets,
        counts=np.array(counts),
        examples=np.array(examples),
        purpose=b"activations",
        weights=lambda: weights,
    )


def rows(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- random numbers --------------------------------------------------------------------------------------------------
def test_a_secret_draws_uniform_numbers_for_each_example():
    secret = Secret(bytes(32))
    drawn = secret.uniform(b"a", np.arange(300), 40)
    assert stats.kstest(drawn.reshape(-1), "uniform").pvalue > 1e-3
    assert 0 < drawn.min() < drawn.max() < 1
    assert np.abs(np.corrcoef(drawn) - np.eye(300)).max() < 0.8  # no two examples are alike
    assert np.array_equal(drawn[[7, 3]], secret.uniform(b"a", np.array([7, 3]), 40))
    for other in (secret.uniform(b"b", np.arange(300), 40), Secret().uniform(b"a", np.arange(300), 40)):
        assert abs(np.corrcoef(drawn.reshape(-1), other.reshape(-1))[0, 1]) < 0.05


@pytest.mark.parametrize("width", [1, 3])
def test_an_example_has_the_same_numbers_in_any_cohort_at_the_same_weights(width):
    of = leaving([4, 9, 2, 4], [3, 1])
    drawn, x = of.uniform(torch.zeros(4, width)), torch.zeros(2, width)
    alone = leaving([2, 9], [2], SECRETS[:1])
    assert np.array_equal(alone.uniform(x), drawn[[2, 1]])
    assert not np.isin(drawn[3], drawn[0]).any()  # the same example of another client
    assert not np.isin(alone.uniform(x), replace(alone, weights=lambda: b"others").uniform(x)).any()
    assert not np.isin(alone.uniform(x), replace(alone, purpose=b"gradient").uniform(x)).any()


# --- noise -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("defence", "law"),
    [(GaussianNoise(0.3), stats.norm(scale=0.3)), (LaplaceNoise(0.3), stats.laplace(scale=0.3))],
)
def test_noise_has_its_law_and_lets_the_gradient_through(defence, law):
    x = rows(50, 4, 50).requires_grad_()
    left = defence.rows(x, leaving(np.arange(50), [20, 30]))
    noise = (left - x).detach().numpy().reshape(-1)
    assert stats.kstest(noise, law.cdf).pvalue > 1e-3
    left.backward(gradient := rows(50, 4, 50, seed=1))
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("defence", [GaussianNoise(0.0), LaplaceNoise(0), TopK(12), ClipCutGradient(1e3, noise=0)])
def test_no_strength_changes_nothing(defence):
    x, of = rows(5, 3, 4), leaving(np.arange(5), [5], SECRETS[:1])
    assert torch.equal(defence.rows(x, of), x)
    assert torch.equal(defence.gradients(x, of), x)


# --- compression -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_rows_have_few_levels_and_the_gradient_goes_straight_through(bits):
    x = rows(6, 500).float()
    x[5] = 0
    left = Quantize(bits).rows(x.requires_grad_(), None)
    assert all(len(row.unique()) <= 2**bits - 1 for row in left)
    largest = x.abs().amax(dim=1, keepdim=True)
    assert ((left - x).abs() <= largest / (2 ** (bits - 1) - 1) / 2 * 1.001).all()
    left.backward(gradient := rows(6, 500, seed=1).float())
    assert torch.equal(x.grad, gradient)


def test_eight_bits_travel_as_a_byte_and_arrive_as_they_are():
    left = Quantize(8).rows(rows(6, 1000).float(), None)
    packer = Packer("int8")
    spec = packer.pack(left, reduce=True)
    assert packer.num_bytes == 6 * (1000 + 4)
    buffers = [[memoryview(bytes(piece)) for piece in pieces] for pieces in packer.buffers]
    assert torch.allclose(Unpacker(buffers).unpack(spec), left, rtol=1e-6)


def test_top_k_keeps_the_largest_and_its_gradient():
    x = rows(4, 5, 6).requires_grad_()
    left = TopK(7).rows(x, None)
    kept = (left != 0).reshape(4, -1)
    assert kept.sum(dim=1).tolist() == [7] * 4
    smallest = x.detach().abs().reshape(4, -1).sort(dim=1, descending=True).values[:, 6:7]
    assert torch.equal(kept, x.detach().abs().reshape(4, -1) >= smallest)
    left.backward(gradient := rows(4, 5, 6, seed=1))
    assert torch.equal(x.grad, gradient * kept.reshape(4, 5, 6))


# --- gradients at the cut --------------------------------------------------------------------------------------------
def test_gradients_are_clipped_to_a_norm_and_keep_their_direction():
    x = rows(8, 3, 4) * torch.logspace(-2, 2, 8).reshape(-1, 1, 1)
    left = ClipCutGradient(1.0, noise=0).gradients(x, None)
    norms = x.reshape(8, -1).norm(dim=1)
    assert torch.allclose(left.reshape(8, -1).norm(dim=1), norms.clamp(max=1))
    assert torch.allclose(torch.cosine_similarity(left.flatten(1), x.flatten(1)), torch.ones(8).double())


def test_noise_gives_all_gradients_the_same_expected_squared_norm_and_no_bias():
    x = torch.tensor([[0.3, 0.4], [0.0, 0.1], [30.0, 40.0], [0.0, 0.0]]).double().repeat(5000, 1)
    of = leaving(np.arange(len(x)), [len(x)], SECRETS[:1])
    left = ClipCutGradient(1.0).gradients(x, of).reshape(-1, 4, 2)
    squared = (left**2).sum(dim=2).mean(dim=0)
    assert torch.allclose(squared[:3], torch.ones(3).double(), rtol=0.1)
    assert left[:, 3].abs().max() == 0
    clipped = torch.tensor([[0.3, 0.4], [0.0, 0.1], [0.6, 0.8]]).double()
    assert torch.allclose(left[:, :3].mean(dim=0), clipped, atol=0.06)


def test_noise_on_each_entry_is_of_the_size_that_is_asked_for_and_other_than_that_along_the_gradient():
    x = torch.full((5000, 4), 0.05).double()
    of = leaving(np.arange(len(x)), [len(x)], SECRETS[:1])
    along = ClipCutGradient(2.0).gradients(x, of) - x
    both = ClipCutGradient(2.0, everywhere=0.5).gradients(x, of) - x
    apart = both - along
    assert torch.allclose(apart.std(dim=0), torch.ones(4).double(), rtol=0.05)
    assert torch.corrcoef(torch.cat([apart, along[:, :1]], 1).T).triu(1).abs().max() < 0.06
    alone = ClipCutGradient(2.0, noise=0, everywhere=0.5).gradients(x, of)
    assert torch.allclose(alone, x + apart)


# --- distance correlation --------------------------------------------------------------------------------------------
def by_definition(x, z):
    """Szekely et al. 2007, equations 2.8 to 2.10, with loops."""

    def centred(s):
        n = len(s)
        a = np.array([[math.dist(s[i], s[j]) for j in range(n)] for i in range(n)])
        return [[a[i, j] - a[i].mean() - a[:, j].mean() + a.mean() for j in range(n)] for i in range(n)]

    a, b = np.array(centred(x)), np.array(centred(z))
    return math.sqrt((a * b).mean() / math.sqrt((a * a).mean() * (b * b).mean()))


def test_distance_correlation_is_its_definition():
    x, z = rows(12, 5), rows(12, 3, seed=1)
    assert float(distance_correlation(x, z)) == pytest.approx(by_definition(x.numpy(), z.numpy()), rel=1e-12)
    assert float(distance_correlation(x, 3 * x[:, [4, 3, 2, 1, 0]] + 1)) == pytest.approx(1)
    many = rows(2000, 2)
    assert float(distance_correlation(many, rows(2000, 2, seed=1))) < 0.1
    assert torch.autograd.gradcheck(distance_correlation, (x, z.requires_grad_()))


@pytest.mark.parametrize("n", [1, 5])
def test_rows_that_are_all_equal_have_no_distance_correlation(n):
    z = torch.ones(n, 3, dtype=torch.float64, requires_grad=True)
    found = distance_correlation(rows(n, 4), z)
    assert found.item() == 0
    found.backward()
    assert torch.equal(z.grad, torch.zeros(n, 3).double())


def test_the_penalty_is_the_sum_over_clients():
    x, z = {"a": rows(9, 2), "b": torch.arange(9)}, rows(9, 3, seed=1)
    of = leaving(np.arange(9), [4, 5])
    each = [distance_correlation(x["a"][part], z[part]) for part in (slice(4), slice(4, 9))]
    assert torch.allclose(DistanceCorrelation(0.7).penalty(x, z, of), 0.7 * sum(each))
    assert DistanceCorrelation(0).penalty(x, z, of) is None
    with pytest.raises(ConfigError, match="inputs that are numbers, not indices"):
        DistanceCorrelation(1).penalty(torch.arange(9), z, of)


# --- labels ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("epsilon", "classes"), [(1.0, 2), (2.0, 5)])
def test_randomized_response_has_the_law_of_its_epsilon(epsilon, classes):
    defence, n = RandomizedResponse(epsilon, classes), 40_000
    told = np.stack(
        [
            np.bincount(
                defence.labels(np.full(n, true), np.arange(n) + n * true, SECRETS[0], b"labels"), minlength=classes
            )
            for true in range(classes)
        ]
    )
    keeps = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
    expected = np.full((classes, classes), (1 - keeps) / (classes - 1) * n)
    np.fill_diagonal(expected, keeps * n)
    assert defence.keeps == pytest.approx(keeps)
    assert all(stats.chisquare(*pair).pvalue > 1e-4 for pair in zip(told, expected, strict=True))
    # so the likelihoods of what is told, for any two labels, are within e^epsilon
    assert expected.max() / expected.min() == pytest.approx(math.exp(epsilon))


def test_a_label_is_drawn_once():
    defence, labels = RandomizedResponse(0.5, 10), np.arange(1000) % 10
    told = defence.labels(labels, np.arange(1000), SECRETS[0], b"labels")
    assert np.array_equal(told[[5, 900]], defence.labels(labels[[5, 900]], np.array([5, 900]), SECRETS[0], b"labels"))
    assert np.array_equal(RandomizedResponse(1e3, 10).labels(labels, np.arange(1000), SECRETS[0], b""), labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 10]), "for the classes 0 to 9: there are other labels"),
        (np.array([0, -100]), "there are other labels"),
        (np.array([0.5]), r"one class an example, int64 \(n,\), got float64 \(1,\)"),
        (np.zeros((2, 3), dtype=np.int64), r"got int64 \(2, 3\)"),
    ],
)
def test_labels_that_cannot_be_randomised_are_told(labels, message):
    with pytest.raises(ConfigError, match=message):
        RandomizedResponse(1.0, 10).labels(labels, np.arange(len(labels)), SECRETS[0], b"")


# --- as they are written ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_its_loss_is_least_where_that_of_true_labels_is(epsilon):
    """Over all labels that may be told, each as often as it is: what is learned are the true probabilities."""
    defence = RandomizedResponse(epsilon, 3)
    true = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
    told = defence.keeps * true + (1 - defence.keeps) * (1 - true) / 2
    found = {}
    for name, loss in (("corrected", defence.loss), ("plain", torch.nn.functional.cross_entropy)):
        logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

        def expected():
            optimizer.zero_grad()  # noqa: B023 - called at once
            value = sum(p * loss(logits, torch.tensor([c])) for c, p in enumerate(told))  # noqa: B023
            value.backward()
            return value

        optimizer.step(expected)
        found[name] = logits.detach().softmax(dim=1)[0]
    assert torch.allclose(found["corrected"], true, atol=1e-5)
    assert torch.allclose(found["plain"], told, atol=1e-5)


def test_its_loss_is_the_cross_entropy_where_all_labels_stay():
    outputs, target = rows(20, 10) * 50, torch.arange(20) % 10
    exact = RandomizedResponse(1e4, 10).loss(outputs, target)
    assert torch.equal(exact, torch.nn.functional.cross_entropy(outputs, target))
    with pytest.raises(ConfigError, match=r"logits \(n, 10\), got \(20, 3\)"):
        RandomizedResponse(1, 10).loss(outputs[:, :3], target)


def test_defences_are_read_from_a_text():
    assert parse_defences("") == parse_defences("  ") == ()
    found = parse_defences("GaussianNoise(0.1), RandomizedResponse(1.5, classes=10), TopK(k=3), ClipCutGradient(1)")
    assert found == (GaussianNoise(0.1), RandomizedResponse(1.5, 10), TopK(3), ClipCutGradient(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GaussianNoise", "are written as 'GaussianNoise"),
        ("GaussianNoise(0.1", "are written as"),
        ("GaussianNoise(0.1))", "are written as"),
        ("x = 1", "are written as"),
        ("GaussianNoise(**{'sigma': 1})", "are written as"),
        ("GaussianNoise(open('x'))", "GaussianNoise takes numbers"),
        ("GaussianNoise(1, 2, 3)", "GaussianNoise takes numbers"),
        ("__import__('os')", "a defence must be one of"),
        ("GaussNoise(1)", "did you mean 'GaussianNoise'"),
        ("GaussianNoise(-1)", "GaussianNoise: sigma must be at least 0, got -1"),
        ("Quantize(1)", "Quantize: bits must be at least 2, got 1"),
        ("Quantize(17)", "Quantize: bits must be at most 16, got 17"),
        ("RandomizedResponse(0, 10)", "epsilon must be greater than 0"),
        ("LaplaceNoise(True)", "scale must be a number"),
        ("DistanceCorrelation(1e999)", "weight must be finite"),
    ],
)
def test_what_is_written_wrongly_is_told(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_defences(text)
