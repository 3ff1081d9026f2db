"""Texts of what is computed: ``print(h.shape)`` may show a stand-in, ``"cuda" in str(h.device)`` must not see one."""

from __future__ import annotations

import ast
from types import FrameType

from psl_flower.split.source import source_of

# Functions and methods that show what they are given, or raise it.
_SHOWING = {"_assert", "critical", "debug", "error", "exception", "info", "log", "pprint", "print", "warn", "warning"}


def only_shown(frame: FrameType) -> bool:
    """Return whether a text that code makes just now is only shown, or told in an error."""
    if frame.f_globals.get("__name__") in ("logging", "warnings"):
        return True
    found = source_of(frame)
    if found is None:
        return False
    code, line = found
    simple = [each for each in ast.walk(code) if isinstance(each, ast.stmt) and not hasattr(each, "body")]
    there = [each for each in simple if each.lineno <= line <= (each.end_lineno or line)]
    return bool(there) and all(isinstance(each, ast.Raise) or _shows(each) for each in there)


def _shows(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    function = statement.value.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in _SHOWING
