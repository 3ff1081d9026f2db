"""What ends a run is the last thing in Flower's log, in one sentence.

Flower logs a traceback of whatever a ServerApp raises, and after it the meaning of its own exit code: for a mistyped
key thirty lines, with the sentence that helps in their midst.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from psl_flower.errors import ConfigError, PSLError

_LOGGER = logging.getLogger("flwr")
_EXIT = "Exit Code: "  # how the last record of a Flower process begins


class LastWord(logging.Filter):
    """Repeats an error of ours at the end of Flower's log; of refused settings, leaves out the traceback.

    Attributes
    ----------
    error : PSLError or None
        The last one that was raised, or that Flower has logged.
    """

    error: PSLError | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the records that tell of the error; let all pass."""
        raised = record.exc_info[1] if record.exc_info else None
        if isinstance(raised, PSLError):
            self.error = raised
            if isinstance(raised, ConfigError):
                record.msg, record.args, record.exc_info = str(raised), (), None
        elif self.error is not None and record.getMessage().startswith(_EXIT):
            record.msg, record.args = f"{record.getMessage()}\n\n{self.error}", ()
        return True


def listen() -> LastWord:
    """Begin to look for errors in Flower's log, once a process: whatever an app does with us may raise one."""
    known = next((each for each in _LOGGER.filters if isinstance(each, LastWord)), None)
    if known is None:
        _LOGGER.addFilter(known := LastWord())
    return known


@contextmanager
def last_word() -> Iterator[None]:
    """Let a PSLError that is raised inside, and ends this process, have the last word, even where Flower logs another.

    It does where Ray has failed meanwhile, for its own thread does not wait for the ServerApp.
    """
    listener = listen()
    listener.error = None  # of an earlier run, in a process that went on: a notebook
    try:
        yield
    except PSLError as error:
        listener.error = error
        raise
