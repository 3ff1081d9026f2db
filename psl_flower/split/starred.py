"""``h.view(*h.shape[:-1], 2, 4)``: sizes that are given on, as many as a tensor has dimensions, which is not known."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import fx

from psl_flower.split.source import source_of

# Methods that take sizes one by one, or all in one tuple.
_TAKING = {"view", "reshape", "expand", "repeat", "tile", "new_zeros", "new_ones", "new_empty"}


@dataclass(frozen=True, eq=False)
class Rest:
    """Stands for all sizes that are given on, in the arguments of a method.

    Parameters
    ----------
    sizes : fx.Proxy
    frame : FrameType
        Where they are unpacked: what is called there must be a method of a tensor, not one of the user's own.
    at : str, optional
        The line of that.
    """

    sizes: fx.Proxy
    frame: FrameType
    at: str | None


def given_on(frame: FrameType) -> bool:
    """Return whether what code unpacks with a star in the line that is run is only given on to methods of tensors."""
    source = source_of(frame)
    if source is None:
        return False
    code, line = source
    stars = {each for each in _at(code, line) if isinstance(each, ast.Starred)}
    given = {star for call in _at(code, line) if _takes(call) for star in call.args if isinstance(star, ast.Starred)}
    return bool(stars) and stars == given


def joined(args: Sequence[Any], rests: list[Rest], frame: FrameType | None) -> tuple[Any, ...]:
    """Return the arguments of a method with its sizes in one, where some are a `Rest`.

    Parameters
    ----------
    args : sequence
    rests : list of Rest
        Those that were unpacked; what is joined in the frame that did so is taken out.
    frame : FrameType
        Where the method is called.
    """
    first, *others = args
    if not any(isinstance(each, Rest) for each in others):
        return tuple(args)
    sizes: Any = ()
    for each in others:
        if isinstance(each, Rest) and each.frame is frame:
            rests.remove(each)
        more = each.sizes if isinstance(each, Rest) else (each,)
        sizes = more if isinstance(sizes, tuple) and not sizes else sizes + more
    return first, sizes


def _at(code: ast.AST, line: int) -> list[Any]:
    """Return the expressions in a line, and those within them, which may be in the next."""
    found = [each for each in ast.walk(code) if isinstance(each, ast.expr)]
    there = [each for each in found if each.lineno <= line <= (each.end_lineno or line)]
    return [each for one in there for each in ast.walk(one)]


def _takes(call: ast.expr) -> bool:
    """Return whether an expression calls such a method, and not one of a module's own."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    own = isinstance(call.func.value, ast.Name) and call.func.value.id in ("self", "cls", "super")
    return call.func.attr in _TAKING and not own
