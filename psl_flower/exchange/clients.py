"""Who the clients are: node ids become client ids here, and do not leave this package."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from psl_flower.errors import MembershipError, ProtocolError
from psl_flower.exchange.base import Carrier
from psl_flower.exchange.same_classes import maybe_otherwise, numbered_otherwise
from psl_flower.failures import Failure, Kind, failure_lines
from psl_flower.privacy import fingerprint
from psl_flower.protocol import DESCRIBE, Config, Description, Reply, Request
from psl_flower.split import difference, doubt
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")

_LONGEST_REST = 6  # 2 to the power of this is the largest number of looks between two questions to a silent node
_OWN_NODES_SECONDS = 3.0  # for the nodes of a simulation, which are all there when it starts
_LONGEST_WAIT = 1.0  # seconds between two looks for nodes that have not connected yet


@dataclass(frozen=True, eq=False)
class Member:
    """A client: where it lives and what it said of itself."""

    client: int
    node: int
    description: Description


class Clients:
    """The clients of a run, in ascending client id.

    A client's id is the partition-id it reports; where no client reports one, the rank of its node id.

    Parameters
    ----------
    carrier : Carrier
        Not closed here.
    label_counts : bool
        Whether clients are asked for the number of examples of each class.
    config : dict, optional
        Sent along with the question.
    tolerate : bool
        Whether to go on without nodes that do not describe themselves, as long as there are enough others.
    tolerate_mistakes : bool
        Whether also where they could not for a mistake: code that raises, another model.
    may_grow : bool
        Whether nodes may connect later. If not, too few are too few at once.
    method : str, optional
        The way of splitting, which must be the clients' too.
    model : dict, optional
        The server's `signature` of the cut model, of which the clients' must not differ.
    given_counts : dict of int to sequence of int, or str, optional
        By client: examples of each class, where the clients are not asked.
    session : str
        Names the run that clients make keys for; empty without secure aggregation.
    """

    def __init__(
        self,
        carrier: Carrier,
        *,
        label_counts: bool,
        config: Config | None = None,
        tolerate: bool = False,
        tolerate_mistakes: bool = True,
        may_grow: bool = True,
        method: str = "",
        private: str = "",
        model: Mapping[str, Any] | None = None,
        given_counts: Mapping[int, Sequence[int]] | str | None = None,
        session: str = "",
    ) -> None:
        self._carrier, self._session = carrier, session
        self._given_counts = given_counts if label_counts and isinstance(given_counts, Mapping) else None
        self.by_class = label_counts
        self._label_counts, self._config = label_counts and self._given_counts is None, dict(config or {})
        self._descriptions: dict[int, Description] = {}  # by node id
        self._members: dict[int, Member] = {}  # by client id, ascending
        self._tolerate, self._may_grow = tolerate, may_grow
        self._tolerate_mistakes = tolerate_mistakes
        self._method, self._model, self._private = method, model, private
        self._keys_told: dict[int, bytes] = {}
        self._silent: set[int] = set()  # nodes whose last answer was a failure
        self._looks = 0
        # nodes that did not describe themselves since the last refresh: how often, and the look to ask them again at
        self._turned_away: dict[int, tuple[int, int]] = {}
        self._doubted = False  # it was said that a client's model may be another
        self._doubted_classes = False  # and that its classes may have other numbers
        self._told: dict[int, str] = {}  # why nodes were refused, as far as it was said

    @property
    def members(self) -> Mapping[int, Member]:
        """The clients by id, ascending."""
        return self._members

    def refresh(self, min_nodes: int, timeout: float, given_up: Collection[int] = ()) -> None:
        """Read the connected nodes anew and describe those not known yet.

        Where faults are tolerated, a client whose node has left stays a member, who may be back any moment.

        Parameters
        ----------
        min_nodes : int
            Nodes to wait for.
        timeout : float
            Seconds, for the waiting and for the describing each.
        given_up : collection of int
            Clients that have not been back for long: they do not stay.

        Raises
        ------
        MembershipError
            If too few nodes connect in time, a node does not describe itself, or ids are missing or duplicate.
        """
        nodes = self._wait_for_nodes(min_nodes, timeout)
        new = [node for node in nodes if node not in self._descriptions]
        self._turned_away.clear()
        failures = self._describe(new, timeout)
        nodes = [node for node in nodes if node in self._descriptions]
        lines = failure_lines(failures, partial(_who, failures))
        mistaken = not self._tolerate_mistakes and any(failure.kind.is_mistake for failure in failures.values())
        if failures and (not self._tolerate or mistaken or len(nodes) < min_nodes):
            raise MembershipError("every client must describe itself:\n  " + "\n  ".join(lines))
        for line in lines:
            log.warning("going on without it: %s", line)
        known = self._without_ghosts({node: self._descriptions[node] for node in nodes})
        known = self._without_impostors(known, min_nodes)
        before, here = self._members, {m.client: m for m in _members(known)}
        left = {client: member for client, member in before.items() if client not in here}
        if self._tolerate:
            stay = {c: m for c, m in left.items() if m.description.partition_id is not None and c not in given_up}
            self._silent |= {member.node for member in stay.values()}
            here |= stay
        self._members = dict(sorted(here.items()))
        if any(self._descriptions[node].partition_id is None for node in new if node in self._descriptions):
            log.warning("No node reports a partition-id: clients are numbered by the order of their node ids.")
        if left:
            log.warning("clients that left: %s", _listed(set(left)))

    def look_again(self, timeout: float) -> list[int]:
        """Look for nodes that have connected since the last look; return the clients that were no members before.

        A client that comes back on another node, holding as many examples as before, is reached there from now on:
        Flower gives a node that is restarted a new id. Nodes that do not describe themselves are asked again after
        growing numbers of looks.

        Parameters
        ----------
        timeout : float
            Seconds, for describing.
        """
        here = set(self._carrier.node_ids())
        self._silent |= {m.node for m in self._members.values()} - here
        self._looks += 1
        not_yet = {node for node, (_, look) in self._turned_away.items() if look > self._looks}
        _warn(self._describe(sorted(here - self._descriptions.keys() - not_yet), timeout))
        at_home = {m.node for m in self._members.values()}
        joined = []
        for node in sorted(here & self._descriptions.keys() - at_home):
            description = self._descriptions[node]
            client = description.partition_id
            member = None if client is None else self._members.get(client)
            if client is None or (member is not None and member.node not in self._silent):
                continue  # its number would change those of others, or its place is taken
            if member is None:
                joined.append(client)
            elif not member.description.same_data(description):
                log.warning("client %d is back on node %d with other data: it may enter next round", client, node)
                continue
            else:
                log.warning("client %d is back, on node %d", client, node)
            self._members[client] = Member(client, node, description)
        self._members = dict(sorted(self._members.items()))
        return joined

    def _describe(self, nodes: Iterable[int], timeout: float) -> dict[int, Failure]:
        """Ask nodes who they are; return what is wrong with those that do not say, by node."""
        request = Request(
            stage=DESCRIBE,
            nodes=tuple(nodes),
            label_counts=self._label_counts,
            session=self._session,
            config=self._config,
        )
        reply, failures = self._carrier.exchange(request, timeout), dict[int, Failure]()
        good: dict[int, Description] = {}
        for node in request.nodes:
            described = reply.descriptions.get(node)
            try:
                if described is None:
                    failures[node] = reply.failures.get(node, Failure(Kind.MALFORMED, "not a description"))
                else:
                    described.check(label_counts=self._label_counts)
                    self._check_same(node, described)
                    good[node] = described
            except ProtocolError as error:
                failures[node] = error.failure()
        failures |= self._other_classes(good)
        self._descriptions |= {node: described for node, described in good.items() if node not in failures}
        for node in request.nodes:
            if node in failures:
                described = reply.descriptions.get(node)
                if described is not None and type(described.partition_id) is int:
                    failures[node] = replace(failures[node], partition_id=described.partition_id)
                times = self._turned_away.get(node, (0, 0))[0] + 1
                self._turned_away[node] = (times, self._looks + 2 ** min(times, _LONGEST_REST))
        return failures

    def describe_again(self, clients: Iterable[int], timeout: float) -> None:
        """Ask clients anew who they are: their processes, and with them their keys, are others than they were."""
        members = {c: self._members[c] for c in clients if c in self._members}
        before = {member.node: self._descriptions.pop(member.node, member.description) for member in members.values()}
        _warn(self._describe(before, timeout))
        for client, member in members.items():
            described = self._descriptions.setdefault(member.node, before[member.node])
            if described.same_data(member.description):
                self._members[client] = replace(member, description=described)

    def keys(self) -> dict[int, bytes]:
        """Return the clients' public keys; new ones are logged by their fingerprints, for people to compare."""
        keys = {client: member.description.key for client, member in self._members.items()}
        new = {client: key for client, key in keys.items() if key and self._keys_told.get(client) != key}
        if new:
            self._keys_told |= new
            shown = ", ".join(f"{client} {fingerprint(key)}" for client, key in new.items())
            log.info("Secure aggregation: keys, by client: %s", shown)
        return keys

    def _other_classes(self, described: Mapping[int, Description]) -> dict[int, Failure]:
        """Return the nodes that give a class another number than the others; warn, once, where they may."""
        again = {d.partition_id for d in described.values()}
        others = [m for m in self._members.values() if m.client not in again and m.node not in described]
        before = {self.name(m.client): told for m in others if (told := m.description.classes) is not None}
        nodes = {_named(node, d, and_node=True): node for node, d in sorted(described.items(), key=_by_client)}
        new = {who: told for who, node in nodes.items() if (told := described[node].classes) is not None}
        refused = numbered_otherwise(new, before)
        new = {who: told for who, told in new.items() if who not in refused}
        if not self._doubted_classes and (unsure := maybe_otherwise(new, before)):
            self._doubted_classes = True
            log.warning(unsure)
        return {nodes[who]: ProtocolError(why).failure() for who, why in refused.items()}

    def _check_same(self, node: int, described: Description) -> None:
        """Raise ProtocolError unless a client splits the same model in the same way."""
        who = _named(node, described)
        if self._method and described.method and described.method != self._method:
            raise ProtocolError(
                f"the server's method is {self._method!r}, that of {who} is {described.method!r}: give both the same"
            )
        if self._private != described.private:
            raise ProtocolError(
                f"the server's model is private={self._private or None}, that of {who} "
                f"private={described.private or None}: give both the same"
            )
        if self._session and not described.key:
            raise ProtocolError(
                f"the server wants sums of clients only, {who} gives its own: split_client_app(..., "
                "secure_aggregation=True), or leave it out on the server, too"
            )
        if self._model is None or not described.model:
            return
        try:
            theirs = json.loads(described.model)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError("it described its model as nothing that can be read") from exc
        if not isinstance(theirs, dict):
            return
        if different := difference(self._model, theirs, ("the server", who)):
            raise ProtocolError(different)
        if not self._doubted and (unsure := doubt(self._model, theirs, ("the server", who))):
            self._doubted = True
            log.warning(unsure)

    def _without_ghosts(self, described: Mapping[int, Description]) -> dict[int, Description]:
        """Return the nodes without those that are silent and whose client is on another node by now."""
        if not self._tolerate:
            return dict(described)
        homes = {m.client: m.node for m in self._members.values()}
        best: dict[int | None, int] = {}  # where each client is: where it speaks, else where it was last
        for node, d in described.items():
            best.setdefault(d.partition_id, node)
            if homes.get(-1 if d.partition_id is None else d.partition_id) == node:
                best[d.partition_id] = node
        for node, d in described.items():
            if node not in self._silent and best[d.partition_id] in self._silent:
                best[d.partition_id] = node
        return {
            node: d
            for node, d in described.items()
            if d.partition_id is None or node not in self._silent or best[d.partition_id] == node
        }

    def _without_impostors(self, described: Mapping[int, Description], min_nodes: int) -> dict[int, Description]:
        """Return the nodes without those whose partition-id another has; whoever had it first keeps it."""
        if not self._tolerate:
            return dict(described)
        at_home = {m.node for m in self._members.values()}
        reporting = any(d.partition_id is not None for d in described.values()) and bool(at_home)
        kept: dict[int, int] = {}
        refused: dict[int, str] = {}
        for node in sorted(described, key=lambda node: (node not in at_home, node)):
            client = described[node].partition_id
            if client is None:
                if reporting and node not in at_home:
                    refused[node] = "it reports no partition-id, the others do"
            elif kept.setdefault(client, node) != node:
                refused[node] = f"partition-id must be unique, {client} is that of node {kept[client]}"
        for node, reason in refused.items():
            if self._told.get(node) != reason:
                log.warning("node %d is refused: %s: give each node a partition of its own", node, reason)
                self._carrier.refuse(node, reason)
            self._told[node] = reason
        left = {node: each for node, each in described.items() if node not in refused}
        if len(left) < min_nodes <= len(described):
            raise MembershipError(
                f"min_available_nodes is {min_nodes}, {len(left)} are left: "
                + "; ".join(f"node {node}: {reason}" for node, reason in refused.items())
            )
        return left

    def _wait_for_nodes(self, min_nodes: int, timeout: float) -> list[int]:
        begin, last_told, wait = time.monotonic(), -np.inf, 0.001
        while len(nodes := sorted(self._carrier.node_ids())) < min_nodes:
            elapsed = time.monotonic() - begin
            if not self._may_grow and elapsed >= _OWN_NODES_SECONDS:
                raise MembershipError(
                    f"min_available_nodes is {min_nodes}, there are {len(nodes)} nodes, and no more can come: "
                    "start the grid or the simulation with more, or lower min_available_nodes"
                )
            if elapsed >= timeout:
                raise MembershipError(
                    f"min_available_nodes is {min_nodes}, {len(nodes)} connected within {timeout:g} s: "
                    "start more nodes, lower min_available_nodes or raise timeout"
                )
            if elapsed - last_told >= 10:
                log.info("Waiting for nodes to connect: %d connected (minimum required: %d).", len(nodes), min_nodes)
                last_told = elapsed
            time.sleep(min(wait, timeout - elapsed))
            wait = min(2 * wait, _LONGEST_WAIT)
        return nodes

    def name(self, client: int) -> str:
        """Return how a client is called in messages: by its id, and its node where it has one."""
        member = self._members.get(client)
        return f"client {client}" + (f" (node {member.node})" if member else "")

    def counts_of(self, member: Member) -> tuple[IntArray | None, IntArray | None]:
        """Return the classes of a client and how many examples of each it holds."""
        if self._given_counts is None:
            return member.description.labels, member.description.counts
        counts = np.asarray(self._given_counts.get(member.client, ()), dtype=np.int64)
        if counts.sum() != member.description.num_examples:
            raise MembershipError(
                f"label_counts of client {member.client} add up to {counts.sum()}, it holds "
                f"{member.description.num_examples} examples: give the count of each class of every client"
            )
        return np.arange(len(counts)), counts

    def exchange(self, request: Request, timeout: float) -> Reply:
        """Ask clients and wait for the answers.

        Parameters
        ----------
        request : Request
            Its `nodes` are client ids here, and so are those of the reply.
        timeout : float
            Seconds.
        """
        members = self._members
        here = [i for i, client in enumerate(request.nodes) if client in members]
        asked = request.take(here) if here else None
        reply = Reply()
        if asked is not None:
            nodes = tuple(members[client].node for client in asked.nodes)
            reply = self._carrier.exchange(replace(asked, nodes=nodes), timeout)
            self._silent -= set(nodes)
            self._silent |= reply.failures.keys()
            reply = reply.renamed(dict(zip(nodes, asked.nodes, strict=True)))
        absent = Failure(Kind.UNREACHABLE, "it is not connected")
        reply.failures |= {client: absent for client in request.nodes if client not in members}
        return reply


