"""The source of the code that is being recorded, where what stands around a call tells what becomes of its value."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import FrameType


def source_of(frame: FrameType) -> tuple[ast.AST, int] | None:
    """Return the source of the function that runs in a frame, and the line in it that is run; None if there is none."""
    try:
        lines, first = inspect.getsourcelines(frame.f_code)
        return ast.parse(textwrap.dedent("".join(lines))), frame.f_lineno - first + 1
    except (OSError, SyntaxError):
        return None
