"""The message carrier against a grid that does everything a grid may do, on a clock that never really waits."""

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from psl_flower.exchange import MessageCarrier, messages
from psl_flower.exchange.codec import WeightStore, decode_request, encode_reply
from psl_flower.exchange.records import content_to_frame, frame_to_content
from psl_flower.failures import Kind
from psl_flower.flower import ERROR_CLIENT_APP, become_server
from psl_flower.protocol import DESCRIBE, Description, Leaf, Orders, Part, Reply, Request, Weights
from psl_flower.protocol import Kind as LeafKind


class Clock:
    """Stands in for the time module: sleeping moves it on, and so does every pull."""

    def __init__(self):
        self.now = 0.0
        self.sleeps = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.sleeps.append(seconds)
        self.now += seconds


class FakeGrid(Grid):
    """Answers each message after the delay given for its node; None: never."""

    def __init__(self, clock, delays, *, ids=lambda ids: ids, numbered=False, reply=None, pull_seconds=0.0):
        self.clock, self.delays, self.change_ids, self.numbered = clock, delays, ids, numbered
        self.reply = reply or (lambda message: description(message, message.metadata.dst_node_id))
        self.pull_seconds = pull_seconds
        self.pushed, self.due, self.pulls, self.extra = {}, {}, 0, []
        become_server(1, 1)

    def push_messages(self, messages):
        for message in messages:
            message_id = f"m{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = message_id
            self.pushed[message_id] = message
            delay = self.delays.get(message.metadata.dst_node_id, 0.0)
            if delay is not None:
                self.due[message_id] = self.clock.now + delay
        ids = self.change_ids(list(self.pushed))
        if not self.numbered:
            for message in self.pushed.values():
                message.metadata.__dict__["_message_id"] = ""
        return ids

    def pull_messages(self, message_ids):
        self.pulls += 1
        self.clock.now += self.pull_seconds
        assert len(set(message_ids)) == len(message_ids)
        ready = [i for i in message_ids if self.due.get(i, float("inf")) <= self.clock.now]
        replies, self.extra = self.extra, []
        for message_id in ready:
            del self.due[message_id]
            message = self.pushed[message_id]
            message.metadata.__dict__["_message_id"] = message_id
            replies.append(self.reply(message))
        return replies

    def get_node_ids(self):
        return [5, 3, 4]

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("send_and_receive sleeps for seconds: never on the step path")

    def create_message(self, *args, **kwargs):
        raise AssertionError("deprecated")

    def set_run(self, run):
        pass

    @property
    def run(self):
        return None


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(messages, "time", clock)
    return clock


def answer(message, make):
    """Return the reply to a message, given what makes it of the node asked."""
    _, _, request = decode_request(content_to_frame(message.content), WeightStore())
    (node,) = request.nodes
    assert node == message.metadata.dst_node_id
    return Message(frame_to_content(encode_reply(0, make(node), request)), reply_to=message)


def description(message, size, seconds=1e9):
    """Return a description; by default it claims to have been worked on for ages."""
    return answer(message, lambda node: Reply(descriptions={node: Description(None, size, 0)}, seconds={node: seconds}))


NODES = (3, 4, 5)
REQUEST = Request(stage=DESCRIBE, nodes=NODES)


def exchange(grid, timeout=10.0, request=REQUEST):
    with MessageCarrier(grid) as carrier:
        reply = carrier.exchange(request, timeout)
    assert reply.answered() == set(request.nodes)
    assert reply.descriptions.keys().isdisjoint(reply.failures)
    return reply


def sizes(reply):
    return {node: description.num_examples for node, description in reply.descriptions.items()}


def failures(reply):
    return {node: failure.detail for node, failure in reply.failures.items()}


def test_all_answer_at_once(clock):
    grid = FakeGrid(clock, {})
    reply = exchange(grid)
    assert sizes(reply) == {3: 3, 4: 4, 5: 5}
    assert (grid.pulls, clock.sleeps) == (1, [])


def test_messages_are_what_the_protocol_says(clock):
    grid = FakeGrid(clock, {})
    exchange(grid, timeout=7.5)
    for node, message in zip(NODES, grid.pushed.values(), strict=True):
        assert (message.metadata.dst_node_id, message.metadata.message_type) == (node, "query.describe")
        assert message.metadata.ttl == 7.5
        assert message.metadata.group_id == "psl_flower"


def test_nothing_to_ask_asks_nothing(clock):
    grid = FakeGrid(clock, {})
    assert exchange(grid, request=Request(stage=DESCRIBE, nodes=())).answered() == set()
    assert (grid.pushed, grid.pulls) == ({}, 0)