def _warn(failures: Mapping[int, Failure]) -> None:
    """Tell of nodes that do not describe themselves, while a round goes on."""
    for line in failure_lines(failures, partial(_who, failures)):
        log.warning("it is asked again later: %s", line)


def _who(failures: Mapping[int, Failure], node: int) -> str:
    """Return how a node is called that has not described itself."""
    partition = failures[node].partition_id
    return f"node {node}" if partition is None or partition < 0 else f"client {partition} (node {node})"


def _named(node: int, described: Description, *, and_node: bool = False) -> str:
    client = described.partition_id
    return f"node {node}" if client is None else f"client {client}" + f" (node {node})" * and_node


def _by_client(each: tuple[int, Description]) -> tuple[bool, int]:
    node, described = each
    return described.partition_id is None, node if described.partition_id is None else described.partition_id


def _members(described: Mapping[int, Description]) -> list[Member]:
    reported = {node: d.partition_id for node, d in described.items()}
    absent = [node for node, partition in reported.items() if partition is None]
    if absent and len(absent) < len(reported):
        raise MembershipError(
            f"all nodes or none must report a partition-id, {len(absent)} of {len(reported)} do not "
            f"(the first is node {absent[0]}): "
            'start each with --node-config "partition-id=... num-partitions=..."'
        )
    if absent:
        return [Member(rank, node, described[node]) for rank, node in enumerate(sorted(described))]
    members = [Member(p, node, described[node]) for node, p in reported.items() if p is not None]
    seen: dict[int, int] = {}
    for member in members:
        if member.client in seen:
            raise MembershipError(
                f"partition-id must be unique, nodes {seen[member.client]} and {member.node} both report "
                f"{member.client}: give each node a partition of its own"
            )
        seen[member.client] = member.node
    return members


def _listed(ids: set[int]) -> str:
    shown = sorted(ids)
    return ", ".join(map(str, shown[:10])) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")
