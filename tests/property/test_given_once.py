"""Whoever is lost when: over all sums that were revealed, nothing about a single client's gradient follows."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from psl_flower import SecureAggregation, SplitClient
from psl_flower.errors import ProtocolError
from psl_flower.privacy import Cohort, Party
from psl_flower.samplers import Delays, Population
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.strategy.ledger import EpochLedger, part
from psl_flower.typing import IntArray

OPTIONS = SecureAggregation(least=3)
CLASSES, BY_CLASS = 3, ("lds", "lb", "aligned")
STAGES = ("tail_loss", "head_backward")


class Client:
    """What a client does about a request, but for its gradient."""

    def __init__(self, client: int, size: int) -> None:
        self.client, self.party = client, Party("run")
        self.labels = np.random.default_rng([5, client]).integers(0, CLASSES, size)
        self.data = SplitClient(TensorDataset(torch.zeros(size), torch.from_numpy(self.labels)))

    def rows(self, order) -> IntArray:
        return self.data.draw(order)

    def answer(self, cohort, stage, version, order) -> list[tuple[str, int, int]]:
        """Return the unknowns that its part is the sum of: the gradient of each of its examples, at these weights."""
        rows = self.rows(order)
        self.party.agree(cohort, OPTIONS, self.client, stage, version, rows, "train")
        return [(f"{version} {stage}", self.client, int(row)) for row in rows]


def cohort_of(clients, orders, attempt):
    keys = [np.frombuffer(clients[c].party.key, np.uint8) for c in orders.clients.tolist()]
    return Cohort(
        session="run",
        attempt=attempt,
        clients=orders.clients,
        counts=orders.counts,
        keys=np.stack(keys),
        degree=OPTIONS.degree(len(keys)),
    )


def isolated(equations):
    """Return the clients whose own gradient (any combination of their examples') the equations determine.

    A row of the row space that is zero but for one client's unknowns: what the equations say of the others must vanish
    on some combination of them, that does not vanish on this client's.
    """
    unknowns = sorted({unknown for equation in equations for unknown in equation})
    column = {unknown: i for i, unknown in enumerate(unknowns)}
    matrix = np.zeros((len(equations), len(unknowns)))
    for row, equation in zip(matrix, equations, strict=True):
        row[[column[unknown] for unknown in equation]] = 1
    found = set()
    for client in {client for _, client, _ in unknowns}:
        others = [i for i, (_, c, _) in enumerate(unknowns) if c != client]
        if np.linalg.matrix_rank(matrix[:, others]) < np.linalg.matrix_rank(matrix):
            found.add(client)
    return found


class Play:
    """Some epochs with an adversary who chooses who is lost, in which stage, and whether after having answered.

    What is lost late has been sent all the same: the server may get it later. `equations` are the sums that it has;
    `epochs` has, for each, the examples that steps used or left out, by client, and how many remain.
    """

    def __init__(self, seed, sizes, name, losses, epochs=1):
        ids, self.clients = np.arange(len(sizes)), {k: Client(k, n) for k, n in enumerate(sizes)}
        counts = np.array([np.bincount(each.labels, minlength=CLASSES) for each in self.clients.values()])
        delays = Delays(ids % 3 + 0.5, ids / 100)
        self.population = Population(ids, np.array(sizes), counts if name in BY_CLASS else None, delays)
        self.losses, self.equations, self.epochs = iter(losses), [], []
        self.version = self.attempts = 0
        sampler, last = SAMPLERS[name](int(sum(sizes)) // 4 or 1, seed=seed), None
        for epoch in range(epochs):
            ledger = EpochLedger(sampler, self.population, epoch, least=OPTIONS.least, before=last)
            drawn = {k: [] for k in self.clients}
            while len(ledger.unfinished()):
                self.step(ledger, drawn)
            self.epochs.append((drawn, ledger.remaining))
            last = ledger

    def step(self, ledger, drawn):
        step = ledger.step(ledger.unfinished())
        orders = ledger.orders(0, step)
        enough = len(step.clients) >= OPTIONS.least
        if enough and not self.attempt(orders):
            ledger.put_off(step)
            return
        for order in orders.each():
            drawn[order.client] += self.clients[order.client].rows(order).tolist()
        ledger.done(part(step, dict.fromkeys(step.clients.tolist())), {}, committed=enough)
        self.version += enough

    def attempt(self, orders):
        """Return whether nobody is lost."""
        self.attempts += 1
        for stage in STAGES:
            cohort = cohort_of(self.clients, orders, self.attempts)
            victim, late = next(self.losses, (None, False))
            victim = orders.clients[victim % len(orders)] if victim is not None else None
            unknowns = []
            for order in orders.each():
                if order.client != victim or late:
                    unknowns += self.clients[order.client].answer(cohort, stage, f"w{self.version}", order)
            if victim is None or late:
                self.equations.append(unknowns)
            if victim is not None:
                return False
        return True


LOSSES = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 7)), st.booleans()), max_size=30)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(2, 9), min_size=3, max_size=6),
    name=st.sampled_from(["fls", "fpls", "ugs", *BY_CLASS]),
    losses=LOSSES,
)
def test_no_schedule_of_losses_isolates_a_client(seed, sizes, name, losses):
    play = Play(seed, sizes, name, losses, epochs=2)
    assert isolated(play.equations) == set()
    assert all(len({client for _, client, _ in equation}) >= OPTIONS.least for equation in play.equations)
    for drawn, left in play.epochs:
        for client, rows in drawn.items():
            assert len(set(rows)) == len(rows) == sizes[client] - left[client]
            assert set(rows) <= set(range(sizes[client]))


def test_every_example_is_used_if_losses_end():
    losses = [(1, False), (None, False), (2, True), (0, True)]
    ((drawn, left),) = Play(0, [12, 12, 12, 12], "fpls", losses).epochs
    assert left.tolist() == [0, 0, 0, 0]
    assert all(sorted(rows) == list(range(12)) for rows in drawn.values())


def test_what_was_given_last_in_an_epoch_rests_in_the_next():
    """The last step of the first epoch comes to nothing: its examples are asked for at other weights only."""
    losses = [(None, False)] * 6 + [(3, True)]
    first, second = (left.tolist() for _, left in Play(0, [8, 8, 8, 8], "fpls", losses, epochs=2).epochs)
    assert first == [2, 2, 2, 2]
    assert second == [0, 0, 0, 0]


def test_made_again_without_the_lost_client_its_gradient_would_follow():
    """The same, were steps made again as without secure aggregation: the clients do not answer, and rightly so."""
    sizes = [4, 4, 4, 4]
    orders = EpochLedger(SAMPLERS["fpls"](8, seed=0), Population(np.arange(4), np.array(sizes)), 0)
    orders = orders.orders(0, orders.step(np.arange(4)))
    clients = {k: Client(k, n) for k, n in enumerate(sizes)}
    without = orders.take(np.arange(3))
    first, second = (cohort_of(clients, each, i) for i, each in enumerate((orders, without)))
    equations = [[u for o in orders.each() for u in clients[o.client].answer(first, "backward", "w0", o)]]
    for order in without.each():
        try:
            clients[order.client].answer(second, "backward", "w0", order)
        except ProtocolError as error:
            assert "each example once" in str(error)  # noqa: PT017 - it is the point, of each of them
        else:
            raise AssertionError("it gave its example twice")
    forgetful = {k: Client(k, n) for k, n in enumerate(sizes)}
    cohort = replace(second, keys=cohort_of(forgetful, without, 1).keys)
    equations.append([u for o in without.each() for u in forgetful[o.client].answer(cohort, "backward", "w0", o)])
    assert isolated(equations) == {3}
