"""What code decides by sizes while torch.export records it: it goes one way, which the example's sizes have told.

torch.export writes down what it took for true, as "L['x'].size()[0] <= 4"; but of a size it takes for granted that it
is not 1, and writes down nothing.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch.utils._pytree import tree_map

from psl_flower.origin import is_users
from psl_flower.split.recordable import wanted
from psl_flower.split.refused import recording

_ROWS = (1, 2, 3, 4, 5, 7, 8, 16, 64, 100, 1000)


class _Sized:
    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes

    def size(self) -> Sequence[int]:
        return self._sizes


def holds(decision: str, inputs: Mapping[str, Any]) -> bool:
    """Return whether inputs have the sizes that a decision was taken by; also where that cannot be told."""
    try:
        return bool(eval(_compiled(decision), {"L": inputs, "torch": torch, "math": math}))  # noqa: S307 - torch's own
    except Exception:  # what it is written with is torch's
        return True


@functools.lru_cache(maxsize=256)
def _compiled(decision: str) -> CodeType:
    return compile(decision, "<decision>", "eval")


def shown(decision: str) -> str:
    """Return a decision as the user's code may have it: "x.shape[0] <= 4"."""
    named = re.sub(r"L\['(\w+)'\]", r"\1", decision)
    return named.replace(".size()", ".shape")


def by_rows(decisions: Sequence[str], inputs: Mapping[str, Any]) -> str | None:
    """Return a decision that other numbers of rows would have turned; None if there is none."""
    for rows in _ROWS:
        sized = tree_map(lambda value, rows=rows: _Sized((rows, *value.shape[1:])), dict(inputs))
        if (found := next((each for each in decisions if not holds(each, sized)), None)) is not None:
            return found
    return None


@contextmanager
def ones_noted() -> Iterator[list[str]]:
    """Give a list of what torch.export leaves out: that sizes are not 1, by which the user's own code decides."""
    own: Any = torch.SymBool.__bool__
    found: list[str] = []

    def decide(self: torch.SymBool) -> bool:
        held, frame = bool(own(self)), sys._getframe(1)
        if recording() and is_users(frame.f_code.co_filename) and wanted(frame) is None:
            found.extend(_not_one(self.node))
        return held

    torch.SymBool.__bool__ = decide  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.SymBool.__bool__ = own  # type: ignore[method-assign]


def _not_one(node: Any) -> Iterator[str]:
    """Yield, of the sizes in a condition that is another where they are 1, that they are not."""
    condition = node.expr
    for symbol in getattr(condition, "free_symbols", ()):
        one, two = condition.subs(symbol, 1), condition.subs(symbol, 2)
        known = not (one.free_symbols or two.free_symbols)
        for source in node.shape_env.var_to_sources.get(symbol, ()) if known and one != two else ():
            yield f"{source.name() if callable(source.name) else source.name} != 1"
