"""Whoever is lost when: over all sums that were revealed, nothing about a single client's gradient follows."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from psl_flower import SecureAggregation
from psl_flower.errors import ProtocolError
from psl_flower.privacy import Company, Party
from psl_flower.samplers import Population
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.strategy.ledger import EpochLedger, part
from psl_flower.typing import IntArray

OPTIONS = SecureAggregation(least=3)
STAGES = ("tail_loss", "head_backward")


class Client:
    """What a client does about a request, but for its gradient."""

    def __init__(self, client: int, size: int) -> None:
        self.client, self.size, self.party = client, size, Party("run")

    def rows(self, order) -> IntArray:
        permutation = order.epoch_rng().permutation(self.size)
        for _, start, count in order.put_off:
            block = permutation[start : start + count]
            permutation = np.concatenate((permutation[:start], permutation[start + count :], block))
        assert order.start + order.count <= self.size
        return permutation[order.start : order.start + order.count]

    def answer(self, company, stage, version, order) -> list[tuple[str, int, int]]:
        """Return the unknowns that its part is the sum of: the gradient of each of its examples, at these weights."""
        rows = self.rows(order)
        self.party.agree(company, OPTIONS, self.client, stage, version, rows, "train")
        return [(f"{version} {stage}", self.client, int(row)) for row in rows]


def company_of(clients, orders, attempt):
    keys = [np.frombuffer(clients[c].party.key, np.uint8) for c in orders.clients.tolist()]
    return Company(
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


def run(seed, sizes, name, losses):
    """Play an epoch with an adversary who chooses who is lost, in which stage, and whether after having answered.

    What is lost late has been sent all the same: the server may get it later. Returned are the sums it has, the
    examples that steps used or left out, and how many remain.
    """
    population = Population(np.arange(len(sizes)), np.array(sizes))
    ledger = EpochLedger(SAMPLERS[name](int(sum(sizes)) // 4 or 1, seed=seed), population, 0)
    clients = {k: Client(k, n) for k, n in enumerate(sizes)}
    equations, used, version, attempt = [], {k: [] for k in clients}, 0, 0
    losses, tries, left_out = iter(losses), 0, {k: [] for k in clients}
    while len(ledger.unfinished()) and tries < 60:
        tries += 1
        step = ledger.step(ledger.unfinished())
        if len(step.clients) < OPTIONS.least:
            for order in ledger.orders(0, step).each():
                left_out[order.client] += clients[order.client].rows(order).tolist()
            ledger.done(step, {}, committed=False)
            continue
        orders = ledger.orders(0, step)
        attempt += 1
        lost = False
        for stage in STAGES:
            company = company_of(clients, orders, attempt)
            victim, late = next(losses, (None, False))
            victim = orders.clients[victim % len(orders)] if victim is not None else None
            unknowns = []
            for order in orders.each():
                if order.client != victim or late:
                    unknowns += clients[order.client].answer(company, stage, f"w{version}", order)
            lost = victim is not None
            if not lost or late:
                equations.append(unknowns)
            if lost:
                break
        if lost:
            ledger.put_off(step)
            continue
        for order in orders.each():
            used[order.client] += clients[order.client].rows(order).tolist()
        ledger.done(part(step, dict.fromkeys(step.clients.tolist())), {})
        version += 1
    return equations, {k: used[k] + left_out[k] for k in clients}, ledger.remaining


LOSSES = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 7)), st.booleans()), max_size=24)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(2, 9), min_size=3, max_size=6),
    name=st.sampled_from(["fls", "fpls", "ugs"]),
    losses=LOSSES,
)
def test_no_schedule_of_losses_isolates_a_client(seed, sizes, name, losses):
    equations, used, left = run(seed, sizes, name, losses)
    assert isolated(equations) == set()
    for client, rows in used.items():
        assert len(set(rows)) == len(rows) == sizes[client] - left[client]
        assert set(rows) <= set(range(sizes[client]))
    assert all(len({client for _, client, _ in equation}) >= OPTIONS.least for equation in equations)


def test_every_example_is_used_if_losses_end():
    sizes = [12, 12, 12, 12]
    losses = [(1, False), (None, False), (2, True), (0, True)]
    _, used, left = run(0, sizes, "fpls", losses)
    assert left.tolist() == [0, 0, 0, 0]
    assert all(sorted(used[k]) == list(range(n)) for k, n in enumerate(sizes))


def test_made_again_without_the_lost_client_its_gradient_would_follow():
    """The same, were steps made again as without secure aggregation: the clients do not answer, and rightly so."""
    sizes = [4, 4, 4, 4]
    orders = EpochLedger(SAMPLERS["fpls"](8, seed=0), Population(np.arange(4), np.array(sizes)), 0)
    orders = orders.orders(0, orders.step(np.arange(4)))
    clients = {k: Client(k, n) for k, n in enumerate(sizes)}
    without = orders.take(np.arange(3))
    first, second = (company_of(clients, each, i) for i, each in enumerate((orders, without)))
    equations = [[u for o in orders.each() for u in clients[o.client].answer(first, "backward", "w0", o)]]
    for order in without.each():
        try:
            clients[order.client].answer(second, "backward", "w0", order)
        except ProtocolError as error:
            assert "each example once" in str(error)  # noqa: PT017 - it is the point, of each of them
        else:
            raise AssertionError("it gave its example twice")
    forgetful = {k: Client(k, n) for k, n in enumerate(sizes)}
    company = replace(second, keys=company_of(forgetful, without, 1).keys)
    equations.append([u for o in without.each() for u in forgetful[o.client].answer(company, "backward", "w0", o)])
    assert isolated(equations) == {3}
