"""Parts of the model that a client keeps for a round and trains itself.

They live in the process that serves the client. The server's word is what was committed: its orders say how many
examples of the round a client has used. A step of the client's part stays provisional until the next order counts it
in; one that comes again, because a reply was lost or the step failed elsewhere, is undone first. So a step can be asked
for any number of times. What cannot be brought to where the server is, is out of the round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from psl_flower.client.part import ClientPart, parameter_gradients
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.exchange.validation import is_finite
from psl_flower.failures import Kind
from psl_flower.protocol import Orders
from psl_flower.server.optimizer import RatedOptimizer
from psl_flower.tree import Tree


class OwnPart:
    """One client's own part of the model in a round.

    Parameters
    ----------
    part : ClientPart
        Nobody else's.
    make_optimizer : callable
        Takes its trainable parameters, see `psl_flower.server.make_optimizer`.
    """

    def __init__(self, part: ClientPart, make_optimizer: Callable[[Any], Any]) -> None:
        self.part, self.used = part, 0
        self._rated = RatedOptimizer(make_optimizer, part.parameters)
        self._before: tuple[int, dict[str, Tensor], dict[str, Any]] | None = None

    def go_to(self, used: int) -> None:
        """Be where the server is, which has committed so many examples of the round.

        Raises
        ------
        ProtocolError
            If that was before the last step.
        """
        if used < self.used:
            if self._before is None or used != self._before[0]:
                raise _out(f"its own {self.part.name} was trained on {self.used} examples, the server counts {used}")
            _, parameters, optimizer = self._before
            with torch.no_grad():
                for name, t in parameters.items():
                    self.part.parameters[name].copy_(t)
            self._rated.optimizer.load_state_dict(optimizer)
        if used != self.used:
            self._before = None
        self.used = used  # more than there were: steps that the server has skipped

    def step(self, gradients: Mapping[str, Tensor | None], rate: float, count: int) -> None:
        """Step the optimizer.

        Parameters
        ----------
        gradients : dict of str to Tensor or None
            Of the parameters.
        rate : float
            What the server's schedule has made of the learning rate, as a factor.
        count : int
            Examples they are of.

        Raises
        ------
        ProtocolError
            If a gradient is not finite; nothing is changed then.
        """
        if wrong := [name for name, g in gradients.items() if g is not None and not is_finite(g)]:
            raise ProtocolError(f"the gradient of its own {wrong[0]!r} is not finite", Kind.NOT_FINITE)
        parameters = {name: p.detach().clone() for name, p in self.part.parameters.items()}
        self._before = (self.used, parameters, copy.deepcopy(self._rated.optimizer.state_dict()))
        self.used += count
        for name, p in self.part.parameters.items():
            gradient = gradients[name]
            p.grad = None if gradient is None else gradient.to(p.device)
        self._rated.step(rate)
        for p in self.part.parameters.values():
            p.grad = None


class OwnParts:
    """What the clients of a process keep of their own, by node; that of an earlier round is dropped."""

    def __init__(self) -> None:
        self.make_optimizer: dict[int, Callable[[Any], Any]] = {}  # by node
        self._round: tuple[int, int] | None = None
        self._kept: dict[int, dict[str, OwnPart]] = {}

    def begin(self, node: int, orders: Orders, part: ClientPart) -> None:
        """Let a client have a copy of a part for the round of these orders.

        Raises
        ------
        ConfigError
            If the client was given no optimizer.
        """
        if node not in self.make_optimizer:
            raise ConfigError(
                "this method trains a part of the model on the clients: give them an optimizer, "
                "split_client_app(..., optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))"
            )
        if self._round != (orders.seed, orders.epoch):
            self._round = (orders.seed, orders.epoch)
            self._kept.clear()
        self._kept.setdefault(node, {})[part.name] = OwnPart(part.copy(), self.make_optimizer[node])

    def find(self, node: int, orders: Orders) -> Mapping[str, OwnPart]:
        """Return what a client keeps, where the orders of it are.

        Raises
        ------
        ProtocolError
            If it has nothing from this round.
        """
        found = self._kept.get(node, {}) if self._round == (orders.seed, orders.epoch) else {}
        if not found:
            raise _out("its own part of the model is gone: the process that kept it has ended, or another serves it")
        for own in found.values():
            own.go_to(int(orders.starts[0]))
        return found

    def forget(self, node: int) -> None:
        """Drop what a client keeps."""
        self._kept.pop(node, None)


def _out(what: str) -> ProtocolError:
    return ProtocolError(
        f"{what}; it is left out for the rest of the round. The transport must leave each client in one process: "
        "'streams' does",
        Kind.LEFT_OUT,
    )


class BoundOwn:
    """A client's own part in a step, as stages call it; see `psl_flower.client.context.BoundPart`."""

    def __init__(self, own: OwnPart, forward: Callable[[Tree], Tree], count: int) -> None:
        self._own, self._forward, self._count = own, forward, count

    def __call__(self, inputs: Tree) -> Tree:
        """Run the part on a batch."""
        return self._forward(inputs)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The trainable parameters as they are now, by whole-model name."""
        return self._own.part.parameters

    def gradients(self, outputs: Tree, gradients: Tree) -> dict[str, Tensor | None]:
        """Return the parameter gradients, given those of the outputs; None for parameters that took no part."""
        return parameter_gradients(self._own.part.parameters, outputs, gradients)

    def step(self, gradients: Mapping[str, Tensor | None], rate: float) -> None:
        """Step the part's own optimizer, with its learning rate times `rate`."""
        self._own.step(gradients, rate, self._count)
