"""What a stage of a method is given on a client: the parts of the model, and what earlier stages of the step kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from psl_flower import tree
from psl_flower.client.client import SplitClient
from psl_flower.client.defending import Defending
from psl_flower.client.own import BoundOwn, OwnPart
from psl_flower.client.part import ClientPart, LossFn, parameter_gradients, with_gradients
from psl_flower.client.remedy import remedy
from psl_flower.data.batch import Batch
from psl_flower.errors import ConfigError
from psl_flower.methods.base import Stage
from psl_flower.origin import place, where
from psl_flower.precision import FULL, computing, widened
from psl_flower.privacy.per_example import clipped_sum, finite_rows
from psl_flower.protocol import Orders
from psl_flower.server import WeightedLoss
from psl_flower.split import text_length
from psl_flower.tree import Tree
from psl_flower.typing import IntArray


class BoundPart:
    """A part of the model with the weights of the step, as stages call it.

    Parameters
    ----------
    part : ClientPart
    training : bool
    client : SplitClient, optional
        Runs the part, if it is the one that takes a batch's inputs.
    loss : LossFn, optional
    defending : Defending
        What leaves in place of the outputs.
    bound : float, optional
        Largest norm of one example's gradient of the part; each is scaled down to it.
    length : int, optional
        Of the batch's texts: what the server gives back is as long as the longest of the step.
    used : dict
        The part is entered, by its name, when it is run.
    precision : str
        In which it computes.
    """

    def __init__(
        self,
        part: ClientPart,
        *,
        training: bool,
        client: SplitClient | None = None,
        loss: LossFn | None = None,
        defending: Defending,
        bound: float | None = None,
        length: int | None = None,
        used: dict[str, ClientPart],
        precision: str = FULL,
    ) -> None:
        self._used, self._precision = used, precision
        self._part, self._client, self._training, self._loss = part, client, training, loss
        self._defending, self._bound, self._length = defending, bound, length
        self._ran: tuple[Tree, Any] = (None, None)  # inputs and outputs
        self._of_examples: Mapping[int, Tensor] = {}  # gradients of the outputs, by the position of the leaf

    def __call__(self, inputs: Tree) -> Tree:
        """Run the part on a batch, in training or evaluation mode as the request has it.

        The model's first part takes a batch's inputs; another what crosses a cut, one argument an entry of a tuple.
        """
        outputs = tree.as_tree(self._run(inputs), f"what the {self._part.name} returns")
        if self._bound is not None and self._training:
            outputs = tree.map_leaves(finite_rows, outputs)
        return self._defending.apart(outputs)

    def _run(self, inputs: Tree) -> Any:
        self._used[self._part.name] = self._part
        moved = self._part.shortened(tree.to_device(inputs, self._part.device), self._length)
        with self._part.running(training=self._training) as module:
            run = partial(self._forward, module)
            try:
                outputs = run(moved)
            except (RuntimeError, IndexError) as exc:
                hint = remedy(module, moved, exc)
                if place(exc) is not None and not hint:  # which says more
                    raise
                shown = ", ".join(f"{t.dtype} {tuple(t.shape[1:])}" for t in tree.leaves(moved))
                raise ConfigError(f"{self._part.called} failed on rows of {shown}: {where(exc)}{hint}") from exc
        if self._training:  # only now: a module that keeps a state was refused for that
            self._part.check_rows(partial(self._own_forward, module), widened(moved, self._precision))
            self._ran = (moved, outputs)
        return outputs

    def _forward(self, module: nn.Module, inputs: Tree) -> Any:
        with computing(self._precision, self._part.device):
            return self._own_forward(module, inputs)

    @property
    def _own_forward(self) -> Callable[[Any, Tree], Any]:
        return _run if self._client is None else self._client.forward

    def loss(self, inputs: Tree, target: Tree) -> WeightedLoss:
        """Run the model's last part, and return the loss of its outputs: the mean, and what it is the mean over."""
        if self._loss is None:
            raise ConfigError(f"the loss of the {self._part.name} is not known on this client")
        outputs, rows = self._run(inputs), tree.rows(inputs, "inputs")
        with torch.set_grad_enabled(self._training), computing(self._precision, self._part.device):
            found = self._loss(outputs, target, rows, self._part.device)
            if self._bound is not None and self._training:
                found, self._of_examples = self._loss.each(outputs, target, rows, found, self._part.device)
        return found

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The trainable parameters, by whole-model name."""
        return self._part.parameters

    def backward(self, loss: WeightedLoss, share: float, inputs: Tree) -> tuple[Tree, dict[str, Tensor | None]]:
        """Back-propagate a share of a loss; return the gradients of the part's inputs, and of its parameters.

        Where nothing counts in the loss, those of the inputs are zero. A loss without a gradient is refused.

        Parameters
        ----------
        loss : WeightedLoss
            Of `loss`.
        share : float
            What its mean is multiplied with.
        inputs : tree
            Leaves that went into it.
        """
        if self._bound is not None:
            return self._backward_clipped(share, inputs)
        if not loss.weight:
            return no_gradient(inputs), dict.fromkeys(self.parameters)
        loss.check_gradient()
        roots = [leaf for leaf in tree.leaves(inputs) if leaf.requires_grad]
        wanted = [*roots, *self.parameters.values()]
        found = torch.autograd.grad(loss.mean, wanted, torch.full_like(loss.mean, share), allow_unused=True)
        moved = [None if gradient is None else gradient.cpu() for gradient in found]
        return _back(inputs, moved), dict(zip(self.parameters, moved[len(roots) :], strict=True))

    def _backward_clipped(self, share: float, inputs: Tree) -> tuple[Tree, dict[str, Tensor | None]]:
        """Back-propagate a share of the losses of single examples."""
        outputs = tree.leaves(tree.as_tree(self._ran[1], f"what the {self._part.name} returns"))
        given = {at: share * gradient for at, gradient in self._of_examples.items()}
        roots = [leaf for leaf in tree.leaves(inputs) if leaf.requires_grad]
        found = torch.autograd.grad([outputs[at] for at in given], roots, list(given.values()), allow_unused=True)
        moved = [None if gradient is None else finite_rows(gradient).cpu() for gradient in found]
        return _back(inputs, moved), self._clipped(given)

    def _clipped(self, gradients: Mapping[int, Tensor]) -> dict[str, Tensor | None]:
        """Return the sum of the examples' parameter gradients, clipped one by one; those of the outputs by position."""
        assert self._bound is not None, "gradients are clipped where there is a bound"
        with self._part.running(training=True) as module:
            found = clipped_sum(self._forward, module, self._ran[0], gradients, self._bound, who=self._part.called)
        return {name: t.cpu() for name, t in found.items()}

    def gradients(self, outputs: Tree, gradients: Tree, *, again: bool = False) -> dict[str, Tensor | None]:
        """Return the parameter gradients, given those of the outputs; None for parameters that took no part.

        Parameters
        ----------
        outputs : tree
            Attached to their graph.
        gradients : tree
            Of the same form; None for what has none.
        again : bool
            Whether another stage goes back through the same graph.
        """
        left, penalty = self._defending.in_place_of(outputs)
        gradients = self._part.shortened(gradients, self._length, given=True)
        if self._bound is not None:
            if again:
                raise ConfigError(
                    "DP-SGD clips an example's gradient as a whole: not where something skips the body, and its "
                    "gradient comes in two pieces. Cut the model elsewhere"
                )
            pairs, given = with_gradients(left, gradients), tree.leaves(outputs)
            back = torch.autograd.grad(
                [t for _, t, _ in pairs], [given[at] for at, *_ in pairs], [g for *_, g in pairs]
            )
            return self._clipped({at: g for (at, *_), g in zip(pairs, back, strict=True)})
        return parameter_gradients(self._part.parameters, left, gradients, again=again, penalty=penalty)


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
    defending : Defending, optional
        What the clients do to what leaves them.
    bound : float, optional
        Largest norm of one example's gradient of one part.
    precision : str
        In which the parts compute.

    Attributes
    ----------
    kept : dict
        What a stage keeps for those after it.
    counts : (A,) int64
        Examples of each client.
    training : bool
    batch : Batch
        Of all of them, in their order.
    used : dict of str to ClientPart
        The parts that the stages of the step have run so far.
    """

    def __init__(
        self,
        clients: Sequence[SplitClient],
        parts: Mapping[str, ClientPart],
        orders: Orders,
        batch: Batch | None,
        loss: LossFn | None = None,
        own: Mapping[str, OwnPart] | None = None,
        keep: Callable[[ClientPart], None] | None = None,
        defending: Defending | None = None,
        bound: float | None = None,
        precision: str = FULL,
    ) -> None:
        self._client, self._shared, self._precision = clients[0], parts, precision
        self._own, self._keep = own or {}, keep
        self.defending = defending or Defending()
        self.used: dict[str, ClientPart] = {}
        first = next(iter(parts))
        self._length = None if batch is None else text_length(batch.inputs)
        self._parts = {
            name: BoundPart(
                part,
                training=not orders.test,
                client=clients[0] if name == first else None,
                loss=loss,
                defending=self.defending,
                bound=bound,
                length=self._length,
                used=self.used,
                precision=precision,
            )
            for name, part in parts.items()
        }
        self.kept: dict[str, Any] = {}
        self._orders, self.counts = orders, orders.counts
        self.training = not orders.test
        self.batch = batch
        self.checksums: IntArray | None = None
        self.done: set[str] = set()  # stages of the step

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
        run = BoundPart(
            kept.part,
            training=self.training,
            client=self._client,
            defending=self.defending,
            length=self._length,
            used=self.used,
            precision=self._precision,
        )
        return BoundOwn(kept, run, int(self.counts.sum()))

    def predicted(self, outputs: Tree) -> Tree:
        """Return what the client gives of the model's outputs for its batch, which is what its app says."""
        if self._client.on_predict is None:
            raise ConfigError(
                "the model's outputs are this client's, and its app does not say what becomes of them: give "
                "split_client_app(..., on_predict=...) a function of (outputs, rows, context); what it returns goes to "
                "the server, None does not"
            )
        given = self._client.on_predict(
            widened(tree.map_leaves(Tensor.cpu, outputs)), self._client.draw(*self._orders.each())
        )
        return None if given is None else tree.as_tree(given, "what on_predict returns")

    def defend(self, stage: Stage, outputs: Mapping[str, Tree]) -> Mapping[str, Tree]:
        """Return what leaves in place of what a stage gives."""
        inputs = None if self.batch is None else self.batch.inputs
        return self.defending.leave(stage, outputs, inputs, self._weights)

    def _weights(self) -> bytes:
        """Return a digest of the weights that were run with: of another part's, what leaves does not depend on."""
        return b"".join(self.used[name].digest() for name in sorted(self.used))

    def num_bytes(self) -> int:
        """Return the bytes of what is kept: a lower bound of what the graphs hold."""
        return sum(tree.num_bytes(value) for value in self.kept.values() if isinstance(value, Tensor | tuple | dict))


def _back(inputs: Tree, gradients: Sequence[Tensor | None]) -> Tree:
    """Return the gradients of inputs, the first ones, in their form; None for what has none."""
    rest = iter(gradients)
    return tree.map_leaves(lambda leaf: next(rest) if leaf.requires_grad else None, inputs)


def no_gradient(inputs: Tree) -> Tree:
    """Return gradients of zero, None for what has none."""
    return tree.map_leaves(lambda leaf: torch.zeros_like(leaf) if leaf.requires_grad else None, inputs)


def _run(module: nn.Module, inputs: Tree) -> Any:
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)
