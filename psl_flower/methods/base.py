"""What a way of splitting is: both ends of a step, on one page.

A method says which parts the model has and where each lives, what the clients do (its *stages*) and what the server
does in a step. It knows of no transport and no Flower; membership, plans, transactions, carriers, checkpoints and
records know of no method. See ``docs/architecture.md`` for how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from psl_flower.errors import ConfigError
from psl_flower.methods.context import EvaluationContext, RoundContext, StepContext
from psl_flower.protocol import DESCRIBE, Kind
from psl_flower.samplers.base import Sampler

T = TypeVar("T")

ROWS, SUM, EACH, SHARED = Kind.ROWS, Kind.SUM, Kind.EACH, Kind.SHARED

CLIENT, SERVER = "client", "server"  # where a part lives


@dataclass(frozen=True)
class Stage:
    """What a client does on request: a method's function and what it takes and gives.

    Parameters
    ----------
    name : str
        Of the function.
    function : callable
        Takes (method, client, batch, **inputs), without the batch if it goes on `after` another stage or draws none.
    inputs, outputs : dict of str to Kind
        Each leaf that travels.
    after : str, optional
        The stage it goes on from, which has drawn the batch and kept what this one needs. It is done again where the
        process no longer has that, so it takes no inputs: what a stage needs besides is sent to it.
    joint : bool
        Whether several clients of a process may do it as one; never where something is EACH client's.
    exact : tuple of str
        Outputs with rows that never travel in fewer bits: labels, say.
    gradients : tuple of str
        Outputs with rows that are gradients of the loss. The other rows, but for exact ones, are activations.
    counts : tuple of str
        Outputs, SUM, with numbers that count and are never negative; the last of each counts the clients for which
        something was not finite. Where few say so, they are refused, as what is far out of bounds is.
    batch : bool
        Whether it is about the examples of the orders; those before and after the steps of a round are not.
    own : bool
        Whether it acts on a part that the client keeps for a round and trains itself, ``client.own(name)``: the
        master's weights do not travel. A client that has lost the part is out of the round.
    trains : bool
        Whether it is also for training; if not, clients do it with test data only.
    """

    name: str
    function: Callable[..., Mapping[str, Any]]
    inputs: Mapping[str, Kind]
    outputs: Mapping[str, Kind]
    after: str | None
    joint: bool
    exact: tuple[str, ...]
    gradients: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    batch: bool = True
    own: bool = False
    trains: bool = True


def stage(
    *,
    inputs: Mapping[str, Kind] | None = None,
    outputs: Mapping[str, Kind] | None = None,
    after: str | None = None,
    joint: bool = True,
    exact: tuple[str, ...] = (),
    gradients: tuple[str, ...] = (),
    counts: tuple[str, ...] = (),
    batch: bool = True,
    own: bool = False,
    trains: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of a method a stage that clients answer; see `Stage`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        kinds = [*(inputs or {}).values(), *(outputs or {}).values()]
        made = Stage(
            function.__name__,
            function,
            dict(inputs or {}),
            dict(outputs or {}),
            after,
            joint=joint and not own and EACH not in kinds,
            exact=exact,
            gradients=gradients,
            counts=counts,
            batch=batch,
            own=own,
            trains=trains,
        )
        function.stage = made  # type: ignore[attr-defined]
        return function

    return decorate


class SplitMethod(ABC):
    """A way of splitting; see the module's text.

    Attributes
    ----------
    name : str
        What users call it.
    parts : dict of str to str
        Where each part of the model lives, `CLIENT` or `SERVER`, in the model's order.
    resumable_within_round : bool
        Whether a checkpoint between two steps of a round holds all there is. False where clients keep parts of their
        own, or something happens before or after the steps: checkpoints are written at the end of rounds only, then.
    """

    name: ClassVar[str]
    parts: ClassVar[Mapping[str, str]]
    resumable_within_round: ClassVar[bool] = True
    _stages: ClassVar[Mapping[str, Stage]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        found = (getattr(getattr(cls, name, None), "stage", None) for name in dir(cls))
        cls._stages = {each.name: each for each in found if isinstance(each, Stage)}
        for each in cls.stages().values():
            before = None if each.after is None else cls.stages().get(each.after)
            if each.after is not None and (before is None or before.after or before.inputs):
                raise ConfigError(
                    f"stage {each.name!r} of {cls.__name__} goes on after {each.after!r}: that must be one of its "
                    "stages which can be done again, one that draws a batch and takes no inputs"
                )
            if each.name == DESCRIBE or SUM in each.inputs.values() or SHARED in each.outputs.values():
                raise ConfigError(f"stage {each.name!r}: not to be called {DESCRIBE!r}, take SUM, or give SHARED")

    @classmethod
    def stages(cls) -> Mapping[str, Stage]:
        """Return the stages by name."""
        return cls._stages

    def client_parts(self) -> list[str]:
        """Return the names of the parts on the clients."""
        return [name for name, place in self.parts.items() if place == CLIENT]

    @classmethod
    def sends_labels(cls) -> bool:
        """Return whether clients send their "labels"; if not, they tell the server nothing by class at all."""
        return any("labels" in each.outputs for each in cls.stages().values())

    def assign(self, parts: Sequence[T]) -> dict[str, T]:
        """Return the parts of a cut model, in the order in which they run, by the names this method has for them.

        Raises
        ------
        ConfigError
            If there are more or fewer than the method has.
        """
        if len(parts) != len(self.parts):
            raise ConfigError(
                f"method {self.name!r} has {len(self.parts)} parts ({', '.join(self.parts)}), the model is cut into "
                f"{len(parts)}: give {'a' if len(parts) < len(self.parts) else 'no'} tail, or another method"
            )
        return dict(zip(self.parts, parts, strict=True))

    def trains_on_clients(self) -> bool:
        """Return whether clients keep parts of their own, and need an optimizer for them."""
        return any(each.own for each in self.stages().values())

    def sampler(self, chosen: Sampler) -> Sampler:
        """Return what plans the steps: the sampler that the user chose, or the method's own with its batch size."""
        return chosen

    @abstractmethod
    def step(self, ctx: StepContext) -> Any:
        """Make one step: call stages, run the server's parts, and commit. A transaction: it commits, or nothing was."""

    @abstractmethod
    def evaluate(self, ctx: EvaluationContext) -> Any:
        """Evaluate the model on the test examples of the context's clients."""

    def predict(self, ctx: EvaluationContext) -> tuple[Any, Any]:
        """Return the model's outputs and the labels for the context's examples, row by row; None for what stays there.

        Default: what `evaluate` had of them.
        """
        found = self.evaluate(ctx)
        return found.outputs, found.target

    def begin_round(self, ctx: RoundContext) -> None:  # noqa: B027 - most methods have nothing to do
        """Do what comes before the first step of a round; clients that fail in it are out of the round."""

    def end_round(self, ctx: RoundContext) -> None:  # noqa: B027 - likewise
        """Do what comes after the last step of a round, with those who have contributed and are not out of it."""
