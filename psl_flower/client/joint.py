"""Many clients of one process in ONE pass through the client half.

Every client's half has the same weights, so a pass over all their rows computes what a pass for each would, a hundred
times faster on a step of a hundred clients. It does so only if the half treats each example by itself and draws no
random numbers. Neither is guessed from the layers: the first joint pass is compared with a pass over one client's rows
alone, and torch's generator is looked at after every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from psl_flower.client.client import SplitClient, to_device
from psl_flower.client.worker import Graph
from psl_flower.devices import seeded
from psl_flower.protocol import Weights, WorkOrder
from psl_flower.typing import IntArray


class CannotJoinError(Exception):
    """These clients must be served one at a time; if `lasting`, always."""

    def __init__(self, reason: str, *, lasting: bool) -> None:
        super().__init__(reason)
        self.lasting = lasting


def joint_forward(
    clients: Sequence[SplitClient], orders: Sequence[WorkOrder], weights: Weights, *, verify: bool
) -> Graph:
    """Run the client half once on the batches of several clients.

    Parameters
    ----------
    clients, orders : sequence
        Of the same length; the rows of the result are in this order.
    verify : bool
        Whether to compare with a pass over the first client's rows alone.

    Returns
    -------
    Graph
        Its backward pass returns the sum of the clients' parameter gradients.

    Raises
    ------
    CannotJoinError
        If a joint pass is not what single passes are.
    """
    batches = []
    device = clients[0].worker.device
    with seeded(0, device):  # puts the generators back once, not once a client: that would take longer than the model
        for client, order in zip(clients, orders, strict=True):
            _seed(order.step_seed(), device)
            batches.append(client.batch(client.train, client.draw(order)))
    return _pass(clients, batches, weights, training=True, verify=verify)


def joint_evaluate(
    clients: Sequence[SplitClient], rows: Sequence[IntArray], weights: Weights, *, verify: bool
) -> Graph:
    """Run the client half once, in evaluation mode, on the test examples `rows` of several clients."""
    batches = []
    device = clients[0].worker.device
    with seeded(0, device):
        for client, some in zip(clients, rows, strict=True):
            _seed(0, device)
            batches.append(client.batch(client.test, some))
    return _pass(clients, batches, weights, training=False, verify=verify)


def _pass(
    clients: Sequence[SplitClient], batches: list[tuple[Any, Tensor]], weights: Weights, *, training: bool, verify: bool
) -> Graph:
    first = clients[0]
    for client in clients:
        if type(client).forward is not SplitClient.forward:
            raise CannotJoinError(f"{type(client).__name__} has a forward pass of its own", lasting=True)
    worker = first.worker
    inputs = to_device(_joined([inputs for inputs, _ in batches]), worker.device)
    labels = _joined([torch.as_tensor(labels) for _, labels in batches])
    with seeded(0, worker.device):  # a half that draws random numbers is found out, and must not change anything
        before = _random_state(worker.device)
        with worker.bound(weights, training=training) as (half, parameters):
            activations = first.forward(half, inputs)
            if verify:
                alone = first.forward(half, to_device(batches[0][0], worker.device))
        if not torch.equal(before, _random_state(worker.device)):
            raise CannotJoinError("the client half draws random numbers, which are each client's own", lasting=True)
    if verify and not all(map(_same, activations, alone)):
        raise CannotJoinError("the client half mixes the examples of a batch", lasting=True)
    return Graph(activations, labels, parameters)


def _joined(parts: list[Any]) -> Any:
    if all(isinstance(part, Tensor) for part in parts):
        if any(p.shape[1:] != parts[0].shape[1:] or p.dtype != parts[0].dtype for p in parts):
            raise CannotJoinError("the clients' batches differ in shape or dtype", lasting=False)
        return torch.cat(parts)
    if all(isinstance(part, tuple | list) and len(part) == len(parts[0]) for part in parts):
        return tuple(_joined(list(column)) for column in zip(*parts, strict=True))
    raise CannotJoinError("the clients' batches are not tensors or tuples of tensors alike", lasting=False)


def _same(joint: Tensor, alone: Tensor) -> bool:
    """Return whether the first rows of a joint pass are those of a single one, but for rounding."""
    some = joint[: len(alone)]
    if some.shape != alone.shape or some.dtype != alone.dtype:
        return False
    if not (some.is_floating_point() or some.is_complex()):
        return torch.equal(some, alone)
    # rounding is some multiples of eps, what batch statistics do is far above its root
    tolerance = torch.finfo(some.dtype).eps ** 0.5 * alone.abs().max().item() if alone.numel() else 0.0
    return bool(((some - alone).abs() <= tolerance).all())


def _seed(seed: int, device: torch.device) -> None:
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # as manual_seed does, which then looks at every other kind of device
    else:
        torch.manual_seed(seed)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
