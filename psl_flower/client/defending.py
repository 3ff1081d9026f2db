"""What clients do to what leaves them: the seam between what stages give, and ``psl_flower.privacy.defences``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from psl_flower import tree
from psl_flower.client.client import SplitClient
from psl_flower.data.batch import Batch
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.methods import check_options
from psl_flower.methods.base import SplitMethod, Stage
from psl_flower.privacy import DPSGD, GradientScrutiny, RandomizedResponse, Secret, SecureAggregation
from psl_flower.privacy.defences import Defence, OutgoingRows
from psl_flower.protocol import Kind, Orders
from psl_flower.server.metrics import is_integer
from psl_flower.tree import Tree
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")

UNDEFENDED_SUMS = (
    "%s: defences of rows do nothing for the parameter gradients that leave this client, from which inputs can be "
    "rebuilt, exactly where it gives one example to a step. Use secure_aggregation=True as well, here and in the "
    "strategy: then the server sees sums over clients only"
)

# Returns the indices of the examples of a client's order.
Draw = Callable[[Any], IntArray]


def check_defences(defences: Any, method: SplitMethod | None = None) -> tuple[Defence, ...]:
    """Return the defences that people give.

    Raises
    ------
    ConfigError
        If one is none, or the method has nothing for it to do.
    """
    if isinstance(defences, Defence) or not isinstance(defences, Sequence):
        raise ConfigError(f"defences must be a list, [GaussianNoise(0.1)], say, got {defences!r:.80}")
    for each in defences:
        if not isinstance(each, Defence):
            raise ConfigError(f"defences must be of psl_flower.privacy, GaussianNoise(0.1), say, got {each!r:.80}")
        if each.of_gradients and method is not None and not any(s.gradients for s in method.stages().values()):
            raise ConfigError(
                f"{type(each).__name__} is about gradients that leave clients; with method {method.name!r} the server "
                "has the labels and computes them itself: leave it out, or keep the labels with a tail (the U shape)"
            )
    return tuple(defences)


def check_private(
    private: DPSGD | None,
    method: SplitMethod,
    defences: Sequence[Defence] = (),
    secure: SecureAggregation | None = None,
) -> None:
    """Refuse DP-SGD where an example's gradient cannot be told from others'.

    Raises
    ------
    ConfigError
        Naming why.
    """
    if private is None:
        return
    check_options(private, method, secure)
    mixing = [type(each).__name__ for each in defences if type(each).penalty is not Defence.penalty]
    if mixing:
        raise ConfigError(f"{mixing[0]} gives an example a gradient that others have a part in: leave it or DPSGD out")


def check_drawing(private: DPSGD, orders: Orders) -> None:
    """Refuse orders that name examples where DP-SGD counts on each being drawn by chance, which only clients know.

    Raises
    ------
    ProtocolError
        If they do, or leave it to the clients where each example is counted once a round.
    """
    if not orders.test and (private.examples is None) != (orders.drawing is None):
        raise ProtocolError(
            "with DPSGD(examples=...) each client draws its examples itself, without it none does: the server's "
            f"orders {'name' if orders.drawing is None else 'leave'} them"
        )


@dataclass(eq=False, kw_only=True)
class Defending:
    """What some clients do to what leaves them in a step.

    Parameters
    ----------
    defences : tuple of Defence
        One after the other.
    secrets : sequence of Secret
        Of each client.
    counts : (A,) int64
        Examples of each.
    examples : (n,) int64
        Which of its client's data each is.
    test : bool
        Whether that is test data.
    """

    defences: tuple[Defence, ...] = ()
    secrets: Sequence[Secret] = ()
    counts: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    examples: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    test: bool = False

    def __post_init__(self) -> None:
        # by identity: what a stage gave, and what left in its place
        self._left: dict[int, tuple[Tensor, Tensor]] = {}
        self._penalties: dict[int, Tensor] = {}

    @classmethod
    def of(cls, defences: tuple[Defence, ...], secrets: Sequence[Secret], orders: Orders, draw: Sequence[Draw]) -> Self:
        """Return what clients do to what leaves them; `draw` has how each finds the examples of its order."""
        drawn = [find(order) for find, order in zip(draw, orders.each(), strict=True)]
        return cls(
            defences=defences, secrets=secrets, counts=orders.counts, examples=np.concatenate(drawn), test=orders.test
        )

    def labels(self, batch: Batch) -> Batch:
        """Return a batch with what its labels are taken for."""
        if not self.defences or batch.target is None or not any(map(changes_labels, self.defences)):
            return batch
        if not isinstance(batch.target, Tensor) or not is_integer(batch.target):
            raise ConfigError("RandomizedResponse is for one class an example, a tensor of whole numbers: leave it out")
        blocks = np.split(self.examples, np.cumsum(self.counts)[:-1])
        given = torch.split(batch.target.cpu(), self.counts.tolist())
        told = [
            told_labels(self.defences, secret, labels.long().numpy(), examples, test=self.test)
            for secret, labels, examples in zip(self.secrets, given, blocks, strict=True)
        ]
        target = torch.from_numpy(np.concatenate(told)).to(batch.target)
        return Batch(batch.inputs, target, batch.size)

    def leave(
        self, stage: Stage, outputs: Mapping[str, Tree], inputs: Tree, weights: Callable[[], bytes]
    ) -> Mapping[str, Tree]:
        """Return what leaves in place of what a stage gives.

        Parameters
        ----------
        inputs : tree
            Of the batch.
        weights : callable
            Returns a digest of the weights it was computed with.
        """
        names = [n for n, kind in stage.outputs.items() if kind is Kind.ROWS and n not in stage.exact and n in outputs]
        if not self.defences or not names:
            return outputs
        left, weights = dict(outputs), cache(weights)
        with torch.set_grad_enabled(not self.test):
            for name in names:
                given, of = outputs[name], partial(self._leaving, stage, weights)
                gradient = name in stage.gradients
                leaves = [self._leaf(t, partial(of, path), gradient) for path, t in tree.named_leaves(given, name)]
                left[name] = tree.build(tree.structure(given), leaves)
                if not gradient and not self.test:
                    self._punish(given, inputs, partial(of, name))
        return left

    def apart(self, outputs: Tree) -> Tree:
        """Return outputs as tensors of their own, even where a part returns one twice: one may leave, one stay."""
        return tree.map_leaves(lambda t: t.view_as(t), outputs) if self.defences else outputs

    def in_place_of(self, outputs: Tree) -> tuple[Tree, Tensor | None]:
        """Return what left in place of outputs, with its graph, and the terms that come on top of the loss."""
        if not self._left:
            return outputs, None
        penalties = [self._penalties[id(t)] for t in tree.leaves(outputs) if id(t) in self._penalties]
        left = tree.map_leaves(lambda t: self._left.get(id(t), (t, t))[1], outputs)
        return left, torch.stack(penalties).sum() if penalties else None

    def _leaf(self, given: Tensor, of: Callable[[int], OutgoingRows], gradient: bool) -> Tensor:
        if not given.is_floating_point():
            return given
        rows = given
        for at, each in enumerate(self.defences):
            rows = each.gradients(rows, of(at)) if gradient else each.rows(rows, of(at))
        self._left[id(given)] = (given, rows)
        return rows

    def _punish(self, outputs: Tree, inputs: Tree, of: Callable[[int], OutgoingRows]) -> None:
        terms = [each.penalty(inputs, outputs, of(at)) for at, each in enumerate(self.defences)]
        there = [term for term in terms if term is not None]
        roots = [leaf for leaf in tree.leaves(outputs) if leaf.is_floating_point()]
        if there and roots:
            self._penalties[id(roots[0])] = torch.stack(there).sum()

    def _leaving(self, stage: Stage, weights: Callable[[], bytes], path: str, at: int) -> OutgoingRows:
        return OutgoingRows(
            secrets=self.secrets,
            counts=self.counts,
            examples=self.examples,
            purpose=f"{stage.name} {path} {at} {_data(self.test)} ".encode(),
            weights=weights,
        )


def told_labels(
    defences: Sequence[Defence], secret: Secret, labels: IntArray, examples: IntArray, *, test: bool
) -> IntArray:
    """Return what is taken for the labels of some examples of a client, (n,) int64: the same each time in a run."""
    for at, each in enumerate(defences):
        labels = each.labels(labels, examples, secret, f"labels {at} {_data(test)} ".encode())
    return labels


def warn_of_sums(defences: Sequence[Defence]) -> None:
    """Log that defences of rows leave a client's own parameter gradients as they are, where these are not masked."""
    hiding = [type(each).__name__ for each in defences if not isinstance(each, GradientScrutiny | RandomizedResponse)]
    if hiding:
        log.warning(UNDEFENDED_SUMS, ", ".join(hiding))


def introduce(defences: Sequence[Defence], client: SplitClient, secret: Secret) -> None:
    """Tell defences that ask for it which classes a client holds, before labels are told otherwise."""
    asking = [each for each in defences if type(each).meet is not Defence.meet]
    if asking:
        classes = client.classes()
        for each in asking:
            each.meet(classes, secret)


def packing_of(defences: Sequence[Defence]) -> int | None:
    """Return how rows may be packed, after the last defence that changes rows."""
    last = [each for each in defences if type(each).rows is not Defence.rows][-1:]
    return last[0].packing if last else None


def changes_labels(defence: Defence) -> bool:
    """Return whether a defence has a say in labels."""
    return type(defence).labels is not Defence.labels


def _data(test: bool) -> str:
    return "test" if test else "train"
