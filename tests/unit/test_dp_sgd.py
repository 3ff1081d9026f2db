"""DP-SGD by itself: gradients of single examples, clipped and added up, noise, and what it gives away."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from psl_flower.client.masking import Masking
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.privacy import DPSGD, Cohort, Party, decode
from psl_flower.privacy.accounting import epsilon, noise_for
from psl_flower.privacy.per_example import clipped_sum
from psl_flower.protocol import Kind, Leaf
from psl_flower.server import LocalBackend


# --- gradients of single examples ------------------------------------------------------------------------------------
def convolutional():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)).double()


def recurrent():
    class Last(nn.Module):
        def forward(self, x):
            return x.mean(dim=1)

    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(9, 8), encoder, Last(), nn.Linear(8, 3)).double()


def run(module, inputs):
    return module(inputs)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (convolutional, lambda n: torch.randn(n, 1, 6, 6, dtype=torch.float64)),
        (recurrent, lambda n: torch.randint(0, 9, (n, 5))),
    ],
)
@pytest.mark.parametrize("bound", [1e9, 0.5])
def test_each_gradient_is_that_of_its_example_and_clipped(make, inputs, bound):
    torch.manual_seed(0)
    module, n = make(), 40
    x, weights = inputs(n), torch.randn(n, 3, dtype=torch.float64) * torch.logspace(-2, 1, n).reshape(-1, 1)
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    norms = []
    for i in range(n):
        found = torch.autograd.grad(module(x[i : i + 1]), list(module.parameters()), weights[i : i + 1])
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in found)))
        for name, g in zip(expected, found, strict=True):
            expected[name] += g * min(1, bound / norms[-1])
    total = clipped_sum(run, module, x, {0: weights}, bound, who="it")
    assert min(norms) < 0.5 < max(norms)
    assert total.keys() == expected.keys()
    assert all(torch.allclose(total[name], expected[name], atol=1e-10) for name in expected)


def test_an_example_moves_the_sum_by_the_bound_at_most():
    torch.manual_seed(0)
    module, bound = convolutional(), 0.1
    x, weights = torch.randn(5, 1, 6, 6, dtype=torch.float64), 1e3 * torch.randn(5, 3, dtype=torch.float64)
    everybody, without = (clipped_sum(run, module, x[:n], {0: weights[:n]}, bound, who="it") for n in (5, 4))
    moved = math.sqrt(sum(float((everybody[name] - without[name]).square().sum()) for name in everybody))
    assert moved == pytest.approx(bound)


def test_what_draws_random_numbers_is_told():
    module = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    with pytest.raises(ConfigError, match=r"of single examples cannot be computed of the tail, .* \(dropout\)"):
        clipped_sum(run, module, torch.randn(4, 2), {0: torch.ones(4, 3)}, 1.0, who="the tail")


# --- noise -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_noise_has_its_law(share):
    private = DPSGD(clip=2.0, noise=1.5, batch_size=10)
    gradients = {"a": torch.zeros(200, 50)}
    noised = private.noised(gradients, share)
    law = stats.norm(scale=1.5 * 2.0 / 10 * math.sqrt(share))
    assert stats.kstest(noised["a"].numpy().reshape(-1), law.cdf).pvalue > 1e-3
    assert not torch.equal(noised["a"], private.noised(gradients, share)["a"])
    assert private.bound(4) == pytest.approx(2.0 / 10 / 2)


def test_a_client_without_a_gradient_adds_its_share():
    weights = {"tail": SimpleNamespace(parameters={"w": torch.zeros(100, 50)})}
    request = SimpleNamespace(orders=SimpleNamespace(test=False), weights=weights)
    clients, parties = np.arange(4), {client: Party("s") for client in range(4)}
    cohort = Cohort(
        session="s",
        attempt=1,
        clients=clients,
        counts=np.ones(4, dtype=np.int64),
        keys=np.stack([np.frombuffer(party.key, dtype=np.uint8) for party in parties.values()]),
        degree=3,
        places={"tail": 20},
        max_norm=None,
    )
    private = DPSGD(clip=2.0, noise=5.0, batch_size=10)
    given = {"tail": Leaf(Kind.SUM, {"w": None})}
    found = Masking(cohort, request, "s", parties, private).mask(given, clients)["tail"].value
    assert found["present"].tolist() == [1]
    law = stats.norm(scale=2.0 * 5.0 / 10 * math.sqrt(4 / (4 - private.colluding)))
    assert stats.kstest(decode(found["values"]["w"].numpy(), 20).reshape(-1), law.cdf).pvalue > 1e-3


def test_the_server_adds_noise_where_there_is_no_gradient():
    part = nn.Linear(100, 50)
    private = DPSGD(clip=2.0, noise=5.0, batch_size=10)
    backend = LocalBackend(
        {"body": part},
        {"body": "server"},
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        loss=nn.functional.cross_entropy,
        device=torch.device("cpu"),
        classification=True,
        order=["weight", "bias"],
        private=private,
    )
    before = part.weight.detach().clone()
    backend.commit({"body": {"weight": None, "bias": None}})
    law = stats.norm(scale=2.0 * 5.0 / 10)
    assert stats.kstest((part.weight.detach() - before).numpy().reshape(-1), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("colluding", [0, 1, 2])
def test_the_noise_of_those_who_do_not_collude_is_enough(colluding):
    private = DPSGD(clip=1.0, noise=1.0, batch_size=1, colluding=colluding)
    shares = [private.share(1, 4) for _ in range(4)]
    assert sum(shares[colluding:]) == pytest.approx(1)
    assert private.share(3, 4) == pytest.approx(sum(shares[:3]))
    with pytest.raises(ProtocolError, match="it must be of more clients"):
        private.share(1, colluding)


# --- accounting ------------------------------------------------------------------------------------------------------
def by_definition(noise, rounds, at):
    """Delta of epsilon: how much likelier any outcome is beyond e^epsilon times, by integration over outcomes."""
    shift = math.sqrt(rounds) / noise
    with_it, without = stats.norm(loc=shift), stats.norm()

    def beyond(x):
        return max(with_it.pdf(x) - math.exp(at) * without.pdf(x), 0)

    return integrate.quad(beyond, at / shift + shift / 2, shift + 12, epsabs=1e-14)[0]


@pytest.mark.parametrize(
    ("noise", "rounds", "delta"), [(1.0, 1, 1e-5), (4.0, 10, 1e-5), (20.0, 100, 1e-7), (0.7, 5, 1e-3)]
)
def test_epsilon_is_that_of_its_definition(noise, rounds, delta):
    assert by_definition(noise, rounds, epsilon(noise, rounds, delta)) == pytest.approx(delta, rel=1e-4)


def test_noise_is_found_for_an_epsilon():
    # arXiv 1805.06530: the analytic Gaussian mechanism for epsilon 1, delta 1e-5
    assert noise_for(1.0, 1, 1e-5) == pytest.approx(3.7306, abs=1e-4)
    for target, rounds in ((0.5, 1), (2.0, 20), (8.0, 200)):
        private = DPSGD.for_epsilon(target, rounds=rounds, clip=1.0, batch_size=64)
        assert private.epsilon(rounds) == pytest.approx(target)
        assert private.epsilon(rounds + 1) > target
        assert private.epsilon(0) == 0
    assert np.isinf(DPSGD(clip=1.0, noise=0, batch_size=1).epsilon(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0}, "clip must be greater than 0"),
        ({"noise": -1}, "noise must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"delta": 1}, "delta must be below 1, well below one over the number of examples, got 1"),
        ({"colluding": -1}, "colluding must be at least 0"),
        ({"spent_rounds": -1}, "spent_rounds must be at least 0"),
        ({"delta": 0}, "delta must be greater than 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DPSGD(**{"clip": 1.0, "noise": 1.0, "batch_size": 8, **options})
