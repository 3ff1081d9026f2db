"""What the tests of faults share: a grid that injects them, and a record of which examples were really used."""

from __future__ import annotations

from collections import Counter, defaultdict

from flwr.app import Context, Error, Message
from psl_flower.strategy.server_step import SplitTrainer
from support import CUT, NUM_CLASSES, client_sizes, load_partition, tiny_resnet

from psl_flower import InProcessGrid, SplitClient, split_client_app
from psl_flower.exchange.codec import decode_tensor, encode_tensor
from psl_flower.flower import ERROR_CLIENT_APP
from psl_flower.protocol import BACKWARD, FORWARD

DRAWN = {}  # (weights' version, client): the indices that a backward pass was last about


class RecordingClient(SplitClient):
    """Takes note of the examples of every backward pass."""

    def run_backward(self, request, graph):
        DRAWN[request.weights.version, request.order.client] = (request.order.epoch, self.draw(request.order))
        return super().run_backward(request, graph)


class RecordingTrainer(SplitTrainer):
    """Takes note of which clients were in each committed step."""

    latest = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        RecordingTrainer.latest, self.committed = self, []

    def forward_backward(self, batch, seed):
        self.batch = {client: len(part.labels) for client, part in batch.items()}
        return super().forward_backward(batch, seed)

    def commit(self, gradients):
        version = self.weights().version
        super().commit(gradients)
        self.committed.append((version, self.batch))

    def used(self):
        """Return the examples that committed steps used, by (epoch, client), as often as they did."""
        found = defaultdict(list)
        for version, batch in self.committed:
            for client, count in batch.items():
                epoch, indices = DRAWN[version, client]
                assert len(indices) == count
                found[epoch, client] += indices.tolist()
        return found


def assert_each_used_once(trainer, num_clients, num_epochs, but=()):
    """Assert that every example of every client was in one committed step of each epoch."""
    used = trainer.used()
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

    Subclasses say which with `fault`; nodes in `down` do not answer, nodes in `gone` have left.
    """

    def __init__(self, app, num_nodes):
        super().__init__(app, num_nodes)
        self.injected, self.ignorable = Counter(), Counter()
        self.down, self.gone = set(), set()
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
            CHANGES[kind](reply, "activations" if message.metadata.message_type == FORWARD else "gradients")
        return reply

    def pull_messages(self, message_ids):
        found = [reply for reply in super().pull_messages(message_ids) if reply is not None]
        found += [reply for reply in found if reply.metadata.reply_to_message_id in self._twice]
        for message_id in [i for i in message_ids if i in self._late and self._late[i][0] < self._pushes]:
            found.append(self._late.pop(message_id)[1])
            self.ignorable["late"] += 1
        return found


def is_training(message):
    return message.metadata.message_type in (FORWARD, BACKWARD)


def _tensor(change):
    def tamper(reply, record):
        arrays = reply.content[record]
        name = next(iter(arrays))
        arrays[name] = encode_tensor(change(decode_tensor(arrays[name]).clone()))

    return tamper


def _poison(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


def _mislabel(reply, record):
    labels = reply.content["labels"]
    labels["labels"] = encode_tensor(decode_tensor(labels["labels"]) + NUM_CLASSES)


def _drop(reply, record):
    del reply.content[record]


def _misname(reply, record):
    reply.content["reply"]["step"] = 10**6


CHANGES = {
    "not finite": _tensor(_poison(float("nan"))),
    "shape": _tensor(lambda t: t[:, 1:] if t.ndim > 1 else t[1:]),
    "dtype": _tensor(lambda t: t.double()),
    "malformed": _drop,
    "another step": _misname,
    "label range": _mislabel,
}
