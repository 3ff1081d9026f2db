"""Who takes part: clients that fail, lose what they keep, make mistakes, cannot read, are given up, and are back."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from psl_flower.errors import MembershipError
from psl_flower.failures import Failure, Kind
from psl_flower.protocol import Description
from psl_flower.strategy.membership import Membership

TIMEOUT, LOST, RAISED = (Failure(kind, "x") for kind in (Kind.TIMEOUT, Kind.LEFT_OUT, Kind.RAISED))


def described(size=10, test=0, counts=None, left_out=None):
    columns = [] if counts is None else [counts, counts.values()]
    labels, numbers = [np.array(list(c), dtype=np.int64) for c in columns] or (None, None)
    return Description(0, size, test, labels, numbers, left_out=left_out or {})


class Clients:
    """Clients 0, 1, ... as they describe themselves."""

    def __init__(self, *descriptions, label_counts=False):
        self.members = {k: SimpleNamespace(client=k, description=d) for k, d in enumerate(descriptions)}
        self.by_class, self.given_up = label_counts, None

    def name(self, client):
        return f"client {client}"

    def counts_of(self, member):
        return member.description.labels, member.description.counts

    def refresh(self, min_nodes, timeout, given_up):
        self.given_up = set(given_up)

    def look_again(self, timeout):
        return [len(self.members) - 1]


def four():
    return Membership(Clients(*(described(size) for size in (7, 8, 9, 0))))


IDS = np.arange(4)


# --- what samplers read ----------------------------------------------------------------------------------------------
def test_population_is_in_ascending_id_with_sizes():
    population = four().population()
    np.testing.assert_array_equal(population.client_ids, IDS)
    np.testing.assert_array_equal(population.sizes, [7, 8, 9, 0])
    assert population.label_counts is None


def test_population_with_label_counts():
    some = [described(10, counts={0: 4, 3: 6}), described(0, counts={}), described(2, counts={1: 2})]
    population = Membership(Clients(*some, label_counts=True)).population()
    np.testing.assert_array_equal(population.label_counts, [[4, 0, 0, 6], [0, 0, 0, 0], [0, 2, 0, 0]])
    assert Membership(Clients(*some)).population().label_counts is None  # nobody has asked for them


def test_clients_without_any_data_are_no_population():
    with pytest.raises(MembershipError, match="none of the 2 clients holds a training example"):
        Membership(Clients(described(0), described(0))).population()


def test_those_that_join_are_added_with_their_classes():
    clients = Clients(described(4, counts={0: 4}), label_counts=True)
    membership = Membership(clients)
    before = membership.population()
    clients.members[1] = SimpleNamespace(client=1, description=described(3, counts={1: 2, 2: 1}))
    after = membership.population_with(before, membership.look_again(1.0))
    assert (after.client_ids.tolist(), after.sizes.tolist()) == ([0, 1], [4, 3])
    np.testing.assert_array_equal(after.label_counts, [[4, 0, 0], [0, 2, 1]])


# --- who takes part --------------------------------------------------------------------------------------------------
def test_who_made_a_mistake_is_excluded_for_good(caplog):
    membership = four()
    membership.exclude({1: RAISED})
    assert "left out for the rest of the run, for a mistake: client 1: x" in caplog.text
    membership.begin_round()
    assert membership.taking_part(IDS).tolist() == [0, 2, 3]
    assert membership.population().client_ids.tolist() == [0, 2, 3]
    assert not membership.nobody_left()
    membership.exclude({0: RAISED, 2: RAISED})
    assert membership.nobody_left()  # client 3 has no data
    with pytest.raises(MembershipError, match="holds a training example"):
        membership.population()


def test_who_has_lost_what_it_keeps_is_out_until_the_next_round():
    membership = four()
    membership.next_attempt()
    membership.attempted({2: LOST}, done=[0])
    assert membership.taking_part(IDS).tolist() == [0, 1, 3]
    membership.begin_round()
    assert membership.taking_part(IDS).tolist() == [0, 1, 2, 3]


def test_who_fails_again_and_again_backs_off_unless_all_do():
    membership = four()
    for _ in range(2):
        assert membership.at_once(IDS).tolist() == [0, 1, 2, 3]
        membership.next_attempt()
        membership.attempted({1: TIMEOUT, 2: Failure(Kind.UNREADABLE, "x", {0: "x"})}, done=[0, 3])
    assert membership.failing() == {1}  # rows that cannot be read are no failure of the client
    assert membership.at_once(IDS).tolist() == [0, 2, 3]
    assert membership.at_once(IDS, least=4).tolist() == [0, 1, 2, 3]
    assert membership.at_once(np.array([1])).tolist() == [1]
    membership.next_attempt()
    membership.attempted({}, done=[1])
    assert membership.failing() == set()
    assert membership.at_once(IDS).tolist() == [0, 1, 2, 3]


def test_who_still_owes_at_the_end_of_an_epoch_is_given_up_until_it_is_in_a_step():
    membership = four()
    assert not membership.hopeless(np.array([0]))
    membership.end_epoch(unseen={0: 7, 1: 3}, held={0: 7, 1: 8, 2: 9, 3: 0})
    assert membership.hopeless(np.array([0, 1]))
    assert not membership.hopeless(np.array([0, 2]))
    membership.refresh(1, 5.0)
    assert membership.clients.given_up == {0}  # it gave nothing at all: no member once its node has left
    membership.next_attempt()
    membership.attempted({}, done=[1])
    assert not membership.hopeless(np.array([0, 1]))


# --- examples that cannot be read ------------------------------------------------------------------------------------
def test_unreadable_examples_are_left_out_once_and_only_those_that_are_held(caplog):
    membership = four()
    failure = Failure(Kind.UNREADABLE, "", {2: "torn", 6: "gone", 7: "never was", -1: "nor this"}, {2: 5})
    assert membership.leave_out_rows(0, failure) == [2, 6]
    assert membership.leave_out_rows(0, failure) == []
    assert membership.leave_out_rows(9, failure) == []  # no member
    assert membership.unreadable.rows == {0: (2, 6)}
    assert membership.population().sizes.tolist() == [5, 8, 9, 0]
    assert caplog.text.count("client 0: example 2 is left out: torn") == 1


def test_classes_of_unreadable_examples_are_not_counted_where_they_are_known():
    told = described(5, counts={0: 3, 1: 1}, left_out={4: "torn"})  # when it described itself
    known, unknown = described(5, counts={0: 3, 1: 2}), described(5, counts={0: 3, 1: 2})
    membership = Membership(Clients(told, known, unknown, label_counts=True))
    membership.refresh(1, 5.0)
    assert membership.leave_out_rows(1, Failure(Kind.UNREADABLE, "", {4: "torn"}, {4: 1})) == [4]
    assert membership.leave_out_rows(2, Failure(Kind.UNREADABLE, "", {4: "torn"})) == [4]
    population = membership.population()
    assert population.sizes.tolist() == [4, 4, 4]
    assert population.label_counts[:2].tolist() == [[3, 1], [3, 1]]
    assert population.label_counts[2].sum() == 4


def test_test_examples_are_left_out_apart_from_training_examples():
    membership = Membership(Clients(described(5, test=3), described(5, test=1), described(5)))
    assert membership.test_sizes() == {0: 3, 1: 1}
    assert membership.leave_out_rows(1, Failure(Kind.UNREADABLE, "", {0: "torn"}), test=True) == [0]
    assert membership.test_sizes() == {0: 3}
    assert membership.population().sizes.tolist() == [5, 5, 5]
    membership.exclude({0: RAISED})
    assert membership.test_sizes() == {}


# --- checkpoints -----------------------------------------------------------------------------------------------------
def test_a_membership_goes_on_where_it_was():
    before = four()
    before.exclude({0: RAISED})
    before.leave_out_rows(1, Failure(Kind.UNREADABLE, "", {3: "torn"}, {3: 1}))
    before.end_epoch(unseen={1: 8, 2: 1}, held={0: 7, 1: 8, 2: 9, 3: 0})
    for _ in range(2):
        before.next_attempt()
        before.attempted({2: TIMEOUT}, done=[3])
    before.leave_out_of_round({3: LOST})
    after = four()
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()
    json.dumps(after.state_dict())  # plain numbers
    assert after.taking_part(IDS).tolist() == [1, 2]
    assert after.at_once(IDS).tolist() == [0, 1, 3]
    assert after.population().sizes.tolist() == [7, 9, 0]
    assert after.hopeless(np.array([1, 2]))
