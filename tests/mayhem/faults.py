"""Clients, connections, messages, the disk and the server that fail."""

import errno
import functools
import random
import threading
import time
from unittest import mock

import grpc
from faulty import FakeTime, FaultyGrid, is_training
from flwr.app import Context

from mayhem.scenario import DISK, KILL, METRICS
from mayhem.task import K
from psl_flower.callbacks import jsonl
from psl_flower.client import stream
from psl_flower.exchange.codec import REQUEST
from psl_flower.exchange.frames import Frame
from psl_flower.server import LocalBackend
from psl_flower.strategy import saving

OUTAGES = ("timeout", "late", "duplicate")
STEP_SECONDS = 0.5  # of a clock that runs, over streams


class ChaosGrid(FaultyGrid):
    """Every message may meet a fault; clients go down for a while, leave, and come back on other nodes."""

    def __init__(self, app, scenario):
        super().__init__(app, K)
        self.scenario, self.rng, self.clock = scenario, random.Random(scenario.seed + 1), FakeTime()

    def fault(self, message, context):
        if self.rng.random() >= self.scenario.share:
            return None
        honest = self.scenario.mistakes == "exclude" or self.scenario.secure  # whoever makes a mistake is left out
        return self.rng.choice(OUTAGES if honest else (*OUTAGES, "client error", "another step"))

    def push_messages(self, pushed):
        pushed = list(pushed)
        if pushed and all(map(is_training, pushed)):
            self._move_on()
        return super().push_messages(pushed)

    def pull_messages(self, message_ids):
        found = super().pull_messages(message_ids)
        if len(found) > 1 and self.scenario.share:
            self.rng.shuffle(found)
            self.scenario.found["replies in another order"] += 1
        return found

    def heal(self):
        """Have everyone back."""
        self.down.clear()
        self.gone -= set(self.back)
        self.back.clear()

    def _move_on(self):
        self.come_back()
        if self.scenario.suspended and self.rng.random() < 0.05:
            self.clock.now += 3600.0
            self.scenario.found["machine suspended"] += 1
        here = [n for n in self._contexts if n not in self.gone and n not in self.down]
        if self.scenario.share and self.rng.random() < self.scenario.share and len(here) > 3:
            node, what = self.rng.choice(here), self.rng.choice(["frozen", "gone", "restarted"])
            self.scenario.found[f"client {what}"] += 1
            if what == "restarted":
                self.restart(node)
            else:
                (self.down if what == "frozen" else self.gone).add(node)
                self.back[node] = self.rng.randrange(1, 12)

    def let_in(self, partition):
        """Add a node that says it is one that is there."""
        node, old = max(self._contexts) + 1, next(iter(self._contexts.values()))
        config = {"partition-id": partition, "num-partitions": K}
        self._contexts[node] = Context(
            run_id=old.run_id, node_id=node, node_config=config, state=type(old.state)(), run_config={}
        )


class BrokenError(grpc.RpcError):
    """A connection that is cut, as grpc tells it."""

    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return "the cable is cut"


class ChaosStream(stream.StreamClient):
    """A process whose stream fails in ways of its own."""

    scenario = rng = None

    def _handle(self, frame):
        scenario, rng = self.scenario, self.rng
        training = frame.header.get("kind") == REQUEST and frame.header.get("orders")
        if not training or rng.random() >= scenario.share:
            return super()._handle(frame)
        honest = ["dropped", "twice", "delayed", "late", "cut", "unasked"]
        what = rng.choice(honest if scenario.mistakes == "exclude" else [*honest, "garbled"])
        scenario.found[f"stream: {what}"] += 1
        if what == "cut":
            raise BrokenError
        if what == "garbled":
            self._send(Frame({"kind": "nonsense"}))
            return True
        real, sent = self._send, []
        self._send = sent.append
        try:
            going_on = super()._handle(frame)
        finally:
            self._send = real
        if what == "late":
            timer = threading.Timer(1.5 * STEP_SECONDS, lambda: [real(each) for each in sent])
            timer.daemon = True
            timer.start()
        if what == "delayed":
            time.sleep(STEP_SECONDS / 10)
        for _ in range({"dropped": 0, "late": 0, "twice": 2, "unasked": 1, "delayed": 1}[what]):
            for each in sent:
                real(each)
        if what == "unasked":
            real(Frame({"kind": "reply", "number": 10**9}))
        return going_on


class Killed(BaseException):
    """The server's process is gone."""


class Stops:
    """Ends the server's process once, at the n-th commit, or the n-th write that finds the disk full."""

    def __init__(self, scenario):
        self.scenario, self.left = scenario, scenario.stop[1] if scenario.stop else -1

    def due(self, what):
        if self.scenario.stop is None or self.scenario.stop[0] != what:
            return False
        self.left -= 1
        if self.left == 0:
            self.scenario.found[what] += 1
        return self.left == 0

    def patched(self):
        """Return the patches that make it happen."""
        commit, write, line = LocalBackend.commit, saving.checkpoint.write, jsonl.JsonlLogger._write
        full = functools.partial(OSError, errno.ENOSPC, "No space left on device")

        def dies(backend, gradients):
            if self.due(KILL):
                raise Killed
            commit(backend, gradients)

        def has_room(path, state):
            if self.due(DISK):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f"{path.name}.unfinished").write_bytes(b"half of it")
                raise full()
            write(path, state)

        def has_line(logger, kind, values):
            if self.due(METRICS):
                logger._file.write('{"kind": "st')
                raise full()
            line(logger, kind, values)

        return [
            mock.patch.object(LocalBackend, "commit", dies),
            mock.patch.object(saving.checkpoint, "write", has_room),
            mock.patch("psl_flower.checkpoint.write", has_room),
            mock.patch.object(jsonl.JsonlLogger, "_write", has_line),
        ]
