"""How a cut is refused: the way out that there always is, and refusals that the model's own code must not catch.

While torch.fx records, it runs that code, and a ``try: ... except ValueError:`` in it would catch a refusal, and go on
with what is to be done only where the code fails. So a refusal is kept, and raised again after that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from psl_flower.errors import CutError

E = TypeVar("E", bound=Exception)

BY_HAND = "cut by hand: SplitModel(client=..., server=...)"

_kept: ContextVar[list[Exception] | None] = ContextVar("refusals of what is being recorded", default=None)


def recording() -> bool:
    """Return whether code is being recorded on this thread."""
    return _kept.get() is not None


def kept(error: E) -> E:
    """Return an error to raise, which is raised again when the recording ends, should the recorded code catch it."""
    if (errors := _kept.get()) is not None and error not in errors:
        errors.append(error)
    return error


def refused(message: str) -> CutError:
    """Return an error that tells why code cannot be recorded, see `kept`."""
    return kept(CutError(message))


@contextmanager
def refusals_kept() -> Iterator[None]:
    """Raise the first error that was `kept` within, if the code within has caught it.

    Raises
    ------
    Exception
        That error.
    """
    errors: list[Exception] = []
    token = _kept.set(errors)
    try:
        yield
    finally:
        _kept.reset(token)
    if errors:
        raise errors[0]
