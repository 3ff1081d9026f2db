"""What is let in: every reply of a client is checked here before anything is computed with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from psl_flower.errors import ProtocolError
from psl_flower.exchange.base import Answer
from psl_flower.protocol import Activations, CutSpec, Gradients, Reply

R = TypeVar("R", bound=Reply)


class Door:
    """Checks replies against what was asked for; remembers what crosses the cut.

    The server cannot know the shape of the activations beforehand. The first exchange settles it: what most clients
    send (the lowest id, if it is a draw). From then on nothing else passes.
    """

    def __init__(self) -> None:
        self._spec: CutSpec | None = None

    def activations(
        self, answers: Mapping[int, Answer], counts: Mapping[int, int], step: int | None = None
    ) -> tuple[dict[int, Activations], dict[int, str]]:
        """Return the activations that pass, and what is wrong with the others.

        Parameters
        ----------
        answers : dict of int to Answer
            By client id.
        counts : dict of int to int
            Examples asked of each client.
        step : int, optional
            The step the replies must name.
        """
        spec = self._spec or _most_common(answers)

        def check(client: int, reply: Activations) -> None:
            if spec is not None:
                reply.check(counts[client], spec, step)

        accepted, failures = _sort(answers, Activations, check)
        if accepted:
            self._spec = spec
        return accepted, failures

    def gradients(
        self, answers: Mapping[int, Answer], parameters: Mapping[str, Tensor], step: int
    ) -> tuple[dict[int, Gradients], dict[int, str]]:
        """Return the parameter gradients that pass, and what is wrong with the others.

        Clients whose gradients came as one sum share one object, which is checked once: see `distinct`.
        """
        verdicts: dict[int, str | None] = {}

        def check(client: int, reply: Gradients) -> None:
            if id(reply) not in verdicts:
                verdicts[id(reply)] = _verdict(reply, parameters, step)
            if verdict := verdicts[id(reply)]:
                raise ProtocolError(verdict)

        return _sort(answers, Gradients, check)


def distinct(gradients: Mapping[int, Gradients]) -> list[Gradients]:
    """Return the gradients of all clients, each sum once; by client id."""
    return list({id(each): each for each in gradients.values()}.values())


def _verdict(reply: Gradients, parameters: Mapping[str, Tensor], step: int) -> str | None:
    try:
        reply.check(parameters, step)
    except ProtocolError as error:
        return str(error)
    return None


def _most_common(answers: Mapping[int, Answer]) -> CutSpec | None:
    specs = Counter(a.reply.spec() for a in answers.values() if isinstance(a.reply, Activations))
    return specs.most_common(1)[0][0] if specs else None


def _sort(
    answers: Mapping[int, Answer], kind: type[R], check: Callable[[int, R], None]
) -> tuple[dict[int, R], dict[int, str]]:
    accepted: dict[int, R] = {}
    failures: dict[int, str] = {}
    for client, answer in answers.items():
        if not isinstance(answer.reply, kind):
            failures[client] = answer.failure or f"expected {kind.__name__}, got {type(answer.reply).__name__}"
            continue
        try:
            check(client, answer.reply)
            accepted[client] = answer.reply
        except ProtocolError as error:
            failures[client] = str(error)
    return accepted, failures
