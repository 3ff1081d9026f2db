"""What the tests of faults share: a grid that injects them, and a record of which examples were really used."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

from flwr.app import Context, Error, Message
from support import CUT, NUM_CLASSES, client_sizes, load_partition, tiny_resnet

from psl_flower import InProcessGrid, SplitClient, split_client_app, tree
from psl_flower.exchange.codec import WeightStore, decode_reply, decode_request, encode_reply
from psl_flower.exchange.records import content_to_frame, frame_to_content
from psl_flower.flower import ERROR_CLIENT_APP
from psl_flower.protocol import ATTACH, Leaf
from psl_flower.strategy.step import StepRunner

FORWARD, BACKWARD, EVALUATE = "train.forward", "train.backward", "evaluate.forward"  # types of messages

DRAWN = {}  # (epoch, step, client): the indices that were drawn last


class RecordingClient(SplitClient):
    """Takes note of the examples of every training batch."""

    def draw(self, order):
        indices = super().draw(order)
        DRAWN[order.epoch, order.step, order.client] = indices
        return indices


class RecordingRunner(StepRunner):
    """Takes note of which clients were in each committed step, and of their examples."""

    latest = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        RecordingRunner.latest, self.committed = self, []

    def attempt(self, orders, waits):
        before = _version(self.backend)
        attempt = super().attempt(orders, waits)
        changed = _version(self.backend) != before
        assert changed == (attempt.record is not None)
        if changed:
            where = (orders.epoch, orders.step)
            drawn = {client: (n, DRAWN.get((*where, client))) for client, n in attempt.counts().items()}
            self.committed.append((orders.epoch, drawn))
        return attempt

    def used(self):
        """Return the examples that committed steps used, by (epoch, client), as often as they did."""
        found = defaultdict(list)
        for epoch, drawn in self.committed:
            for client, (count, indices) in drawn.items():
                assert len(indices) == count
                found[epoch, client] += indices.tolist()
        return found


def _version(backend):
    return next(iter(backend.weights().values())).version


def assert_each_used_once(runner, num_clients, num_epochs, but=()):
    """Assert that every example of every client was in one committed step of each epoch."""
    used = runner.used()
    for epoch in range(num_epochs):
        for client, size in enumerate(client_sizes(num_clients)):
            if (epoch, client) not in but:
                assert sorted(used[epoch, client]) == list(range(size)), (epoch, client)


def recording_app(data_fn=load_partition):
    DRAWN.clear()
    return split_client_app(tiny_resnet, cut=CUT, data_fn=data_fn, client_class=RecordingClient)


class FakeTime:
    """Stands in for `time`: a pause takes none."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


class FaultyGrid(InProcessGrid):
    """Injects faults into training messages, and counts them by the reason they are to be refused for.

    Subclasses say which with `fault`; nodes in `down` do not answer, nodes in `gone` have left, and `back` has after
    how many calls of `come_back` they do again.
    """

    def __init__(self, app, num_nodes):
        super().__init__(app, num_nodes)
        self.injected, self.ignorable = Counter(), Counter()
        self.down, self.gone, self.back = set(), set(), {}
        self._pushes, self._late, self._twice = 0, {}, set()

    def fault(self, message: Message, context: Context) -> str | None:
        """Return the name of a fault, or None."""
        return None

    def get_node_ids(self):
        return [node for node in self._contexts if node not in self.gone]

    def push_messages(self, messages):
        self._pushes += 1
        messages = list(messages)
        kept = [m for m in messages if m.metadata.dst_node_id not in self.gone]
        ids = iter(super().push_messages(kept))
        self.injected["unreachable"] += sum(is_training(m) for m in messages) - sum(map(is_training, kept))
        return [next(ids) if m in kept else "" for m in messages]

    def come_back(self):
        """Have those back whose time is over."""
        for node, left in list(self.back.items()):
            self.back[node] = left - 1
            if left <= 1:
                del self.back[node]
                self.down.discard(node)
                self.gone.discard(node)

    def restart(self, node):
        """Have the client of a node come back under another node id, as Flower has it."""
        new = max(self._contexts) + 1
        old = self._contexts[node]
        self._contexts[new] = Context(
            run_id=old.run_id, node_id=new, node_config=old.node_config, state=old.state, run_config=old.run_config
        )
        self.gone.add(node)
        return new

    def _answer(self, message, context):
        if message.metadata.dst_node_id in self.down:
            if is_training(message):
                self.injected["timeout"] += 1
            return None
        kind = self.fault(message, context) if is_training(message) else None
        if kind == "client error":
            self.injected[kind] += 1
            return Message(Error(ERROR_CLIENT_APP, "OSError: disk on fire"), reply_to=message)
        reply, message_id = super()._answer(message, context), message.metadata.message_id
        if kind == "duplicate":
            self.ignorable[kind] += 1
            self._twice.add(message_id)
        elif kind == "late":
            self.injected["timeout"] += 1
            self._late[message_id] = (self._pushes, reply)
            return None
        elif kind is not None:
            self.injected[kind] += 1
            if kind == "timeout":
                return None
            change_reply(message, reply, CHANGES[kind])
        return reply

    def pull_messages(self, message_ids):
        found = [reply for reply in super().pull_messages(message_ids) if reply is not None]
        found += [reply for reply in found if reply.metadata.reply_to_message_id in self._twice]
        for message_id in [i for i in message_ids if i in self._late and self._late[i][0] < self._pushes]:
            found.append(self._late.pop(message_id)[1])
            self.ignorable["late"] += 1
        return found


def is_training(message):
    return message.metadata.message_type.startswith("train.") and message.metadata.message_type != ATTACH


# --- replies that are not what was asked for -------------------------------------------------------------------------
def change_reply(message, answer, change):
    """Change the reply that a message was answered with; return the answer."""
    number, wire_dtype, request = decode_request(content_to_frame(message.content), WeightStore())
    reply = change(decode_reply(content_to_frame(answer.content), request))
    answer.content = frame_to_content(encode_reply(number, reply, request, wire_dtype))
    return answer


def changed_parts(change):
    """Return a change of a reply, given what makes another part of a part."""
    return lambda reply: replace(reply, parts=[change(part) for part in reply.parts])


def changed_output(change, name=None):
    """Return a change of a reply, given that of an output's value: the first's, unless another is named."""

    def change_part(part):
        chosen = name or next(iter(part.outputs))
        leaf = part.outputs[chosen]
        return replace(part, outputs={**part.outputs, chosen: Leaf(leaf.kind, change(leaf.value), leaf.exact)})

    return changed_parts(change_part)


def changed_tensor(change, name=None):
    """Return a change of a reply, given that of a tensor: the first of an output."""

    def change_value(value):
        first, *others = tree.leaves(value)
        return tree.build(tree.structure(value), [change(first.clone()), *others])

    return changed_output(change_value, name)


def poisoned(value):
    """Return what puts a value in the first place of a tensor."""

    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


CHANGES = {
    "not finite": changed_tensor(poisoned(float("nan"))),
    "shape": changed_tensor(lambda t: t[:, 1:] if t.ndim > 1 else t[1:]),
    "dtype": changed_tensor(lambda t: t.double()),
    "malformed": changed_parts(lambda part: replace(part, outputs={})),
    "another step": changed_parts(lambda part: replace(part, step=10**6)),
    "label range": changed_tensor(lambda labels: labels + NUM_CLASSES, "labels"),
}
