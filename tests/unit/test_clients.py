"""Who the clients are, when the answers and the nodes come and go as they like."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from psl_flower.data import ClassNumbers
from psl_flower.errors import MembershipError
from psl_flower.exchange import Carrier, Clients, clients
from psl_flower.failures import Failure, Kind
from psl_flower.protocol import DESCRIBE, MAX_CLASSES, MAX_EXAMPLES, Description, Part, Reply, Request


class FakeCarrier(Carrier):
    """Nodes by id; `looks` are the nodes connected at each look, the last of them for ever."""

    def __init__(self, nodes, looks=None):
        self.nodes, self.looks, self.asked = nodes, list(looks or []), []

    def node_ids(self):
        if len(self.looks) > 1:
            return self.looks.pop(0)
        return self.looks[0] if self.looks else list(self.nodes)

    def exchange(self, request, timeout):
        self.asked.append((request, timeout))
        reply = Reply()
        for node in request.nodes:
            answer = self.nodes[node]
            answer = failed(node, "no reply within 5 s") if answer == SILENT else answer
            reply.add(answer if isinstance(answer, Reply) else Reply(descriptions={node: answer}))
        return reply


def failed(node, why):
    return Reply(failures={node: Failure(Kind.TIMEOUT, why)})


def ask(*clients):
    return Request(stage=DESCRIBE, nodes=clients)


def described(partition, size=10, test=0, counts=None):
    labels = None if counts is None else np.array(list(counts), dtype=np.int64)
    numbers = None if counts is None else np.array(list(counts.values()), dtype=np.int64)
    return Description(partition, size, test, labels, numbers)


def refreshed(nodes, *, label_counts=False, min_nodes=1, config=None):
    members = Clients(FakeCarrier(nodes), label_counts=label_counts, config=config)
    members.refresh(min_nodes, 5.0)
    return members


def test_a_model_that_may_be_another_is_told_once(caplog):
    def signed(function):
        parts = {"client": {"tensors": 2, "values": 30, "digest": "d", "calls": {function: 2}}}
        return {"cut": "2", "tail": None, "by": "2.9", "parts": parts}

    nodes = {node: replace(described(node), model=json.dumps(signed("softmax"))) for node in range(3)}
    members = Clients(FakeCarrier(nodes), label_counts=False, model=signed("scaled_dot_product_attention"))
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        members.refresh(1, 5.0)
    assert len(members.members) == 3
    assert caplog.text.count("the server and client 0 do not call the same functions of torch") == 1
    assert caplog.text.count("call the same functions") == 1


# --- numbers of classes ----------------------------------------------------------------------------------------------
COMPLETE, LACKING, FIRST = (
    {name: i for i, name in enumerate(names)} for names in (("a", "b", "c"), ("a", "c"), ("a",))
)


def naming(numbers, *, sure=True):
    """Return a description of each client, by node, whose data have these numbers by name."""
    told = [each and ClassNumbers(each, sure).digests() for each in numbers]
    return {70 + k: replace(described(k), classes=each) for k, each in enumerate(told)}


@pytest.mark.parametrize(
    ("numbers", "refused", "said"),
    [
        (
            (LACKING, COMPLETE, COMPLETE),
            0,
            r"one that is 1 here, of 2 classes, is 2 on client 1 \(node 71\) and 1 more, of 3",
        ),
        ((COMPLETE, LACKING), 1, r"one that is 1 here, of 2 classes, is 2 on client 0 \(node 70\), of 3: number all"),
    ],
)
def test_who_numbers_classes_otherwise_than_most_is_refused(numbers, refused, said):
    with pytest.raises(MembershipError, match=rf"client {refused} \(node 7{refused}\): a class must have .*{said}"):
        refreshed(naming(numbers))


@pytest.mark.parametrize(
    "numbers",
    [(COMPLETE, COMPLETE), (COMPLETE, FIRST, None), ({"a": 0, "c": 2}, {"b": 1}, COMPLETE), (None, None)],
)
def test_clients_that_agree_as_far_as_they_tell_are_let_in(numbers, caplog):
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        assert len(refreshed(naming(numbers)).members) == len(numbers)
    assert not caplog.records


@pytest.mark.parametrize(
    ("numbers", "sure", "said"),
    [
        ((COMPLETE, LACKING, LACKING), False, "a class that is 1 on client 1 (node 71) is 2 on client 0 (node 70), as"),
        (
            ({"neg": 0}, {"negative": 0}),
            True,
            "class 0 has another name on client 1 (node 71) than on client 0 (node 70)",
        ),
    ],
)
def test_that_clients_may_number_classes_otherwise_is_told_once(numbers, sure, said, caplog):
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        members = refreshed(naming(numbers, sure=sure))
        members.refresh(1, 5.0)
    assert len(members.members) == len(numbers)
    assert [said in record.getMessage() for record in caplog.records] == [True]


def test_newcomers_cannot_outvote_members_and_a_client_may_come_back_with_better_data(caplog):
    nodes = naming((COMPLETE, COMPLETE, LACKING, LACKING, LACKING))
    carrier = FakeCarrier(nodes, looks=[[70, 71], [70, 71, 72, 73, 74], [70, 71, 72, 73, 74]])
    members = Clients(carrier, label_counts=False, tolerate=True)
    members.refresh(1, 5.0)
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        assert members.look_again(5.0) == []
    assert "client 2 (node 72) and 2 others likewise: a class must have the same number" in caplog.text
    nodes[72] = replace(nodes[72], classes=nodes[70].classes)
    members.refresh(1, 5.0)
    assert list(members.members) == [0, 1, 2]


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now, sleeps = 0.0, []

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            assert seconds >= 0
            self.sleeps.append(seconds)
            self.now += seconds

    clock = Clock()
    clock.sleeps = []
    monkeypatch.setattr(clients, "time", clock)
    return clock


def test_clients_are_in_ascending_id_whatever_their_nodes():
    members = refreshed({70: described(1, 11), 50: described(2, 12), 60: described(0, 10)})
    assert list(members.members) == [0, 1, 2]
    assert [m.node for m in members.members.values()] == [60, 70, 50]


def test_the_question_carries_the_config():
    members = refreshed({5: described(0)}, config={"data": "mnist"})
    ((request, timeout),) = members._carrier.asked
    assert (request.stage, request.nodes, request.message_type) == (DESCRIBE, (5,), "query.describe")
    assert (request.label_counts, request.config, timeout) == (False, {"data": "mnist"}, 5.0)


def test_duplicate_ids_are_refused():
    message = "partition-id must be unique, nodes 5 and 9 both report 3: give each node a partition of its own"
    with pytest.raises(MembershipError, match=message):
        refreshed({5: described(3), 7: described(1), 9: described(3)})


def test_a_mixture_of_present_and_absent_ids_is_refused():
    with pytest.raises(
        MembershipError, match=r"all nodes or none .*1 of 3 do not \(the first is node 7\).*--node-config"
    ):
        refreshed({5: described(3), 7: described(None), 9: described(1)})


def test_without_ids_clients_are_numbered_by_node_and_a_warning_says_so_once(caplog):
    carrier = FakeCarrier({90: described(None, 9), 20: described(None, 2), 50: described(None, 5)})
    members = Clients(carrier, label_counts=False)
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        members.refresh(1, 5.0)
        members.refresh(1, 5.0)
    assert [(m.client, m.node) for m in members.members.values()] == [(0, 20), (1, 50), (2, 90)]
    assert caplog.text.count("No node reports a partition-id") == 1


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({5: failed(5, "no reply within 5 s")}, "node 5: no reply within 5 s"),
        ({5: Reply([Part((5,))])}, "node 5: not a description"),
        ({5: described(-1)}, "node 5: partition-id must not be negative, got -1"),
        ({5: described(0, -3)}, r"client 0 \(node 5\): num_examples must be from 0 to 1000000000, got -3"),
        ({5: described(0, 3, -1)}, "num_test_examples must be from 0 to 1000000000, got -1"),
        ({5: described(0, MAX_EXAMPLES + 1)}, "num_examples must be from 0 to 1000000000, got 1000000001"),
    ],
)
def test_a_node_that_does_not_describe_itself_is_named(nodes, message):
    with pytest.raises(MembershipError, match=message):
        refreshed({4: described(9), **nodes})


def test_all_that_failed_are_named():
    with pytest.raises(MembershipError, match=r"node 4: left\n  node 6: crashed"):
        refreshed({4: failed(4, "left"), 5: described(0), 6: failed(6, "crashed")})


# --- label counts ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("description", "message"),
    [
        (described(0, 3), "expected one count for each label"),
        (Description(0, 3, 0, np.array([0, 1]), np.array([3])), "expected one count for each label"),
        (Description(0, 3, 0, np.array([[0]]), np.array([[3]])), "expected one count for each label"),
        (described(0, 3, counts={-1: 3}), "must not be negative"),
        (described(0, 3, counts={0: 4, 1: -1}), "must not be negative"),
        (described(0, 3, counts={MAX_CLASSES: 3}), f"labels must be below {MAX_CLASSES}, got {MAX_CLASSES}"),
        (Description(0, 4, 0, np.array([1, 1]), np.array([2, 2])), "labels must be unique"),
        (described(0, 3, counts={0: 1, 1: 1}), "label counts add up to 2, 3 examples can be read"),
        (described(0, 4, counts=dict.fromkeys(range(4), 2**62) | {5: 4}), "label counts add up to"),
    ],
)
def test_impossible_label_counts_are_refused(description, message):
    with pytest.raises(MembershipError, match=message):
        refreshed({5: description}, label_counts=True)


# --- coming and going ------------------------------------------------------------------------------------------------
def test_waits_for_nodes_with_growing_pauses(clock):
    carrier = FakeCarrier({n: described(n) for n in range(3)}, looks=[[], [0], [0], [0, 1], [0, 1, 2]])
    members = Clients(carrier, label_counts=False)
    members.refresh(2, 30.0)
    assert list(members.members) == [0, 1]
    assert clock.sleeps == [0.001, 0.002, 0.004]


def test_gives_up_waiting_at_the_timeout(clock, caplog):
    members = Clients(FakeCarrier({1: described(0)}), label_counts=False)
    with (
        caplog.at_level(logging.INFO, "flwr.psl_flower"),
        pytest.raises(MembershipError, match="min_available_nodes is 2, 1 connected within 30 s: start more nodes"),
    ):
        members.refresh(2, 30.0)
    assert clock.now == pytest.approx(30.0)
    assert len(clock.sleeps) < 50
    assert caplog.text.count("Waiting for nodes to connect: 1 connected (minimum required: 2)") in (3, 4)


def test_enough_nodes_at_once_do_not_wait(clock):
    refreshed({1: described(0), 2: described(1)}, min_nodes=2)
    assert clock.sleeps == []


def test_only_new_nodes_are_described():
    carrier = FakeCarrier({n: described(n) for n in range(3)}, looks=[[0, 1], [0, 1], [0, 1, 2]])
    members = Clients(carrier, label_counts=False)
    for _ in range(3):
        members.refresh(1, 5.0)
    assert [request.nodes for request, _ in carrier.asked] == [(0, 1), (), (2,)]
    assert list(members.members) == [0, 1, 2]


def test_a_client_that_left_is_reported_and_may_come_back(caplog):
    carrier = FakeCarrier({n: described(n + 10) for n in range(3)}, looks=[[0, 1, 2], [0, 2], [0, 1, 2]])
    members = Clients(carrier, label_counts=False)
    members.refresh(1, 5.0)
    members.refresh(1, 5.0)
    assert list(members.members) == [10, 12]
    assert "clients that left: 11" in caplog.text
    members.refresh(1, 5.0)
    assert list(members.members) == [10, 11, 12]
    assert sum(len(request.nodes) for request, _ in carrier.asked) == 3  # its description is still known


def test_a_replaced_node_takes_over_the_id_of_one_that_left():
    carrier = FakeCarrier({5: described(0, 7), 6: described(0, 8)}, looks=[[5], [6]])
    members = Clients(carrier, label_counts=False)
    members.refresh(1, 5.0)
    members.refresh(1, 5.0)
    assert members.members[0].node == 6
    assert members.members[0].description.num_examples == 8


# --- exchange --------------------------------------------------------------------------------------------------------
def test_exchange_speaks_of_clients():
    members = refreshed({70: described(0), 60: described(1), 50: described(2)})
    reply = members.exchange(ask(0, 2), 9.0)
    request, timeout = members._carrier.asked[-1]
    assert (request.nodes, timeout) == ((70, 50), 9.0)
    assert {client: d.partition_id for client, d in reply.descriptions.items()} == {0: 0, 2: 2}


# --- clients that fail, leave and come back ---------------------------------------------------------------------------
SILENT = "silent"


def tolerant(nodes, looks):
    carrier = FakeCarrier(nodes, looks)
    members = Clients(carrier, label_counts=False, tolerate=True)
    members.refresh(1, 5.0)
    return members, carrier


def test_a_node_that_does_not_describe_itself_is_left_out_until_the_next_refresh(caplog):
    members, carrier = tolerant({1: described(0), 2: SILENT}, [[1, 2]])
    assert list(members.members) == [0]
    assert "going on without it: node 2: no reply within 5 s" in caplog.text
    carrier.nodes[2] = described(1)
    assert members.look_again(5.0) == []  # it has been asked
    members.refresh(1, 5.0)
    assert list(members.members) == [0, 1]


def test_a_node_that_does_not_describe_itself_is_asked_again_ever_more_rarely():
    members, carrier = tolerant({1: described(0), 2: SILENT}, [[1, 2]])
    asked = []
    exchange = carrier.exchange

    def noted(request, timeout):
        asked.extend([members._looks] * (2 in request.nodes))
        return exchange(request, timeout)

    carrier.exchange = noted
    for _ in range(299):
        assert members.look_again(5.0) == []
    assert asked == [2, 6, 14, 30, 62, 126, 190, 254]
    carrier.nodes[2] = described(1)
    assert [members.look_again(5.0) for _ in range(20)].count([1]) == 1
    assert list(members.members) == [0, 1]


def test_too_few_that_describe_themselves_are_refused():
    members = Clients(FakeCarrier({1: described(0), 2: SILENT}), label_counts=False, tolerate=True)
    with pytest.raises(MembershipError, match=r"every client must describe itself:\n  node 2: no reply within 5 s"):
        members.refresh(2, 5.0)


def test_a_client_back_on_another_node_is_found_there():
    members, carrier = tolerant({1: described(0), 2: described(1), 9: described(1)}, [[1, 2], [1, 9]])
    assert members.look_again(5.0) == []
    assert [m.node for m in members.members.values()] == [1, 9]
    carrier.looks = [[1, 2, 9]]
    assert members.look_again(5.0) == []
    assert members.members[1].node == 9  # it speaks, and the other one is old


def test_a_client_is_not_taken_over_while_its_node_speaks():
    members, carrier = tolerant({1: described(0), 9: described(0)}, [[1], [1, 9]])
    members.look_again(5.0)
    assert members.members[0].node == 1
    carrier.nodes[1] = SILENT
    members.exchange(ask(0), 5.0)
    members.look_again(5.0)
    assert members.members[0].node == 9


def test_a_client_back_with_other_data_waits_for_the_next_refresh(caplog):
    members, _ = tolerant({1: described(0, 10), 2: described(1), 9: described(0, 11)}, [[1, 2], [2, 9]])
    members.look_again(5.0)
    assert members.members[0].node == 1
    assert "client 0 is back on node 9 with other data" in caplog.text
    members.refresh(1, 5.0)
    assert [m.description.num_examples for m in members.members.values()] == [11, 10]


def test_those_that_join_are_named():
    members, _ = tolerant({1: described(4), 2: described(7), 3: described(5)}, [[1], [1, 2, 3], [1, 2, 3]])
    assert members.look_again(5.0) == [7, 5]
    assert list(members.members) == [4, 5, 7]
    assert members.look_again(5.0) == []


def test_a_client_whose_node_left_stays_until_it_is_given_up():
    members, _ = tolerant({1: described(0), 2: described(1)}, [[1, 2], [1]])
    members.refresh(1, 5.0)
    assert list(members.members) == [0, 1]
    members.refresh(1, 5.0, given_up={1})
    assert list(members.members) == [0]


def test_the_ghost_of_a_restarted_node_is_no_duplicate():
    nodes = {1: described(0), 2: described(1), 9: described(1)}
    members, carrier = tolerant(nodes, [[1, 2]])
    carrier.nodes[2] = SILENT
    members.exchange(ask(1), 5.0)
    carrier.looks = [[1, 2, 9]]  # Flower takes a while to notice that node 2 is gone
    members.refresh(1, 5.0)
    assert [m.node for m in members.members.values()] == [1, 9]
    carrier.nodes[9] = SILENT
    members.exchange(ask(1), 5.0)
    members.refresh(1, 5.0)  # neither speaks: where it was last
    assert [m.node for m in members.members.values()] == [1, 9]


def test_a_client_that_is_no_member_gets_an_answer():
    members, _ = tolerant({1: described(0)}, [[1]])
    reply = members.exchange(ask(0, 3), 5.0)
    assert list(reply.descriptions) == [0]
    assert reply.failures == {3: Failure(Kind.UNREACHABLE, "it is not connected")}
    assert members.exchange(ask(3, 4), 5.0).failures.keys() == {3, 4}


def test_where_no_more_nodes_can_come_too_few_are_too_few_soon(clock):
    members = Clients(FakeCarrier({1: described(0)}), label_counts=False, may_grow=False)
    with pytest.raises(MembershipError, match="min_available_nodes is 2, there are 1 nodes, and no more can come"):
        members.refresh(2, 3600.0)
    assert clock.now < 5


# --- nodes that take what is another's -------------------------------------------------------------------------------
class Refusing(FakeCarrier):
    refused = ()

    def refuse(self, node, reason):
        self.refused = (*self.refused, (node, reason))


def test_where_faults_are_tolerated_the_first_of_two_nodes_with_one_id_is_kept(caplog):
    carrier = Refusing({4: described(0), 7: described(1, size=5), 9: described(1, size=99)})
    members = Clients(carrier, label_counts=False, tolerate=True)
    members.refresh(2, 5.0)
    assert {client: member.node for client, member in members.members.items()} == {0: 4, 1: 7}
    assert carrier.refused == ((9, "partition-id must be unique, 1 is that of node 7"),)
    assert "node 9 is refused: partition-id must be unique, 1 is that of node 7" in caplog.text


def test_a_newcomer_does_not_take_a_members_place_in_a_later_round(caplog):
    carrier = Refusing({4: described(0), 7: described(1, size=5)})
    members = Clients(carrier, label_counts=False, tolerate=True)
    members.refresh(2, 5.0)
    carrier.nodes = {2: described(1, size=99), 3: described(None), **carrier.nodes}
    for _ in range(2):
        members.refresh(2, 5.0)
        assert {client: member.node for client, member in members.members.items()} == {0: 4, 1: 7}
    assert caplog.text.count("node 2 is refused") == 1
    assert caplog.text.count("node 3 is refused: it reports no partition-id, the others do") == 1
    assert dict(carrier.refused).keys() == {2, 3}


def test_too_few_are_left_where_all_have_one_id():
    members = Clients(Refusing({4: described(0), 7: described(0)}), label_counts=False, tolerate=True)
    with pytest.raises(
        MembershipError, match="min_available_nodes is 2, 1 are left: node 7: partition-id must be unique"
    ):
        members.refresh(2, 5.0)


def test_a_client_that_does_not_describe_itself_anew_is_told_of_and_stays(caplog):
    carrier = Refusing({4: described(0), 7: described(1, size=5)})
    members = Clients(carrier, label_counts=False, tolerate=True)
    members.refresh(2, 5.0)
    carrier.nodes[7] = failed(7, "no reply within 5 s")
    members.describe_again([1], 5.0)
    assert "it is asked again later: node 7: no reply within 5 s" in caplog.text
    assert members.members[1].description.num_examples == 5
