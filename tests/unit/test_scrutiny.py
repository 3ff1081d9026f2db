"""Whether a client sees that gradients do not follow the labels it has told."""

import numpy as np
import pytest

from psl_flower.errors import ConfigError
from psl_flower.privacy import GradientScrutiny, Secret, parse_defences
from psl_flower.privacy.defences.scrutiny import Watch

CLASSES, WIDTH, STEPS = 4, 30, 60


def labels(rng, share=0.2):
    """Return pairs of labels, told and true."""
    true = rng.integers(0, CLASSES, 10)
    told = np.where(rng.random(10) < share, (true + rng.integers(1, CLASSES, 10)) % CLASSES, true)
    return list(zip(told.tolist(), true.tolist(), strict=True))


def gradients(rng, which):
    """Return noisy gradients that point where those of a label do, each of a length of its own."""
    directions = np.random.default_rng(7).normal(size=(CLASSES, WIDTH))
    return rng.lognormal(size=(len(which), 1)) * (directions[which] + rng.normal(size=(len(which), WIDTH)))


@pytest.mark.parametrize(("follows", "alarmed"), [("told", 0), ("true", 50), ("nothing", 50)])
def test_only_gradients_that_follow_what_was_told_raise_no_alarm(follows, alarmed):
    raised = 0
    for seed in range(50):
        rng, watch, seen = np.random.default_rng(seed), Watch(looks=16, least=0.75), False
        for _ in range(STEPS):
            pairs = labels(rng)
            which = {
                "told": [told for told, _ in pairs],
                "true": [true for _, true in pairs],
                "nothing": rng.integers(0, CLASSES, 10),
            }
            watch.see(gradients(rng, which[follows]), pairs)
            seen |= watch.alarmed
        raised += seen
    assert abs(raised - alarmed) <= 1


def test_nothing_is_judged_before_enough_was_seen():
    rng, watch = np.random.default_rng(0), Watch(looks=16, least=0.75)
    watch.see(gradients(rng, [0] * 10), [(0, 0)] * 10)
    watch.see(gradients(rng, [0] * 20), [(1, 0)] * 20)  # what gradients of label 1 look like is not known
    assert watch.share is None
    watch.see(gradients(rng, [1] * 10), [(1, 1)] * 10)
    watch.see(gradients(rng, [1] * 15), [(1, 0)] * 15)
    assert not watch.alarmed
    watch.see(gradients(rng, [0] * 16), [(1, 0)] * 16)
    assert watch.alarmed
    assert "ask who runs it" in watch.describe()


def test_the_share_of_wrong_labels_is_what_was_asked_for_and_the_same_each_time():
    scrutiny, secret = GradientScrutiny(10, share=0.1), Secret()
    true, examples = np.arange(5000) % 10, np.arange(5000)
    told = scrutiny.labels(true, examples, secret, b"labels 0 train ")
    assert 0.08 < (told != true).mean() < 0.12
    assert np.array_equal(told, scrutiny.labels(true, examples, secret, b"labels 0 train "))
    assert np.array_equal(true, scrutiny.labels(true, examples, secret, b"labels 0 test "))


def test_it_is_written_like_the_others_and_refuses_what_is_out_of_range():
    (made,) = parse_defences("GradientScrutiny(10, share=0.05)")
    assert isinstance(made, GradientScrutiny)
    assert (made.classes, made.share) == (10, 0.05)
    for options in ({"share": 0.0}, {"share": 1.0}, {"looks": 0}, {"least": 0.0}):
        with pytest.raises(ConfigError):
            GradientScrutiny(10, **options)
