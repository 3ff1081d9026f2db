"""What code does with a value, as its bytecode tells: it compares it with ``is``, unpacks it, or calls ``len``."""

from __future__ import annotations

import dis
import functools
import itertools
import linecache
import re
from collections.abc import Sequence
from types import CodeType, FrameType

from psl_flower.split.stored import codes


def step_of(frame: FrameType) -> dis.Instruction | None:
    """Return the instruction that code is at."""
    return _by_place(frame.f_code).get(frame.f_lasti)


@functools.lru_cache(maxsize=256)
def _by_place(code: CodeType) -> dict[int, dis.Instruction]:
    return {step.offset: step for step in dis.get_instructions(code)}


def running(frame: FrameType) -> str:
    """Return the text of the call that code is at, as far as its first line goes, or else what is done there."""
    step = step_of(frame)
    if step is None:
        return ""
    at = step.positions
    if "CALL" not in step.opname or at is None or at.lineno is None or at.col_offset is None:
        return step.opname
    return linecache.getline(frame.f_code.co_filename, at.lineno).encode()[at.col_offset :].decode()


def compared_at(frame: FrameType, entry: int | None = None) -> str | None:
    """Return how the value that code makes just now is compared: by "is", "is None", the form in a "match", or None.

    Parameters
    ----------
    frame : FrameType
        Where the code is.
    entry : int, optional
        Which entry the value is, where it unpacks several.
    """
    steps = _steps(frame.f_code)
    at = next((i for i, step in enumerate(steps) if step.offset == frame.f_lasti), None)
    if at is None:
        return None
    if steps[at].opname != "UNPACK_SEQUENCE" or entry is None:
        return _compared(steps, at)
    return _stored_compared(steps, at + 1 + entry) if _stores(steps, at + 1 + entry) else None


@functools.lru_cache(maxsize=256)
def _steps(code: CodeType) -> list[dis.Instruction]:
    """Return the instructions of code, with two in place of what later releases of Python have for two."""
    found = []
    for step in dis.get_instructions(code):
        parts = re.findall("(?:LOAD|STORE)_FAST", step.opname)
        if len(parts) == 2:
            found += [step._replace(opname=part, argval=name) for part, name in zip(parts, step.argval, strict=True)]
        else:
            found.append(step)
    return found


def _stores(steps: Sequence[dis.Instruction], at: int) -> bool:
    return steps[at].opname in ("STORE_FAST", "STORE_DEREF")


def _compared(steps: Sequence[dis.Instruction], at: int) -> str | None:
    """Return how the value that code has there is compared, see `compared_at`."""
    none = False
    if at + 1 < len(steps) and _stores(steps, at + 1):
        return _stored_compared(steps, at + 1)
    for step in steps[at + 1 : at + 8]:
        if "JUMP" in step.opname and step.opname.endswith("NONE"):
            return "is None"
        if step.opname in ("MATCH_SEQUENCE", "MATCH_MAPPING"):
            return "match"
        if step.opname == "IS_OP":
            return "is None" if none else "is"
        if not step.opname.startswith(("LOAD_", "COPY")):
            return None
        none = step.opname == "LOAD_CONST" and step.argval is None
    return None


def _stored_compared(steps: Sequence[dis.Instruction], at: int) -> str | None:
    """Return how a variable that is set there is compared later: ``d = h.dtype; ... if d is torch.float16:``."""
    later = (i for i in range(at + 1, len(steps)) if steps[i].argval == steps[at].argval)
    return next(filter(None, (_compared(steps, i) for i in later)), None)


@functools.lru_cache(maxsize=256)
def compares_within(code: CodeType) -> bool:
    """Return whether what is defined in code, as a comprehension is, compares something with None."""
    for each in itertools.islice(codes(code), 1, None):
        for before, step in itertools.pairwise(dis.get_instructions(each)):
            none = step.opname == "IS_OP" and before.opname == "LOAD_CONST" and before.argval is None
            if none or ("JUMP" in step.opname and step.opname.endswith("NONE")):
                return True
    return False
