"""What is let in: every reply of a client is checked here before anything is computed with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from psl_flower.errors import ProtocolError
from psl_flower.exchange.base import Answer
from psl_flower.protocol import Activations, CutSpec, Gradients, Reply

R = TypeVar("R", bound=Reply)


class Door:
    """Checks replies against what was asked for; learns what crosses the cut.

    The server cannot know the shape of the activations beforehand: it is what most clients have sent. Every client has
    one vote, what it sent last; a draw changes nothing, at first the lowest id decides it. So a bad reply to the very
    first request, which may be the only one, shuts nobody out for longer than a step.
    """

    def __init__(self) -> None:
        self._spec: CutSpec | None = None
        self._sent: dict[int, CutSpec] = {}

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
        sent = {client: a.reply.spec() for client, a in answers.items() if isinstance(a.reply, Activations)}
        spec = self._vote(sent)

        def check(client: int, reply: Activations) -> None:
            if spec is not None:
                reply.check(counts[client], spec, step)

        accepted, failures = _sort(answers, Activations, check)
        if accepted:
            self._spec, self._sent = spec, self._sent | sent
        return accepted, failures

    def forget(self, clients: Iterable[int]) -> None:
        """Take their votes from clients that turned out to send what the server half cannot use."""
        for client in clients:
            self._sent.pop(client, None)
        if not self._sent:
            self._spec = None

    def _vote(self, sent: Mapping[int, CutSpec]) -> CutSpec | None:
        """Return what most clients have sent, these ones last."""
        if self._spec is not None and all(spec == self._spec for spec in sent.values()):
            return self._spec
        votes = Counter({**self._sent, **sent}.values())
        best = max(votes.values(), default=0)
        if self._spec is not None and votes[self._spec] == best:
            return self._spec
        return next((spec for spec, count in votes.items() if count == best), None)

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
