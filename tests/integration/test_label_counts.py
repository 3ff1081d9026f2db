"""Samplers that plan by class, where labels stay with the clients: with counts that are noisy, or given."""

import numpy as np
import pytest
from support import DELAYS, NUM_CLASSES, client_data, sgd
from test_u_shaped import K, ListeningGrid, app, train, u_net

from psl_flower import (
    AlignedSampler,
    InProcessGrid,
    LatencyBudgetedSampler,
    LatentDirichletSampler,
    ParallelSplitLearning,
)
from psl_flower.client.process import forget_runs
from psl_flower.errors import ConfigError, MembershipError
from psl_flower.privacy import LabelNoise, Secret

TRUE = {k: np.bincount(client_data(k, K).tensors[1].numpy(), minlength=NUM_CLASSES).tolist() for k in range(K)}
NOISE = LabelNoise(epsilon=1.0, classes=NUM_CLASSES)


def strategy(sampler=None, **options):
    return ParallelSplitLearning(
        u_net(),
        **{
            "cut": "body",
            "tail": "tail",
            "sampler": sampler or AlignedSampler(40, seed=3),
            "optimizer": sgd,
            "delays": DELAYS,
            "transport": "messages",
            "min_available_nodes": K,
            "evaluate_every": 0,
            "device": "cpu",
            **options,
        },
    )


@pytest.mark.parametrize("sampler", [LatentDirichletSampler, LatencyBudgetedSampler, AlignedSampler])
def test_noisy_counts_are_all_that_is_told_by_class(sampler):
    grid = ListeningGrid(app(label_noise=NOISE))
    result = train(strategy(sampler(40, seed=3), label_counts="noisy"), grid)
    assert result.train_metrics_clientapp[1]["num_examples"] == sum(map(sum, TRUE.values()))
    assert all(request.orders.class_counts is None for request, _ in grid.heard if request.orders is not None)
    described = {each.partition_id: each for _, reply in grid.heard for each in reply.descriptions.values()}
    assert described.keys() == TRUE.keys()
    for client, each in described.items():
        assert each.labels.tolist() == list(range(NUM_CLASSES))
        assert each.counts.sum() == sum(TRUE[client])
        assert np.abs(each.counts - TRUE[client]).max() < 40
    assert any(each.counts.tolist() != TRUE[client] for client, each in described.items())


def test_asked_again_a_client_tells_the_same():
    grid = ListeningGrid(app(label_noise=NOISE))
    for _ in range(3):
        train(strategy(label_counts="noisy"), grid)
        forget_runs()  # another process
    told = {}
    for _, reply in grid.heard:
        for each in reply.descriptions.values():
            told.setdefault(each.partition_id, set()).add(tuple(each.counts))
    assert [len(each) for each in told.values()] == [1] * K


def test_given_counts_are_not_asked_for():
    grid = ListeningGrid(app())
    result = train(strategy(label_counts=TRUE), grid)
    assert result.train_metrics_clientapp[1]["num_examples"] == sum(map(sum, TRUE.values()))
    described = [each for _, reply in grid.heard for each in reply.descriptions.values()]
    assert len(described) == K
    assert all(each.counts is None for each in described)
    assert all(request.orders.class_counts is None for request, _ in grid.heard if request.orders is not None)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: strategy(), ConfigError, "label_counts='noisy', which tells the server how many examples of each"),
        (lambda: strategy(label_counts="all"), ConfigError, "must be 'noisy', or the counts .* by client, got 'all'"),
        (
            lambda: strategy(label_counts="noisy", tail=None),
            ConfigError,
            "method 'parallel' clients send their labels: leave label_counts out",
        ),
        (
            lambda: train(strategy(label_counts={**TRUE, 2: [1, 2, 3]}), InProcessGrid(app(), K)),
            MembershipError,
            "label_counts of client 2 add up to 6, it holds",
        ),
        (
            lambda: train(strategy(label_counts="noisy"), InProcessGrid(app(), K)),
            MembershipError,
            r"let it tell them with noise: split_client_app\(..., label_noise=",
        ),
        (
            lambda: train(
                strategy(label_counts="noisy"),
                InProcessGrid(app(label_noise=LabelNoise(epsilon=1.0, classes=2)), K),
            ),
            MembershipError,
            "label_noise is for 2 classes: there is a label beyond them",
        ),
        (lambda: LabelNoise(epsilon=0.0, classes=3), ConfigError, "epsilon must be"),
    ],
)
def test_what_does_not_go_together_is_told(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_noise_is_that_of_its_epsilon():
    """Likelihoods of any value differ by at most exp(epsilon / 2) for counts that differ by one, in two counts."""
    epsilon = 0.8
    drawn = np.concatenate([LabelNoise(epsilon=epsilon, classes=1000).draw(Secret()) for _ in range(400)])
    values, counts = np.unique(drawn, return_counts=True)
    frequency = dict(zip(values.tolist(), (counts / counts.sum()).tolist(), strict=True))
    for value in range(-5, 5):
        ratio = frequency[value + 1] / frequency[value]
        assert ratio == pytest.approx(np.exp(-epsilon / 2) if value >= 0 else np.exp(epsilon / 2), rel=0.05)
    a = np.exp(-epsilon / 2)
    assert drawn.std() == pytest.approx(np.sqrt(2 * a) / (1 - a), rel=0.02)


@pytest.mark.parametrize("counts", [[0, 0, 7], [5, 5, 5], [1, 0, 0], [0, 0, 0]])
def test_noisy_counts_keep_their_sum_and_are_not_negative(counts):
    noise = LabelNoise(epsilon=0.1, classes=3)
    for _ in range(50):
        told = noise.add(np.array(counts), noise.draw(Secret()))
        assert told.min() >= 0
        assert told.sum() == sum(counts)
