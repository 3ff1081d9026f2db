"""What a stage of a method is given on a client: the parts of the model, and what earlier stages of the step kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from psl_flower import tree
from psl_flower.client.client import SplitClient
from psl_flower.client.own import BoundOwn, OwnPart
from psl_flower.client.part import ClientPart, parameter_gradients
from psl_flower.data.batch import Batch
from psl_flower.protocol import Orders
from psl_flower.tree import Tree
from psl_flower.typing import IntArray


class BoundPart:
    """A part of the model with the weights of the step, as stages call it."""

    def __init__(self, part: ClientPart, client: SplitClient, *, training: bool) -> None:
        self._part, self._client, self._training = part, client, training

    def __call__(self, inputs: Tree) -> Tree:
        """Run the part on a batch, in training or evaluation mode as the request has it."""
        with self._part.running(training=self._training) as module:
            outputs = self._client.forward(module, tree.to_device(inputs, self._part.device))
        return tree.as_tree(outputs, f"what the {self._part.name} returns")

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The trainable parameters, by whole-model name."""
        return self._part.parameters

    def gradients(self, outputs: Tree, gradients: Tree) -> dict[str, Tensor | None]:
        """Return the parameter gradients, given those of the outputs; None for parameters that took no part."""
        return parameter_gradients(self._part.parameters, outputs, gradients)


class ClientContext:
    """One client in one step, or several that a process serves as one.

    The parts of the model are attributes: ``client.head(batch.inputs)``; those that the client keeps for a round are
    ``client.own("head")``, in stages that say `own`.

    Parameters
    ----------
    clients : sequence of SplitClient
    parts : dict of str to ClientPart
    orders : Orders
    batch : Batch or None
        None where the stage is not about examples.
    own : dict of str to OwnPart
        What the client keeps.
    keep : callable, optional
        Takes a `ClientPart`, and has the client keep a copy of it.

    Attributes
    ----------
    kept : dict
        What a stage keeps for those after it.
    counts : (A,) int64
        Examples of each client.
    training : bool
    """

    def __init__(
        self,
        clients: Sequence[SplitClient],
        parts: Mapping[str, ClientPart],
        orders: Orders,
        batch: Batch | None,
        own: Mapping[str, OwnPart] | None = None,
        keep: Callable[[ClientPart], None] | None = None,
    ) -> None:
        self._client, self._shared = clients[0], parts
        self._own, self._keep = own or {}, keep
        self._parts = {name: BoundPart(part, clients[0], training=not orders.test) for name, part in parts.items()}
        self.kept: dict[str, Any] = {}
        self.counts: IntArray = orders.counts
        self.training = not orders.test
        self.batch = batch
        self.checksums: IntArray | None = None

    def __getattr__(self, name: str) -> BoundPart:
        parts = self.__dict__.get("_parts", {})
        if name not in parts:
            raise AttributeError(f"there is no part {name!r} on the client, only {', '.join(parts)}")
        part: BoundPart = parts[name]
        return part

    def begin(self, name: str) -> None:
        """Keep a copy of a part for the round, to be trained here."""
        assert self._keep is not None, "only a stage of one client can begin a part of its own"
        self._keep(self._shared[name])

    def own(self, name: str) -> BoundOwn:
        """Return the client's own copy of a part."""
        kept = self._own[name]
        run = BoundPart(kept.part, self._client, training=self.training)
        return BoundOwn(kept, run, int(self.counts.sum()))

    def num_bytes(self) -> int:
        """Return the bytes of what is kept: a lower bound of what the graphs hold."""
        return sum(tree.num_bytes(value) for value in self.kept.values() if isinstance(value, Tensor | tuple | dict))


def random_state(device: torch.device) -> Tensor:
    """Return the state of torch's generator for a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
