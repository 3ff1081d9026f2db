"""What a method is given on both ends, as far as it may know; ``client.context`` and ``strategy.context`` have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class ClientContext(Protocol):
    """One client in one step, or several as one. Parts of the model are attributes: ``client.head(batch.inputs)``.

    Attributes
    ----------
    kept : dict
        What a stage keeps for those after it.
    """

    kept: dict[str, Any]

    def __getattr__(self, name: str) -> Any: ...


class StepContext(Protocol):
    """One attempt at a step. Server parts are attributes: ``ctx.body.forward_backward(...)``."""

    def call(self, function: Any, **inputs: Any) -> Any:
        """Ask all clients of the step for a stage at once; return what it gives, by name."""

    def commit(self, **gradients: Mapping[str, Tensor | None] | None) -> None:
        """Step the optimizer over all parts, with their gradients by part."""

    def __getattr__(self, name: str) -> Any: ...


class EvaluationContext(Protocol):
    """Evaluation of some test examples."""

    def call(self, function: Any, **inputs: Any) -> Any:
        """Ask all clients for a stage at once, in evaluation mode."""

    def __getattr__(self, name: str) -> Any: ...


class RoundContext(Protocol):
    """What comes before and after the steps of a round, with all its clients."""

    def __getattr__(self, name: str) -> Any: ...
