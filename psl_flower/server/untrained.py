"""What a loss depends on beside the outputs of the model that is trained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def untrained(loss: Tensor, known: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that want a gradient of a loss, and are none of those known.

    Parameters
    ----------
    loss : Tensor
        With its graph.
    known : iterable of Tensor
        Leaves of the graph that get their gradients.
    """
    ids = {id(tensor) for tensor in known}
    waiting, seen, found = [loss.grad_fn], set(), list[Tensor]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of a node that adds up a leaf's gradient
        if leaf is not None and id(leaf) not in ids:
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found[::-1]
