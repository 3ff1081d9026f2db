"""What ends a run is the last thing in Flower's log, in one sentence.

Flower logs a traceback of whatever a ServerApp raises, and after it the meaning of its own exit code: for a mistyped
key thirty lines, with the sentence that helps in their midst. In the simulation Ray may have failed meanwhile, too, for
its own thread does not wait for the ServerApp.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from psl_flower.errors import ConfigError, PSLError

_LOGGER = logging.getLogger("flwr")
_EXIT = "Exit Code: "  # how the last record of a Flower process begins


class LastWord(logging.Filter):
    """Repeats an error at the end of Flower's log; of refused settings, leaves out the traceback.

    Parameters
    ----------
    error : PSLError
    """

    def __init__(self, error: PSLError) -> None:
        super().__init__()
        self._error = error

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the records that tell of the error; let all pass."""
        if record.exc_info and record.exc_info[1] is self._error and isinstance(self._error, ConfigError):
            record.msg, record.args, record.exc_info = str(self._error), (), None
        elif record.getMessage().startswith(_EXIT):
            record.msg, record.args = f"{record.getMessage()}\n\n{self._error}", ()
        return True


@contextmanager
def last_word() -> Iterator[None]:
    """Let a PSLError that is raised inside, and ends this process, have the last word in Flower's log."""
    try:
        yield
    except PSLError as error:
        for earlier in [each for each in _LOGGER.filters if isinstance(each, LastWord)]:
            _LOGGER.removeFilter(earlier)  # in a process that went on: a notebook
        _LOGGER.addFilter(LastWord(error))
        raise
