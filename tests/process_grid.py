"""Grids whose clients are real processes, to be killed and stopped: a stand-in for Ray actors, one for SuperNodes."""

import os
import secrets
import signal
import threading
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from warm import WARM

from psl_flower.flower import ERROR_CLIENT_APP, become_server, make_run

# what Flower answers with for a process that has died
ERROR_CRASHED = getattr(ErrorCode, "CLIENT_APP_CRASHED", ErrorCode.UNKNOWN)


def freeze(pid):
    """Stop a process, and wait until all its threads have stopped: one that runs may still answer."""
    os.kill(pid, signal.SIGSTOP)
    states = []
    while not states or set(states) != {"T"}:
        stats = [task / "stat" for task in Path(f"/proc/{pid}/task").iterdir()]
        states = [stat.read_text().rsplit(")", 1)[1].split()[0] for stat in stats]


def _work(pipe, make_app, resident):
    from psl_flower.client import stream

    stream.outlives_messages = lambda: resident
    app = make_app()
    while True:
        try:
            message, context = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(app(message, context))
        except Exception as exc:
            pipe.send(Message(Error(ERROR_CLIENT_APP, f"{type(exc).__name__}: {exc}"), reply_to=message))


class _Process:
    def __init__(self, make_app, resident):
        self.pipe, theirs = WARM.Pipe()
        self.process = WARM.Process(target=_work, args=(theirs, make_app, resident), daemon=True)
        self.process.start()
        theirs.close()
        self.lock = threading.Lock()

    def ask(self, message, context):
        with self.lock:
            try:
                self.pipe.send((message, context))
                return self.pipe.recv()
            except (EOFError, OSError):
                return Message(Error(ERROR_CRASHED, "the process died"), reply_to=message)


class ProcessGrid(Grid):
    """With `resident`, a fixed number of processes that any message may go to; else a process for each message."""

    def __init__(self, make_app, num_nodes, num_processes=0):
        self.make_app = make_app
        self._run = make_run(secrets.randbits(60))
        become_server(self._run.run_id, 1)
        self.contexts = {
            node: Context(
                run_id=self._run.run_id,
                node_id=node,
                node_config={"partition-id": i, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config={},
            )
            for i, node in enumerate(range(100, 100 + num_nodes))
        }
        self.resident = [_Process(make_app, True) for _ in range(num_processes)]
        self.started = []
        self.busy = {node: threading.Lock() for node in self.contexts}  # a SuperNode runs one message at a time
        self.replies, self.count = {}, 0

    def push_messages(self, messages):
        ids = []
        for message in messages:
            self.count += 1
            message.metadata.__dict__["_message_id"] = f"m{self.count}"
            threading.Thread(target=self._answer, args=(message, self.count), daemon=True).start()
            ids.append(f"m{self.count}")
        return ids

    def _answer(self, message, number):
        node = message.metadata.dst_node_id
        if self.resident:
            process = self.resident[number % len(self.resident)]
            self.replies[message.metadata.message_id] = process.ask(message, self.contexts[node])
            return
        with self.busy[node]:
            process = _Process(self.make_app, False)
            process.node = node
            self.started.append(process)  # messages race: in no order
            self.replies[message.metadata.message_id] = process.ask(message, self.contexts[node])
            process.pipe.close()

    def pull_messages(self, message_ids):
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    def get_node_ids(self):
        return list(self.contexts)

    def close(self):
        for each in [*self.resident, *self.started]:
            if each.process.is_alive():
                os.kill(each.process.pid, signal.SIGKILL)
            each.process.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("never on the step path")

    def create_message(self, *args, **kwargs):
        raise AssertionError("deprecated")

    def set_run(self, run):
        pass

    @property
    def run(self):
        return self._run
