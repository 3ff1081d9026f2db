"""What was committed, and what a trainer in one place makes of it."""

import copy
from collections import defaultdict
from dataclasses import replace

import torch
from torch import nn

from mayhem.task import K, data_of, make_model, sgd
from psl_flower import SplitClient
from psl_flower.strategy.step import StepRunner


class Recording(SplitClient):
    """Takes note of the examples of every training batch; of one, claims test examples without end."""

    drawn, claiming = {}, None

    def draw(self, order):
        indices = super().draw(order)
        if not order.test:
            Recording.drawn[order.epoch, order.step, order.client] = indices
        return indices

    def describe(self, **asked):
        described = super().describe(**asked)
        return replace(described, num_test_examples=10**9) if self.partition_id == Recording.claiming else described


class Record:
    """The committed steps, with the examples of each client in them; and who was averaged after a round."""

    def __init__(self):
        self.steps, self.averaged, self.round = [], {}, 0

    def used(self):
        """Return the examples that were used, by round and client, as often as they were."""
        found = defaultdict(list)
        for server_round, drawn in self.steps:
            for client, rows in drawn.items():
                found[server_round, client] += rows.tolist()
        return found


def recording(record):
    """Return a StepRunner that writes into a record."""

    class Runner(StepRunner):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.fresh = True

        def attempt(self, orders, waits):
            if self.fresh:  # what was committed since the checkpoint is gone
                del record.steps[self._summary.steps_committed :]
                self.fresh = False
            attempt = super().attempt(orders, waits)
            if attempt.record is not None:
                rows = {c: Recording.drawn[orders.epoch, orders.step, c] for c in attempt.clients}
                assert {c: len(each) for c, each in rows.items()} == attempt.counts()
                record.steps.append((record.round, rows))
            return attempt

        def around(self, hook, orders):
            attempt = super().around(hook, orders)
            if hook.__name__ == "end_round":
                left = [i for i, c in enumerate(orders.clients.tolist()) if c not in attempt.lost]
                record.averaged[record.round] = dict(
                    zip(orders.clients[left].tolist(), orders.counts[left].tolist(), strict=True)
                )
            return attempt

    return Runner


def reference(scenario, record):
    """Return the weights that a trainer in one place makes of the committed steps."""
    model = make_model(scenario.tail)
    parts = [model.client, model.server, *([model.tail] if scenario.tail else [])]
    data = [data_of(k).tensors for k in range(K)]

    def step(chain, drawn, optimizers):
        x, y = (torch.cat([data[k][i][rows] for k, rows in drawn.items()]) for i in (0, 1))
        for each in optimizers:
            each.zero_grad()
        nn.functional.cross_entropy(nn.Sequential(*chain)(x), y).backward()
        for each in optimizers:
            each.step()

    whole = sgd([p for part in parts for p in part.parameters()])
    body = sgd(parts[1].parameters())
    for server_round in range(1, scenario.epochs + 1):
        own = {}
        for drawn in (drawn for r, drawn in record.steps if r == server_round):
            if not scenario.method.startswith("splitfed"):
                step(parts, drawn, [whole])
                continue
            for client, rows in drawn.items():
                if client not in own:
                    v1 = scenario.method == "splitfed-v1"
                    chain = [copy.deepcopy(parts[0]), copy.deepcopy(parts[1]) if v1 else parts[1]]
                    own[client] = (chain, [sgd(chain[0].parameters()), sgd(chain[1].parameters()) if v1 else body])
                step(own[client][0], {client: rows}, own[client][1])
        if scenario.method.startswith("splitfed"):
            weights = record.averaged[server_round]
            for i in range(2 if scenario.method == "splitfed-v1" else 1):
                states = {c: own[c][0][i].state_dict() for c in weights}
                total = sum(weights.values())
                mean = {n: sum(states[c][n] * w for c, w in weights.items()) / total for n in parts[i].state_dict()}
                parts[i].load_state_dict(mean)
    return dict(model.state_dict())
