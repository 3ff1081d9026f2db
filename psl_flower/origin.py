"""Where in the user's own code an exception comes from."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

_OURS = str(Path(__file__).parent)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")} | {_OURS})


def where(error: BaseException, *, text: bool = True) -> str:
    """Return the place and text of an exception: "data.py:31 in __getitem__: OSError: cannot open img_0007.png".

    The place is the last frame of its traceback that is neither psl_flower's nor a library's: the line that its user
    can mend. Without one (it was raised and caught within libraries), the text alone. With ``text=False``, of the text
    only the kind of exception.
    """
    said = f"{type(error).__name__}: {error}" if text and str(error) else type(error).__name__
    found = place(error)
    return said if found is None else f"{found}: {said}"


def place(error: BaseException) -> str | None:
    """Return the place alone; None where no frame is the user's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return None


def running(since: CodeType) -> str | None:
    """Return the line of the user's own code that is being run, as `place` does; None where there is none.

    Parameters
    ----------
    since : code object
        Of the function that has called the user's code: lines before it are not looked at. If it is not run, None.
    """
    frame: FrameType | None = sys._getframe(1)
    found: str | None = None
    while frame is not None and frame.f_code is not since:
        code = frame.f_code
        if found is None and is_users(code.co_filename):
            found = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return None if frame is None else found


# What a client's code may end with and the process that serves it goes on: code that says sys.exit() means its own.
# Who catches it calls `let_signals_end` first: a signal's handler that says it means the process.
RAISED = (Exception, SystemExit)


def let_signals_end(error: BaseException) -> None:
    """Raise a SystemExit again that the handler of a signal raised: the process is told to end, by no code of a client.

    Python calls a handler with the number of the signal and the frame that it interrupts, which in the traceback is
    the one before the handler's.
    """
    if not isinstance(error, SystemExit):
        return
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for interrupted, frame in pairwise(frames):
        given = [each for value in frame.f_locals.values() for each in (value if type(value) is tuple else (value,))]
        if any(each is interrupted for each in given):
            raise error


@cache
def is_users(filename: str) -> bool:
    """Return whether a file holds code of the user's: it is neither a library's, nor ours, nor generated."""
    if filename.startswith(("<frozen", "<psl_flower", "<eval_with_key", "<string")) or not filename:  # generated code
        return False
    path = Path(filename)
    return not (
        {"site-packages", "dist-packages"} & set(path.parts) or any(path.is_relative_to(lib) for lib in _LIBRARIES)
    )
