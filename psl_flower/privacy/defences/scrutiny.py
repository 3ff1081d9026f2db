"""A client's look at what comes back: whether the server trains on the labels that it was told."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor

from psl_flower.checks import check_float, check_int
from psl_flower.errors import ConfigError, HijackedError
from psl_flower.privacy.defences.base import Defence, OutgoingRows
from psl_flower.privacy.defences.labels import check_labels, replaced
from psl_flower.privacy.secret import Secret
from psl_flower.typing import FloatArray, IntArray

log = logging.getLogger("flwr.psl_flower")

_MEMORY = 0.9  # of what gradients of a class looked like before


@dataclass(frozen=True, eq=False)
class GradientScrutiny(Defence):
    """Tells wrong labels of a few examples, and leaves if the gradients that come back do not follow them.

    A server that trains the model sends back a gradient that points where those of the label point which it was told;
    one that trains the client half toward something else (feature-space hijacking, arXiv 2012.02670) sends back what
    has nothing to do with it. The idea is SplitGuard's (arXiv 2108.09052), example by example. The price is the share
    of wrong labels, always of the same examples, among those that are trained on; losses are told as they are for them.

    What it has seen is kept in the process: it sees something only where that stays (streams, the simulation), and
    judges nothing where each message has a process of its own. Nor does it for a client that holds examples of one
    class only. The client's log says either. A server that hands out a client half made to reveal inputs, and sends
    honest gradients, it does not see.

    Parameters
    ----------
    classes : int
        C.
    share : float
        Of the examples whose label is told wrongly, as another class of which the client holds examples; below 0.5.
    looks : int
        How many of the last wrong labels are looked at. Until there are as many, it judges nothing.
    least : float
        Share of them whose gradient must follow the label that was told. By chance it is a half.
    leave : bool
        Whether the client leaves then. If not, its log says so.

    Raises
    ------
    HijackedError
        Where the gradients come back: the client fails in this step, and tells the server why.
    """

    classes: int
    share: float = 0.1
    looks: int = 16
    least: float = 0.75
    leave: bool = True
    # by secret, so by client: classes it holds; labels by example of which data, told and true; what was seen of each
    # thing that left
    _held: dict[bytes, IntArray] = field(default_factory=dict, init=False, repr=False)
    _labels: dict[bytes, dict[tuple[bytes, int], tuple[int, int]]] = field(default_factory=dict, init=False, repr=False)
    _watches: dict[tuple[bytes, bytes], Watch] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_int(self.classes, "classes", least=2)
        check_float(self.share, "share", above=0)
        check_int(self.looks, "looks", least=1)
        check_float(self.least, "least", above=0)
        if self.share >= 0.5:
            raise ConfigError(f"share must be below 0.5, or most labels are wrong, got {self.share}")
        if self.least > 1:
            raise ConfigError(f"least must be at most 1, it is a share, got {self.least}")

    def meet(self, classes: IntArray, secret: Secret) -> None:
        """Tell wrongly only what is a class of the client's: what gradients of others look like it does not see."""
        check_labels(classes, self.classes, type(self).__name__)
        if len(classes) < 2 and secret.value not in self._held:
            log.warning(
                "GradientScrutiny judges nothing here: all examples of this client are of one class, so it has none to "
                "compare gradients with. Do not count on it"
            )
        self._held[secret.value] = classes

    def labels(self, labels: IntArray, examples: IntArray, secret: Secret, purpose: bytes) -> IntArray:
        """Swap some of those that are trained on."""
        check_labels(labels, self.classes, type(self).__name__)
        if _data(purpose) == b"test":
            return labels
        held = self._held.get(secret.value, np.arange(self.classes))
        told = labels.copy()
        if len(held) > 1:
            there = np.isin(labels, held)
            drawn = secret.uniform(purpose, examples, 1)[there, 0]
            told[there] = held[replaced(np.searchsorted(held, labels[there]), drawn, 1 - self.share, len(held))]
        keys = [(_data(purpose), example) for example in examples.tolist()]
        pairs = zip(told.tolist(), labels.tolist(), strict=True)
        self._labels.setdefault(secret.value, {}).update(zip(keys, pairs, strict=True))
        return told

    def rows(self, rows: Tensor, of: OutgoingRows) -> Tensor:
        """Leave them as they are, and have a look at the gradient when it comes."""
        if rows.requires_grad:
            rows = rows.view_as(rows)
            rows.register_hook(partial(self._look, of))  # type: ignore[no-untyped-call]
        return rows

    def watches(self) -> list[Watch]:
        """Return what the clients of this process have seen."""
        return list(self._watches.values())

    def _look(self, of: OutgoingRows, gradient: Tensor) -> None:
        flat = gradient.detach().flatten(1).double().cpu().numpy()
        bounds = np.cumsum(of.counts)[:-1]
        blocks = zip(of.secrets, np.split(flat, bounds), np.split(of.examples, bounds), strict=True)
        for secret, some, examples in blocks:
            labels = self._labels[secret.value]
            watch = self._watches.setdefault((secret.value, of.purpose), Watch(self.looks, self.least))
            watch.see(some, [labels[_data(of.purpose), example] for example in examples.tolist()])
            if watch.alarmed:
                watch.alarms += 1
                told = watch.describe()
                if watch.alarms == 1:
                    log.error("%s", told)
                if self.leave:
                    raise HijackedError(told)


def _data(purpose: bytes) -> bytes:
    """Return which data it is about: purposes end with it, see `OutgoingRows`."""
    return purpose.split()[-1]


class Watch:
    """What one client has seen of the gradients that came back.

    Parameters
    ----------
    looks, least
        As in `GradientScrutiny`.
    """

    def __init__(self, looks: int, least: float) -> None:
        self._least = least
        self._means: dict[int, FloatArray] = {}  # by label: where gradients point
        self._followed: deque[bool] = deque(maxlen=looks)
        self.alarms = 0  # how often it was alarmed

    def see(self, gradients: FloatArray, labels: Sequence[tuple[int, int]]) -> None:
        """Look at the gradients of some examples.

        Parameters
        ----------
        gradients : (n, F) float64
        labels : sequence of (int, int)
            Of each: the label that was told, and the true one.
        """
        directions = gradients / np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-300)
        for direction, (told, true) in zip(directions, labels, strict=True):
            if told == true:
                before = self._means.get(told)
                self._means[told] = direction if before is None else _MEMORY * before + (1 - _MEMORY) * direction
            elif told in self._means and true in self._means:
                self._followed.append(bool(direction @ (self._means[told] - self._means[true]) > 0))

    @property
    def share(self) -> float | None:
        """Share of the last wrong labels that the gradients have followed; None while there are too few."""
        full = len(self._followed) == self._followed.maxlen
        return sum(self._followed) / len(self._followed) if full else None

    @property
    def alarmed(self) -> bool:
        """Whether that is too little."""
        return self.share is not None and self.share < self._least

    def describe(self) -> str:
        """Return what is wrong, and what to do."""
        return (
            f"the gradients that come back do not follow the labels: those of {self.share:.0%} of the last "
            f"{len(self._followed)} examples with a wrong label point to it, at least {self._least:.0%} should. The "
            "server trains something else than the model: ask who runs it"
        )
