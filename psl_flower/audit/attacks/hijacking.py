"""Feature-space hijacking: a server trains the head toward a feature space that it can decode (arXiv 2012.02670)."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from psl_flower import tree
from psl_flower.audit.attacks.base import reconstruction
from psl_flower.audit.attacks.decoder import decoder_network
from psl_flower.audit.finding import Finding, Found
from psl_flower.audit.quiet import quietly
from psl_flower.audit.rehearsal import Setting, dealt, rehearse
from psl_flower.audit.scene import crossing, one_tensor
from psl_flower.methods import ParallelSplit
from psl_flower.methods.context import StepContext
from psl_flower.privacy import GradientScrutiny
from psl_flower.split import replace_batch_norm
from psl_flower.split.model import cut_model

NAME = "hijacking"
_PARTY = "server that departs from the protocol, with shadow data"
_ROUNDS, _EXAMPLES, _CLIENTS = 8, 1500, 4
_WIDTH, _RATE = 256, 1e-3
_PENALTY = 10.0  # of the critic's gradient (Gulrajani et al., arXiv 1704.00028)
_CRITIC_STEPS = 2


def hijack(setting: Setting) -> Found:
    """Train under a server that hijacks the head; say what it sees in the end, and how many clients notice.

    Clients notice with `GradientScrutiny`; beside it stands how many would leave an honest server for it.
    """
    if setting.tail is not None or setting.cut is None:
        return Found()
    some = replace(
        setting,
        train=(setting.train[0][:_EXAMPLES], setting.train[1][:_EXAMPLES]),
        num_clients=_CLIENTS,
        num_shadow=_CLIENTS // 2,
        num_rounds=max(_ROUNDS, setting.num_rounds),
        optimizer=_adam,
    )
    watching = GradientScrutiny(setting.num_classes, leave=False)
    known = np.concatenate(dealt(some)[0][: some.num_shadow])
    model = replace_batch_norm(some.model, before=some.cut)
    server = HijackingServer(cut_model(model, some.cut).client, some.train[0][known], some.seed)
    with quietly(logging.CRITICAL):
        scene = rehearse(replace(some, defences=(*some.defences, watching)), server).scene
    rows = scene.rows("activations")
    if rows is None:
        return Found()
    victims = np.flatnonzero(~rows.shadow)
    with torch.no_grad():
        guesses = server.decoder(rows.seen(victims))
    found = reconstruction(NAME, _PARTY, rows, guesses, rows.inputs[torch.from_numpy(victims)], scene.data_range)
    trusting = GradientScrutiny(setting.num_classes, leave=False)
    with quietly(logging.CRITICAL):
        rehearse(replace(some, optimizer=setting.optimizer, defences=(*some.defences, trusting)))
    found.findings.append(
        Finding(
            attack=NAME,
            party="a client, with GradientScrutiny",
            measure="clients that notice; of an honest server",
            value=_alarmed(watching),
            floor=_alarmed(trusting),
            detection=True,
        )
    )
    return found


def _alarmed(scrutiny: GradientScrutiny) -> float:
    """Return the share of clients that were alarmed at some time."""
    watches = scrutiny.watches()
    return sum(watch.alarms > 0 for watch in watches) / max(len(watches), 1)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=_RATE)


class HijackingServer(ParallelSplit):
    """The server's end of plain split learning, which sends back another gradient than that of the loss.

    It trains a pilot of the head and its decoder on data of its own, and a critic that tells the pilot's activations
    from the clients'. What clients are sent is the gradient that makes their activations look like the pilot's to the
    critic, as long as the honest one, so that its length shows nothing. In the end the decoder decodes theirs.

    Parameters
    ----------
    head : nn.Module
        The clients' part; copied.
    shadow : (N, ...) float32
        Inputs of the server's own.
    seed : int
    """

    def __init__(self, head: nn.Module, shadow: Tensor, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._pilot = copy.deepcopy(head).train()
            activations = crossing(self._pilot, shadow[:2])
            self.decoder = decoder_network(activations, shadow)
            self._critic = nn.Sequential(
                nn.Flatten(),
                nn.Linear(activations[0].numel(), _WIDTH),
                nn.LeakyReLU(0.2),
                nn.Linear(_WIDTH, _WIDTH),
                nn.LeakyReLU(0.2),
                nn.Linear(_WIDTH, 1),
            )
        self._shadow, self._random = shadow, torch.Generator().manual_seed(seed)
        self._coder = torch.optim.Adam([*self._pilot.parameters(), *self.decoder.parameters()], lr=_RATE)
        self._judge = torch.optim.Adam(self._critic.parameters(), lr=_RATE, betas=(0.5, 0.9))

    def step(self, ctx: StepContext) -> Any:
        """Make a step that looks like one of plain split learning."""
        sent = ctx.call(self.forward)
        outcome = ctx.body.forward_backward(sent.activations, sent.labels)  # for the record
        gradient = self._hijack(one_tensor(sent.activations), one_tensor(outcome.gradient))
        back = ctx.call(self.backward, gradient=tree.build(tree.structure(sent.activations), [gradient]))
        ctx.commit(head=back.head, body=outcome.parameter_gradients)
        return outcome

    def _hijack(self, activations: Tensor, honest: Tensor) -> Tensor:
        chosen = torch.randint(len(self._shadow), (len(activations),), generator=self._random)
        inputs = self._shadow[chosen]
        target = crossing(self._pilot, inputs)
        self._step(self._coder, functional.mse_loss(self.decoder(target), inputs))
        target = target.detach()
        for _ in range(_CRITIC_STEPS):
            between = target + torch.rand(len(target), *[1] * (target.ndim - 1), generator=self._random) * (
                activations - target
            )
            between.requires_grad_()
            (slope,) = torch.autograd.grad(self._critic(between).sum(), between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            self._step(
                self._judge,
                self._critic(activations).mean() - self._critic(target).mean() + _PENALTY * penalty,
            )
        received = activations.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(-self._critic(received).mean(), received)
        scaled: Tensor = gradient * (honest.norm() / gradient.norm().clamp_min(1e-30))
        return scaled

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