def test_answers_carry_the_seconds_clients_worked(clock):
    grid = FakeGrid(clock, {3: 5.0}, reply=lambda message: description(message, 1, 2.5))
    assert exchange(grid, request=REQUEST.take([0])).seconds == {3: 2.5}


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_nonsense_seconds_are_a_bad_reply(clock, seconds):
    grid = FakeGrid(clock, {}, reply=lambda message: description(message, 1, seconds))
    assert failures(exchange(grid)) == dict.fromkeys(NODES, "bad reply: expected seconds, finite and not negative")


def test_no_client_worked_longer_than_it_was_waited_for(clock):
    reply = exchange(FakeGrid(clock, {3: 2.0, 4: 0.5, 5: 1.0}))
    assert sizes(reply) == {3: 3, 4: 4, 5: 5}
    for node, due in ((3, 2.0), (4, 0.5), (5, 1.0)):
        assert due <= reply.seconds[node] <= due * 1.06 + 0.001


@pytest.mark.parametrize("delay", [0.01, 0.1, 1.0, 10.0, 60.0, 3000.0])
def test_waiting_costs_little_and_pulls_stay_bounded(clock, delay):
    grid = FakeGrid(clock, dict.fromkeys(NODES, delay), pull_seconds=0.0002)
    reply = exchange(grid, timeout=3600)
    assert len(sizes(reply)) == 3
    assert clock.now <= delay * 1.06 + 0.0015  # at most a twentieth late
    assert grid.pulls <= 150 + delay / 0.25
    assert max(clock.sleeps) <= 0.25
    assert min(clock.sleeps) >= 0.001


def test_silence_ends_at_the_timeout(clock):
    grid = FakeGrid(clock, {3: None, 4: 0.1, 5: 8.0})
    reply = exchange(grid, timeout=5.0)
    assert sizes(reply) == {4: 4}
    assert failures(reply) == dict.fromkeys(
        (3, 5), "no reply within 5 s: raise step-timeout, or see whether the client still runs"
    )
    assert {reply.failures[node].kind for node in (3, 5)} == {Kind.TIMEOUT}
    assert clock.now == pytest.approx(5.0)


def test_a_reply_at_the_last_moment_counts(clock):
    assert sizes(exchange(FakeGrid(clock, {3: 5.0, 4: 4.99}), timeout=5.0)) == {3: 3, 4: 4, 5: 5}


def test_a_timeout_shorter_than_a_pull_still_pulls_once(clock):
    grid = FakeGrid(clock, {}, pull_seconds=1.0)
    assert len(sizes(exchange(grid, timeout=0.01))) == 3
    assert grid.pulls == 1


@pytest.mark.parametrize("ids", [lambda ids: None, lambda ids: [], lambda ids: ["", None, ""]])
def test_a_grid_that_accepts_nothing(clock, ids):
    grid = FakeGrid(clock, {}, ids=ids)
    reply = exchange(grid)
    assert tuple(failures(reply)) == NODES
    assert {failure.kind for failure in reply.failures.values()} == {Kind.UNREACHABLE}
    assert all("did not accept" in f for f in failures(reply).values())
    assert (grid.pulls, clock.sleeps) == (0, [])


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_id_marks_the_message_that_was_refused(clock, empty):
    reply = exchange(FakeGrid(clock, {}, ids=lambda ids: [ids[0], empty, ids[2]]))
    assert sizes(reply) == {3: 3, 5: 5}
    assert "did not accept" in failures(reply)[4]


@pytest.mark.parametrize("ids", [lambda ids: ids[1:], lambda ids: [None, *ids[2:]], lambda ids: (i for i in ids[:2])])
def test_fewer_ids_where_messages_are_numbered(clock, ids):
    grid = FakeGrid(clock, {}, ids=ids, numbered=True)
    accepted = {int(i[1]) + 3 for i in ids(["m0", "m1", "m2"]) if i}
    reply = exchange(grid)
    assert sizes(reply) == {node: node for node in accepted}
    assert set(failures(reply)) == set(NODES) - accepted


@pytest.mark.parametrize("ids", [lambda ids: ids[1:], lambda ids: [*ids, "m9"]])
def test_ids_that_do_not_say_which_message_they_are_of(clock, ids):
    grid = FakeGrid(clock, {}, ids=ids)
    count = len(ids(["m0", "m1", "m2"]))
    assert failures(exchange(grid)) == dict.fromkeys(
        NODES, f"Flower accepted {count} of 3 messages and does not say which"
    )
    assert grid.pulls == 0


