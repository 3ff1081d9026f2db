"""Who takes part in a run: the one place that knows of each client whether it is there, fails, or is left out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from psl_flower.errors import MembershipError
from psl_flower.exchange import Clients
from psl_flower.failures import Failure, Kind, failure_lines
from psl_flower.population import Population
from psl_flower.samplers.rounding import round_to_sum
from psl_flower.strategy.tolerance import Backoff
from psl_flower.strategy.unreadable import UnreadableRows
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")

MOST_OUTLIERS = 3  # replies far out of bounds, after which a client is left out for the run
# What a client may claim to test on: some times the training examples of all, where that is more than a million.
_MOST_TEST_SHARE, _MOST_TEST_EXAMPLES = 10, 10**6


class Membership:
    """The clients of a run, and which of them take part in what comes next.

    A client is a member from when it describes itself until it is gone for a whole epoch. A member takes part unless it

    - was excluded, for a mistake: for the rest of the run;
    - is out of the round, because it has lost what it keeps for it: until the next round;
    - backs off, because it failed again and again: for so many attempts (`Backoff`).

    One that still owes examples at the end of an epoch is given up: nobody waits for it again until it is in a step.
    Examples that a client cannot read are left out for good; with all others it takes part.

    Parameters
    ----------
    clients : Clients
        Where each client lives and what it says of itself.

    Attributes
    ----------
    unreadable, unreadable_tests : UnreadableRows
        Training and test examples that are left out.
    """

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.unreadable, self.unreadable_tests = UnreadableRows("example"), UnreadableRows("test example")
        self._excluded: set[int] = set()
        self._out_of_round: set[int] = set()
        self._backoff = Backoff()
        self._given_up: set[int] = set()
        self._gone: set[int] = set()  # those of them that gave nothing at all
        self._outliers: Counter[int] = Counter()  # times that a client sent what is far out of bounds
        self._unbelieved: set[int] = set()  # whose claims of test examples were told of

    # --- who is there ------------------------------------------------------------------------------------------------
    def refresh(self, min_nodes: int, timeout: float) -> None:
        """Read the connected nodes anew, see `Clients.refresh`; those that were gone for an epoch are no members."""
        self.clients.refresh(min_nodes, timeout, self._gone)
        self._note_unreadable()

    def look_again(self, timeout: float) -> list[int]:
        """Look for nodes that have connected since, see `Clients.look_again`; return the clients that are new."""
        joined = self.clients.look_again(timeout)
        self._note_unreadable()
        return joined

    def _note_unreadable(self) -> None:
        """Leave out what clients said they cannot read when they described themselves."""
        for client, member in self.clients.members.items():
            if rows := member.description.left_out:
                self.leave_out_rows(client, Failure(Kind.UNREADABLE, "", rows))

    def name(self, client: int) -> str:
        """Return how a client is called in messages."""
        return self.clients.name(client)

    def population(self) -> Population:
        """Return what a sampler reads."""
        members = [m for client, m in self.clients.members.items() if client not in self._excluded]
        sizes = [m.description.num_examples - self.unreadable.count(m.client) for m in members]
        if not any(sizes):
            raise MembershipError(f"none of the {len(members)} clients holds a training example")
        counts = None
        if self.clients.by_class:
            described = [self.clients.counts_of(m) for m in members]
            held = [(labels, c) for labels, c in described if labels is not None and c is not None]
            classes = max((int(labels.max()) + 1 for labels, _ in held if labels.size), default=0)
            counts = np.zeros((len(members), classes), dtype=np.int64)
            for row, (labels, c) in zip(counts, held, strict=True):
                row[labels] = c
            for i, member in enumerate(members):
                np.subtract.at(counts[i], self.unreadable.labels(member.client), 1)
                if counts[i].sum() != sizes[i]:  # classes of examples that are left out are not known
                    counts[i] = round_to_sum(counts[i] + 1e-9, sizes[i], np.random.default_rng(0))
        return Population(np.array([m.client for m in members]), np.array(sizes), counts)

    def population_with(self, population: Population, joined: Iterable[int]) -> Population:
        """Return a population with clients added that have joined."""
        everyone = self.population()
        rows = np.flatnonzero(np.isin(everyone.client_ids, list(joined)))
        ids = np.concatenate((population.client_ids, everyone.client_ids[rows]))
        sizes = np.concatenate((population.sizes, everyone.sizes[rows]))
        counts = None
        if population.label_counts is not None and everyone.label_counts is not None:
            parts = (population.label_counts, everyone.label_counts[rows])
            width = max(table.shape[1] for table in parts)
            counts = np.concatenate([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in parts])
        return Population(ids, sizes, counts)

    def test_sizes(self) -> dict[int, int]:
        """Return how many test examples there are to evaluate on, by client; not those of clients with none.

        Nor those of clients that claim so many that evaluation would never end.
        """
        members = {c: m.description for c, m in self.clients.members.items() if c not in self._excluded}
        sizes = {c: m.num_test_examples - self.unreadable_tests.count(c) for c, m in members.items()}
        most = max(_MOST_TEST_SHARE * sum(m.num_examples for m in members.values()), _MOST_TEST_EXAMPLES)
        for client in {client for client, n in sizes.items() if n > most} - self._unbelieved:
            self._unbelieved.add(client)
            log.warning(
                "evaluation goes on without %s: it claims %d test examples, the most is %d (%d times the training "
                "examples of all clients)",
                *(self.name(client), sizes[client], most, _MOST_TEST_SHARE),
            )
        return {client: n for client, n in sizes.items() if 0 < n <= most}

    # --- who takes part ----------------------------------------------------------------------------------------------
    def taking_part(self, clients: IntArray) -> IntArray:
        """Return those of some clients that are neither excluded nor out of the round."""
        absent = list(self._excluded | self._out_of_round)
        return clients[~np.isin(clients, absent)] if absent else clients

    def at_once(self, clients: IntArray, least: int = 1) -> IntArray:
        """Return those of some clients that take part in the next attempt: that do not back off.

        All, if there are fewer than `least` else: a step that is left out for that would cost the others its examples.
        """
        absent = list(self._backoff.left_out())
        kept = clients[~np.isin(clients, absent)] if absent else clients
        return kept if len(kept) >= least else clients

    def failing(self) -> set[int]:
        """Return the clients whose last attempt failed."""
        return self._backoff.failing()

    def hopeless(self, clients: IntArray) -> bool:
        """Return whether an earlier epoch has waited in vain for all of these clients."""
        return set(clients.tolist()) <= self._given_up

    def nobody_left(self) -> bool:
        """Return whether everyone with training data is excluded."""
        return self._excluded.issuperset(c for c, m in self.clients.members.items() if m.description.num_examples)

    # --- what happened -----------------------------------------------------------------------------------------------
    def begin_round(self) -> None:
        """Let those in again that were out of the last round."""
        self._out_of_round.clear()

    def next_attempt(self) -> None:
        """Count an attempt at a step."""
        self._backoff.next_attempt()

    def attempted(self, lost: Mapping[int, Failure], done: Iterable[int]) -> None:
        """Take note of who failed in the attempt that was last counted, and who was in the step that came of it."""
        self._backoff.failed(client for client, f in lost.items() if f.kind is not Kind.UNREADABLE)
        self._backoff.succeeded(done)
        self._given_up.difference_update(done)
        self.leave_out_of_round({client: f for client, f in lost.items() if f.kind is Kind.LEFT_OUT})

    def leave_out_of_round(self, lost: Mapping[int, Failure]) -> None:
        """Leave clients out until the next round."""
        self._out_of_round |= lost.keys()
        for line in failure_lines(lost, self.name):
            log.warning("out of the round: %s", line)

    def repeated(self, outliers: Mapping[int, Failure]) -> dict[int, Failure]:
        """Take note of replies far out of bounds; return those of clients that have sent too many."""
        self._outliers.update(outliers.keys())
        return {client: why for client, why in outliers.items() if self._outliers[client] >= MOST_OUTLIERS}

    def exclude(self, failures: Mapping[int, Failure], reason: str = "for a mistake") -> None:
        """Leave clients out for the rest of the run."""
        self._excluded |= failures.keys()
        for line in failure_lines(failures, self.name):
            log.warning("left out for the rest of the run, %s: %s", reason, line)

    def leave_out_rows(self, client: int, failure: Failure, *, test: bool = False) -> list[int]:
        """Leave examples out for good that a client cannot read; return those that were not left out yet."""
        held = 0
        if client in self.clients.members:
            description = self.clients.members[client].description
            held = description.num_test_examples if test else description.num_examples
        rows = self.unreadable_tests if test else self.unreadable
        return rows.add(client, failure, held, self.name(client))

    def end_epoch(self, unseen: Mapping[int, int], held: Mapping[int, int]) -> None:
        """Give those up that still owe examples; by client, how many of those that it holds."""
        self._given_up |= unseen.keys()
        self._gone = {client for client, n in unseen.items() if n == held[client]}

    # --- checkpoints -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return everything but who is connected, for a checkpoint."""
        return {
            "unreadable": self.unreadable.state_dict(),
            "unreadable_tests": self.unreadable_tests.state_dict(),
            "excluded": sorted(self._excluded),
            "out_of_round": sorted(self._out_of_round),
            "given_up": sorted(self._given_up),
            "gone": sorted(self._gone),
            "backoff": self._backoff.state_dict(),
            "outliers": dict(self._outliers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.unreadable.load_state_dict(state["unreadable"])
        self.unreadable_tests.load_state_dict(state["unreadable_tests"])
        self._excluded, self._out_of_round = set(state["excluded"]), set(state["out_of_round"])
        self._given_up, self._gone = set(state["given_up"]), set(state["gone"])
        self._backoff.load_state_dict(state["backoff"])
        self._outliers = Counter(state["outliers"])
