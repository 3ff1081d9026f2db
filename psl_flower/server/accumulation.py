"""Gradient accumulation: several steps of the sampler to one step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from psl_flower.checks import check_int
from psl_flower.errors import ConfigError


def accumulate(optimizer: Callable[[Any], torch.optim.Optimizer], steps: int) -> Callable[[Any], Accumulated]:
    """Return a function that makes an optimizer which steps with the mean of so many gradients.

    Equal to ``(loss / steps).backward()`` in each of so many batches, and then ``optimizer.step()``. A larger batch
    does the same at once, where in all of them as much counts in the loss (with `ignore_index`, say, as many targets);
    this is for one that the server's memory does not hold.

    Parameters
    ----------
    optimizer : callable
        As `ParallelSplitLearning` takes it.
    steps : int
        Committed steps to one of the optimizer. They are counted over rounds: what is left at the end of training is
        not applied. A scheduler with the interval "step" steps with the optimizer. A run resumes with the same number,
        and the same kind of optimizer.

    Notes
    -----
    Not for what a round makes anew: copies of a part for each client (SplitFed V1), and what clients train themselves.

    Raises
    ------
    ConfigError
        If it is no function, or `steps` is not at least 1.
    """
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise ConfigError(
            f"accumulate takes the function that makes the optimizer, got {type(optimizer).__name__}: "
            "accumulate(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=4)"
        )
    steps = check_int(steps, "steps", least=1)

    @wraps(optimizer)
    def make(parameters: Any) -> Accumulated:
        return Accumulated(optimizer(parameters), steps)

    return make


class Accumulated(torch.optim.Optimizer):
    """An optimizer that steps with the mean of several gradients.

    Its groups are those of the optimizer inside, so that a scheduler is made of it as of any.

    Parameters
    ----------
    inner : Optimizer
    steps : int
        Gradients to one step.

    Attributes
    ----------
    steps : int
    stepped : bool
        Whether the last `step` changed the parameters.
    """

    def __init__(self, inner: torch.optim.Optimizer, steps: int) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.steps, self._count = inner, steps, 0
        self._sums: dict[int, Tensor] = {}  # by the parameter's place
        self.stepped = False
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take up the gradients that there are, and step when there are enough."""
        for at, p in enumerate(self._parameters()):
            if p.grad is not None:
                share = p.grad / self.steps
                self._sums[at] = self._sums[at] + share if at in self._sums else share
        self._count += 1
        self.stepped = self._count >= self.steps
        if not self.stepped:
            return
        for at, p in enumerate(self._parameters()):
            p.grad = self._sums.get(at)
        self._count, self._sums = 0, {}
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        """Return everything, the gradients that wait among it."""
        waiting = {str(at): t for at, t in self._sums.items()}
        return {
            **self.inner.state_dict(),
            "accumulated": {"steps": self.steps, "count": self._count, "gradients": waiting},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises
        ------
        ConfigError
            If that is of no optimizer which takes as many gradients to a step: those that wait are shares of so many.
        """
        kept = dict(state_dict)
        waiting = kept.pop("accumulated", {"steps": 1})
        if waiting["steps"] != self.steps:
            raise ConfigError(
                f"the optimizer's state has {waiting['steps']} gradients to a step, this one accumulates {self.steps}: "
                "set it back, or start anew"
            )
        self.inner.load_state_dict(kept)
        self._share()
        parameters = self._parameters()
        self._count = waiting["count"]
        self._sums = {int(at): t.to(parameters[int(at)]) for at, t in waiting["gradients"].items()}
