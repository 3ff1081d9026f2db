"""A Flower Grid that calls the ClientApp directly: tests, notebooks and debugging, without Ray or a SuperLink."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from psl_flower.checks import check_int
from psl_flower.errors import ConfigError
from psl_flower.flower import ERROR_CLIENT_APP, Run, become_server, make_run
from psl_flower.origin import RAISED, let_signals_end

_SERVER_NODE = 1


class InProcessGrid(Grid):
    """Runs every message at once, in this process, when it is pushed; those of several threads one after the other.

    Works with any strategy and ClientApp of Flower, not only with split learning. A ClientApp that raises becomes an
    error reply, as in Flower's simulation.

    Parameters
    ----------
    client_app : ClientApp
        Answers for all nodes.
    num_nodes : int
        Nodes; each gets ``partition-id`` and ``num-partitions`` in its node_config, as in Flower's simulation.
    run_config : dict, optional
        The run's configuration, as ``context.run_config``.
    """

    def __init__(
        self, client_app: ClientApp, num_nodes: int = 2, run_config: dict[str, bool | float | int | str] | None = None
    ) -> None:
        if not isinstance(client_app, ClientApp):
            raise ConfigError(f"client_app must be a flwr ClientApp, got {client_app!r:.80}")
        num_nodes = check_int(num_nodes, "num_nodes", least=1)
        self._app = client_app
        # unique: clients keep state by run (see Note [Process state] in client/process.py)
        self._run = make_run(secrets.randbits(62))
        self._contexts = {
            node: Context(
                run_id=self._run.run_id,
                node_id=node,
                node_config={"partition-id": partition, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for partition, node in enumerate(range(_SERVER_NODE + 1, _SERVER_NODE + 1 + num_nodes))
        }
        self._replies: dict[str, Message] = {}
        self._one_at_a_time = threading.RLock()  # clients share what their process keeps
        become_server(self._run.run_id, _SERVER_NODE)

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message; deprecated in Flower, use its constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the ClientApp answer each message; messages to unknown nodes get no id."""
        ids = []
        for message in messages:
            context = self._contexts.get(message.metadata.dst_node_id)
            if context is None:
                continue
            message.metadata.__dict__["_message_id"] = message_id = str(uuid4())
            with self._one_at_a_time:
                self._replies[message_id] = self._answer(message, context)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and return the replies."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message, context: Context) -> Message:
        try:
            reply: Any = self._app(message, context)  # or what a mod returns
        except RAISED as exc:
            let_signals_end(exc)
            # as in Flower's simulation: the server learns what happened, and goes on
            return _error(message, f"{type(exc).__name__}: {exc}")
        if not isinstance(reply, Message):
            return _error(message, f"the ClientApp, or a mod of it, must return a Message, got {reply!r:.80}")
        if reply.metadata.reply_to_message_id == message.metadata.message_id:
            return reply
        # a mod that gives up on a reply may answer that (LocalDpMod), and nobody would ever hear of it
        said = f": {reply.error.reason}" if reply.has_error() else ""
        return _error(message, f"the ClientApp, or a mod of it, returned a message that does not answer its own{said}")


def _error(message: Message, reason: str) -> Message:
    return Message(Error(ERROR_CLIENT_APP, reason), reply_to=message)
