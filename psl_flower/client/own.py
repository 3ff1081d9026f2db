"""Parts of the model that a client keeps for a round and trains itself.

They live in the process that serves the client, and between messages in the node's Flower state (`keeping.py`). The
server's word is what was committed: its orders say how many examples of the round a client has used. A step of the
client's part stays provisional until the next order counts it in; one that comes again, because a reply was lost or the
step failed elsewhere, is undone first. So a step can be asked for any number of times. What cannot be brought to where
the server is, is out of the round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from psl_flower.client.part import ClientPart
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.failures import Kind
from psl_flower.protocol import Orders, Weights
from psl_flower.server.optimizer import RatedOptimizer
from psl_flower.tree import Tree, is_finite


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
        self._end = 0  # of the last batch that it was run on
        self._rated = RatedOptimizer(make_optimizer, part.parameters)
        self._before: tuple[int, dict[str, Tensor], dict[str, Any]] | None = None

    def go_to(self, used: int) -> None:
        """Be where the server is, which has committed so many examples of the round.

        That is after the last step; or before it, if that came to nothing; or after the last batch that it was run on
        and not trained with, if the server has skipped the step.

        Raises
        ------
        ProtocolError
            If it is anywhere else.
        """
        if used == self.used:
            return
        if self._before is not None and used == self._before[0]:
            _, parameters, optimizer = self._before
            with torch.no_grad():
                for name, t in parameters.items():
                    self.part.parameters[name].copy_(t)
            self._rated.optimizer.load_state_dict(optimizer)
        elif used != self._end or used < self.used:
            raise _out(f"its own {self.part.name} was trained on {self.used} examples, the server counts {used}")
        self.used, self._before = used, None

    def run_on(self, count: int) -> None:
        """Take note of a batch of so many examples."""
        self._end = self.used + count

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

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for another process."""
        return {
            "weights": vars(self.part.weights()),
            "used": self.used,
            "end": self._end,
            "optimizer": self._rated.optimizer.state_dict(),
            "before": self._before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, but for the weights: the part must have been given those."""
        self.used, self._end, self._before = state["used"], state["end"], state["before"]
        self._rated.optimizer.load_state_dict(state["optimizer"])


class OwnParts:
    """What the clients of a process keep of their own for a round, by node."""

    def __init__(self) -> None:
        self.make_optimizer: dict[int, Callable[[Any], Any]] = {}  # by node
        self._kept: dict[int, tuple[tuple[int, int], dict[str, OwnPart]]] = {}  # with seed and epoch

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
        now = (orders.seed, orders.epoch)
        self._kept = {n: kept for n, kept in self._kept.items() if kept[0] == now}
        self._kept.setdefault(node, (now, {}))[1][part.name] = OwnPart(part.copy(), self.make_optimizer[node])

    def find(self, node: int, orders: Orders) -> Mapping[str, OwnPart]:
        """Return what a client keeps, where the orders of it are.

        Raises
        ------
        ProtocolError
            If it has nothing from this round.
        """
        round_, found = self._kept.get(node, ((0, 0), {}))
        if not found or round_ != (orders.seed, orders.epoch):
            raise _out("its own part of the model is gone: the process that kept it has ended")
        for own in found.values():
            own.go_to(int(orders.starts[0]))
        return found

    def identity(self, node: int) -> tuple[int, ...]:
        """Return what tells a client's parts from those it had before they came back from another process."""
        return tuple(map(id, self._kept[node][1].values())) if node in self._kept else ()

    def forget(self, node: int) -> None:
        """Drop what a client keeps."""
        self._kept.pop(node, None)

    def state_dict(self, node: int) -> dict[str, Any] | None:
        """Return what a client keeps, for another process."""
        if node not in self._kept:
            return None
        round_, parts = self._kept[node]
        return {"round": round_, "parts": {name: own.state_dict() for name, own in parts.items()}}

    def load_state_dict(self, node: int, state: Mapping[str, Any], parts: Mapping[str, ClientPart]) -> None:
        """Let a client go on with what `state_dict` returned, in copies of this process's parts."""
        found = {}
        for name, saved in state["parts"].items():
            part = parts[name].copy()
            part.load(Weights(**saved["weights"]))
            found[name] = OwnPart(part, self.make_optimizer[node])
            found[name].load_state_dict(saved)
        self._kept[node] = (state["round"], found)


def _out(what: str) -> ProtocolError:
    return ProtocolError(f"{what}; it is left out for the rest of the round", Kind.LEFT_OUT)


class Bound(Protocol):
    """A part with the weights of the step: `psl_flower.client.context.BoundPart`."""

    def __call__(self, inputs: Tree) -> Tree:
        """Run it."""

    def gradients(self, outputs: Tree, gradients: Tree) -> dict[str, Tensor | None]:
        """Return the parameter gradients, given those of the outputs."""


class BoundOwn:
    """A client's own part in a step, as stages call it; see `psl_flower.client.context.BoundPart`."""

    def __init__(self, own: OwnPart, bound: Bound, count: int) -> None:
        self._own, self._bound, self._count = own, bound, count

    def __call__(self, inputs: Tree) -> Tree:
        """Run the part on a batch."""
        self._own.run_on(self._count)
        return self._bound(inputs)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The trainable parameters as they are now, by whole-model name."""
        return self._own.part.parameters

    def gradients(self, outputs: Tree, gradients: Tree) -> dict[str, Tensor | None]:
        """Return the parameter gradients, given those of the outputs; None for parameters that took no part."""
        return self._bound.gradients(outputs, gradients)

    def step(self, gradients: Mapping[str, Tensor | None], rate: float) -> None:
        """Step the part's own optimizer, with its learning rate times `rate`."""
        self._own.step(gradients, rate, self._count)
