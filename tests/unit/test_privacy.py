"""Secure aggregation in numbers: fixed point, keys, masks, who shares them with whom, and what is given once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psl_flower import SecureAggregation
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.failures import Kind
from psl_flower.privacy import Cohort, OutOfRangeError, Party, decode, encode, fingerprint, places_for, secure_options

OPTIONS = SecureAggregation()
ROWS = np.arange(5)


def make_cohort(parties, attempt=1, options=OPTIONS, **changes):
    size = len(parties)
    keys = [np.frombuffer(party.key, np.uint8) for party in parties]
    values = {
        "session": "run",
        "attempt": attempt,
        "clients": 3 * np.arange(size),
        "counts": np.full(size, 5),
        "keys": np.stack(keys),
        "degree": options.degree(size),
    }
    return Cohort(**{**values, **changes})


def parties(size):
    return [Party("run") for _ in range(size)]


def masked(values, cohort, members, stage="backward"):
    result = values.copy()
    for at, (numbers, party) in enumerate(zip(result, members, strict=True)):
        party.add_masks(numbers, cohort, stage, at, cohort.neighbours()[at].tolist())
    return result


# --- fixed point -----------------------------------------------------------------------------------------------------
@settings(max_examples=60)
@given(
    clients=st.integers(1, 200), exponent=st.integers(-40, 40), seed=st.integers(0, 10**6), dtype=st.sampled_from("fd")
)
def test_a_sum_is_exact_up_to_half_a_place_a_client(clients, exponent, seed, dtype):
    rng = np.random.default_rng(seed)
    values = (rng.uniform(-1, 1, (clients, 20)) * 2.0**exponent).astype(dtype)
    places = places_for(exponent, clients)
    total = sum(encode(each, places, clients) for each in values)
    exact = np.array([sum(map(float, column)) for column in values.T])  # float64 rounds here, too
    rounding = 2.0**-50 * clients * 2.0**exponent
    assert np.abs(decode(total, places) - exact).max() <= clients * 2.0 ** -(places + 1) + rounding


def test_the_largest_values_there_may_be_do_not_overflow():
    for clients in (1, 2, 3, 16, 100):
        largest = np.array([2.0**10, -(2.0**10)])
        total = sum(encode(largest, places_for(10, clients), clients) for _ in range(clients))
        assert decode(total, places_for(10, clients)).tolist() == [clients * 1024.0, clients * -1024.0]


def test_what_would_overflow_is_refused():
    with pytest.raises(OutOfRangeError, match=r"2.1e\+03 is too large for 48 binary places"):
        encode(np.array([2100.0]), places_for(10, 16), 16)


def test_whole_numbers_stay_what_they_are():
    assert encode(np.array([3, -2]), 17, 4).tolist() == [3, -2]


# --- masks -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 3, 8, 9, 30])
def test_masks_cancel_in_the_sum_of_all_and_in_no_other(size):
    members = parties(size)
    cohort = make_cohort(members)
    values = np.random.default_rng(0).integers(-(2**40), 2**40, (size, 70_000))  # more than a chunk
    sent = masked(values, cohort, members)
    assert np.array_equal(sent.sum(axis=0), values.sum(axis=0))
    for few in (range(1), range(size - 1), range(1, size)):
        wrong = sent[few].sum(axis=0) != values[few].sum(axis=0)
        assert wrong.mean() > 0.999


def test_masks_look_like_noise():
    cohort = make_cohort(members := parties(3))
    sent = masked(np.zeros((3, 100_000), np.int64), cohort, members)
    for each in sent:
        bits = np.unpackbits(each.view(np.uint8)).reshape(-1, 8)
        assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.004
        assert np.abs(np.corrcoef(sent.astype(float)) - np.eye(3)).max() < 0.6  # of three that add up to zero


def test_every_stage_and_attempt_has_masks_of_its_own():
    members, zeros = parties(3), np.zeros((3, 100), np.int64)
    first, second = make_cohort(members), make_cohort(members, attempt=2)
    found = [masked(zeros, first, members), masked(zeros, first, members, "other"), masked(zeros, second, members)]
    assert np.array_equal(found[0], masked(zeros, first, members))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (found[a] != found[b]).mean() > 0.99


@settings(max_examples=50)
@given(size=st.integers(2, 80), degree=st.integers(2, 20))
def test_neighbours_are_mutual_and_everyone_is_reached(size, degree):
    options = SecureAggregation(neighbours=degree)
    keys = np.random.default_rng(size).integers(0, 256, (size, 32)).astype(np.uint8)
    cohort = make_cohort([Party("run")] * size, options=options, keys=keys)
    table = cohort.neighbours()
    assert table.shape == (size, min(degree + degree % 2, size - 1))
    for at, row in enumerate(table.tolist()):
        assert at not in row
        assert len(set(row)) == len(row)
        assert all(at in table[other] for other in row)
    reached, new = {0}, {0}
    while new:
        new = {other for at in new for other in table[at].tolist()} - reached
        reached |= new
    assert len(reached) == size


def test_many_clients_have_few_neighbours():
    assert [OPTIONS.degree(n) for n in (2, 3, 8, 16, 128, 1000)] == [1, 2, 6, 8, 14, 20]


# --- what a client agrees to -----------------------------------------------------------------------------------------
def agree(party, cohort, client=0, stage="backward", version="w1", rows=ROWS, data="train", options=OPTIONS):
    party.agree(cohort, options, client, stage, version, np.asarray(rows), data)


def test_an_example_is_given_once_at_the_same_weights():
    members = parties(4)
    agree(members[0], make_cohort(members))
    agree(members[0], make_cohort(members), stage="another")
    with pytest.raises(ProtocolError, match="examples of an earlier attempt are asked for again"):
        agree(members[0], make_cohort(members[:3], attempt=2), rows=[9, 4])
    agree(members[0], make_cohort(members[:3], attempt=3), rows=[9, 5])
    with pytest.raises(ProtocolError, match="asked for again"):
        agree(members[0], make_cohort(members[:3], attempt=4), rows=[9])
    agree(members[0], make_cohort(members[:3], attempt=5), rows=[9], data="test")
    agree(members[0], make_cohort(members[:3], attempt=6), rows=ROWS, version="w2")


def test_in_an_attempt_each_stage_is_answered_once_and_in_one_cohort():
    members = parties(4)
    agree(members[0], make_cohort(members, attempt=2))
    for cohort, stage in (
        (make_cohort(members, attempt=2), "backward"),
        (make_cohort(members[:3], attempt=2), "another"),
        (make_cohort(members, attempt=2, counts=np.array([5, 5, 5, 6])), "another"),
    ):
        with pytest.raises(ProtocolError, match="attempt 2 was answered"):
            agree(members[0], cohort, stage=stage)
    with pytest.raises(ProtocolError, match="attempt 1 comes after attempt 2"):
        agree(members[0], make_cohort(members, attempt=1), version="w2")


@pytest.mark.parametrize(
    ("changes", "options", "message", "kind"),
    [
        ({"session": "another"}, OPTIONS, "must name this client's key", Kind.KEY),
        ({"keys": np.zeros((4, 32), np.uint8)}, OPTIONS, "must name this client's key", Kind.KEY),
        ({"clients": np.arange(4) + 1}, OPTIONS, "must name this client's key", Kind.KEY),
        ({}, SecureAggregation(least=5), "4 clients take part, this client gives sums of at least 5", Kind.MALFORMED),
        ({"degree": 0}, OPTIONS, "masks with 0 neighbours, this client with 3", Kind.MALFORMED),
        ({"clients": np.array([0, 3, 3, 6])}, OPTIONS, "named once each", Kind.MALFORMED),
    ],
)
def test_what_a_client_does_not_agree_to(changes, options, message, kind):
    members = parties(4)
    with pytest.raises(ProtocolError, match=message) as error:
        agree(members[0], make_cohort(members, **changes), options=options)
    assert error.value.kind is kind


def test_one_key_under_two_names_is_refused():
    members = parties(3)
    with pytest.raises(ProtocolError, match="a key of their own"):
        agree(members[0], make_cohort([members[0], members[1], members[1]]))


def test_a_key_without_a_secret_is_refused():
    members = parties(3)
    keys = make_cohort(members).keys.copy()
    keys[1] = 0
    with pytest.raises(ProtocolError, match="a key that no mask can be made with"):
        members[0].add_masks(np.zeros(3, np.int64), make_cohort(members, keys=keys), "backward", 0, [1, 2])


def test_another_process_goes_on_where_one_has_ended():
    members = parties(4)
    agree(members[0], cohort := make_cohort(members))
    state = members[0].state_dict()
    again = Party(state["session"], state["private"])
    again.load_state_dict(state)
    assert again.key == members[0].key
    with pytest.raises(ProtocolError, match="was answered"):
        agree(again, cohort)
    with pytest.raises(ProtocolError, match="asked for again"):
        agree(again, make_cohort(members, attempt=2))
    sent = [np.zeros(9, np.int64) for _ in range(2)]
    for numbers, party in zip(sent, (members[0], again), strict=True):
        party.add_masks(numbers, cohort, "backward", 0, [1, 2])
    assert np.array_equal(*sent)


def test_keys_are_told_apart_by_their_fingerprints():
    first, second = (fingerprint(party.key) for party in parties(2))
    assert first != second
    assert len(first) == len("1a2b-3c4d-5e6f-7081")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SecureAggregation(least=1), "least must be"),
        (lambda: SecureAggregation(neighbours=1), "neighbours must be"),
        (lambda: secure_options("yes"), "must be True, False or a SecureAggregation, got 'yes'"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
