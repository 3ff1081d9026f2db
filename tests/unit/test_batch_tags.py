"""What a client gives the server to bring back, so that it sees whether a batch is the same when drawn again."""

from dataclasses import replace

import numpy as np
import pytest

from psl_flower.client.batch_tags import batch_tags, check_tags
from psl_flower.errors import ConfigError
from psl_flower.privacy import Secret
from psl_flower.protocol import Orders

ORDERS = Orders(
    clients=np.arange(2), starts=np.zeros(2, int), counts=np.array([3, 4]), seed=1, epoch=2, step=3, test=False
)
SECRETS = [Secret(bytes([i] * 32)) for i in range(2)]
SUMS = [2**32 - 1, 0]
TAGS = batch_tags(SUMS, ORDERS, SECRETS)


def test_the_same_batch_has_the_same_tag_and_another_is_refused():
    assert (TAGS >= 0).all()
    check_tags(batch_tags(SUMS, ORDERS, SECRETS), TAGS, "training data")
    with pytest.raises(ConfigError, match="of the training data twice gave different data"):
        check_tags(batch_tags([2**32 - 1, 1], ORDERS, SECRETS), TAGS, "training data")


def test_a_client_that_has_another_secret_by_now_cannot_tell_and_goes_on():
    renewed = batch_tags([5, 0], ORDERS, [Secret(), SECRETS[1]])
    assert renewed[0] != TAGS[0]
    check_tags(renewed, TAGS, "training data")
    with pytest.raises(ConfigError):  # the other, that has its secret still
        check_tags(batch_tags([5, 1], ORDERS, [Secret(), SECRETS[1]]), TAGS, "training data")


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"epoch": 3}, {"step": 4}, {"starts": np.ones(2, int)}, {"test": True}]
)
def test_equal_batches_of_two_orders_do_not_look_equal(change):
    assert not (batch_tags(SUMS, replace(ORDERS, **change), SECRETS) == TAGS).any()


def test_a_tag_says_nothing_of_the_batch_to_who_has_another_secret():
    guesses = np.array([batch_tags([found] * 2, ORDERS, [Secret(), Secret()]) for found in SUMS])
    halves = {int(half) for tag in TAGS for half in (tag, tag >> 32, tag & 0xFFFFFFFF)}
    assert not halves & {*SUMS, *guesses.ravel().tolist()}