@pytest.mark.parametrize(("code", "kind"), [(ERROR_CLIENT_APP, Kind.RAISED), (0, Kind.UNREACHABLE)])
def test_error_replies_name_code_and_reason(code, kind, clock):
    def reply(message):
        if message.metadata.dst_node_id == 4:
            return Message(Error(code, "ValueError: no data"), reply_to=message)
        return description(message, 1)

    found = exchange(FakeGrid(clock, {}, reply=reply))
    assert failures(found) == {4: f"error {code}: ValueError: no data"}
    assert found.failures[4].kind is kind
    assert found.bytes_received == 0


def test_undecodable_replies_fail_their_client_only(clock):
    def reply(message):
        bad = message.metadata.dst_node_id == 3
        return Message(RecordDict(), reply_to=message) if bad else description(message, 1)

    found = exchange(FakeGrid(clock, {}, reply=reply))
    assert failures(found) == {3: "bad reply: expected a frame, got records named nothing"}
    assert found.failures[3].kind is Kind.MALFORMED


def test_duplicate_and_unknown_replies_are_ignored(clock):
    grid = FakeGrid(clock, {3: 0.0, 4: 0.5, 5: 1.0})
    strangers = []

    def reply(message):
        found = description(message, message.metadata.dst_node_id)
        grid.extra.append(description(message, 99))  # the same reply again, with the next pull
        if not strangers:
            stranger = description(message, 98)
            stranger.metadata.__dict__["_reply_to_message_id"] = "never sent"
            strangers.append(stranger)
            grid.extra.append(stranger)
        return found

    grid.reply = reply
    assert sizes(exchange(grid)) == {3: 3, 4: 4, 5: 5}


def test_replies_of_an_earlier_exchange_are_ignored(clock):
    grid = FakeGrid(clock, {3: 20.0})
    carrier = MessageCarrier(grid)
    assert "no reply within" in failures(carrier.exchange(REQUEST.take([0]), 1.0))[3]
    late = description(grid.pushed["m0"], 77)
    late.metadata.__dict__["_reply_to_message_id"] = "m0"
    grid.delays, grid.extra = {3: 0.1}, [late]
    grid.change_ids = lambda ids: ids[-1:]
    assert sizes(carrier.exchange(REQUEST.take([0]), 1.0)) == {3: 3}


def forward_request(nodes):
    orders = Orders(
        clients=np.arange(len(nodes)), starts=np.zeros(len(nodes), int), counts=np.full(len(nodes), 2), step=0
    )
    weights = Weights({"w": torch.ones(3, 4)}, {"b": torch.ones(2)}, "v", "c")
    return Request(stage="forward", nodes=nodes, orders=orders, weights={"head": weights})


def test_bytes_count_tensors_both_ways(clock):
    def part(node):
        outputs = {"activations": Leaf(LeafKind.ROWS, torch.ones(2, 5)), "labels": Leaf(LeafKind.ROWS, torch.arange(2))}
        return Reply([Part((node,), outputs, 0)])

    grid = FakeGrid(clock, {4: None}, reply=lambda message: answer(message, part))
    reply = exchange(grid, 1.0, forward_request((3, 4)))
    assert {message.metadata.message_type for message in grid.pushed.values()} == {"train.forward"}
    assert reply.bytes_sent == 2 * (3 * 4 * 4 + 2 * 4)  # every message holds the weights
    assert reply.bytes_received == 2 * 5 * 4 + 2 * 8
    assert [part.nodes for part in reply.parts] == [(3,)]


def test_node_ids_are_the_grids(clock):
    assert list(MessageCarrier(FakeGrid(clock, {})).node_ids()) == [5, 3, 4]


# --- replies nobody waits for ----------------------------------------------------------------------------------------
def test_late_replies_and_duplicates_are_counted_and_dropped(clock):
    grid = FakeGrid(clock, {3: 12.0, 4: 0.5})
    with MessageCarrier(grid) as carrier:
        first = carrier.exchange(REQUEST, 10.0)
        assert list(first.failures) == [3]
        clock.now += 5.0  # the reply of node 3 comes now
        grid.delays = {}
        grid.change_ids = lambda ids: ids[3:]
        second = carrier.exchange(REQUEST, 10.0)
        assert second.failures == {}
        assert carrier.ignored == {"late": 1}
        grid.change_ids = lambda ids: ids[6:]
        for message_id in ("m3", "m4"):  # answered before
            message = grid.pushed[message_id]
            message.metadata.__dict__["_message_id"] = message_id
            grid.extra.append(grid.reply(message))
        carrier.exchange(REQUEST, 10.0)
        assert carrier.ignored == {"late": 1, "duplicate": 2}
