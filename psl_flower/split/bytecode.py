"""What code does with a value, as its bytecode tells: it compares it with ``is``, unpacks it, or calls ``len``."""

from __future__ import annotations

import dis
import functools
import itertools
import linecache
from types import CodeType, FrameType

from psl_flower.split.stored import codes


def step_of(frame: FrameType) -> dis.Instruction | None:
    """Return the instruction that code is at."""
    return next((each for each in dis.get_instructions(frame.f_code) if each.offset == frame.f_lasti), None)


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
    code, step = frame.f_code, step_of(frame)
    if step is None or step.opname != "UNPACK_SEQUENCE" or entry is None:
        return _compared(code, frame.f_lasti)
    store = next(iter(_steps(code)[step.offset][entry:]), None)
    return _stored_compared(code, store) if store is not None and store.opname == "STORE_FAST" else None


@functools.lru_cache(maxsize=256)
def _steps(code: CodeType) -> dict[int, list[dis.Instruction]]:
    steps = list(dis.get_instructions(code))
    return {step.offset: steps[i + 1 : i + 8] for i, step in enumerate(steps)}


def _compared(code: CodeType, offset: int) -> str | None:
    """Return how the value that code has there is compared, see `compared_at`."""
    none = False
    following = _steps(code).get(offset, [])
    if following and following[0].opname == "STORE_FAST":
        return _stored_compared(code, following[0])
    for step in following:
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


def _stored_compared(code: CodeType, store: dis.Instruction) -> str | None:
    """Return how a variable that is set there is compared later: ``d = h.dtype; ... if d is torch.float16:``."""
    later = (step for step in dis.get_instructions(code) if step.offset > store.offset and step.argval == store.argval)
    return next(filter(None, (_compared(code, step.offset) for step in later)), None)


@functools.lru_cache(maxsize=256)
def compares_within(code: CodeType) -> bool:
    """Return whether what is defined in code, as a comprehension is, compares something with None."""
    for each in itertools.islice(codes(code), 1, None):
        for before, step in itertools.pairwise(dis.get_instructions(each)):
            none = step.opname == "IS_OP" and before.opname == "LOAD_CONST" and before.argval is None
            if none or ("JUMP" in step.opname and step.opname.endswith("NONE")):
                return True
    return False
