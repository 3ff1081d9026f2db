"""The exceptions psl_flower raises.

The tree::

    PSLError
    ├── ConfigError (ValueError)       an argument or a configuration value breaks a rule
    │   └── CutError                   a model cannot be cut where it was asked to be
    ├── LabelError (ValueError)        labels of a batch are no class indices
    ├── ProtocolError (ValueError)     a record from the wire breaks the protocol
    ├── BadRowsError (ValueError)      some of a client's examples cannot be used
    ├── MembershipError (RuntimeError) the clients at hand cannot form a population
    ├── StepError (RuntimeError)       a training or evaluation step could not be completed
    │   └── DivergenceError            its loss or gradients are NaN or infinite
    ├── HijackedError (RuntimeError)   what the server sends back does not follow the labels that it was told
    └── StoppedError (RuntimeError)    the run was ended from outside

Every message names the rule, the value found and the remedy. Errors of other libraries are mapped
onto this tree with ``raise ... from exc``. `StopTraining` stands beside it: it is no error, but how a user's code asks
for the end of a run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from psl_flower.failures import Failure, Kind, failure_lines

_NAME = "client {}".format


class PSLError(Exception):
    """Base of all errors raised by psl_flower."""


class ConfigError(PSLError, ValueError):
    """An argument or a configuration value breaks a rule; nothing was sent."""


class CutError(ConfigError):
    """A model cannot be cut at the named place."""


class LabelError(PSLError, ValueError):
    """Labels of a batch are no class indices.

    Parameters
    ----------
    message : str
        What is expected, and what was found.
    rows : iterable of int
        Positions in the batch of the examples whose labels are wrong; empty where that cannot be told.
    rule : str, optional
        The message without any label, for where labels are to stay.
    """

    def __init__(self, message: str, rows: Iterable[int] = (), rule: str = "labels must be class indices") -> None:
        self.rows, self.rule = tuple(rows), rule
        super().__init__(message)


class ProtocolError(PSLError, ValueError):
    """A record from the wire breaks the protocol (wrong count, shape, dtype, value or id).

    Parameters
    ----------
    message : str
    kind : Kind
        Of failure, for whoever sent it.
    """

    def __init__(self, message: str, kind: Kind = Kind.MALFORMED) -> None:
        super().__init__(message)
        self.kind = kind

    def failure(self) -> Failure:
        """Return it as a client's failure."""
        return Failure(self.kind, str(self))


class MembershipError(PSLError, RuntimeError):
    """The clients at hand cannot form a population (too few, duplicate or missing ids, no data)."""


class StepError(PSLError, RuntimeError):
    """A step could not be completed; nothing of it was applied to the model.

    Parameters
    ----------
    message : str
        What happened, naming the step.
    failures : dict of int to Failure, optional
        What each failed client did wrong, keyed by client id.
    name : callable, optional
        Takes a client id, and returns how the client is called.
    """

    def __init__(
        self, message: str, failures: Mapping[int, Failure] | None = None, name: Callable[[int], str] = _NAME
    ) -> None:
        self.message = message
        self.failures = dict(failures or {})
        super().__init__("\n  ".join([message, *failure_lines(self.failures, name)]))

    @classmethod
    @contextmanager
    def located(cls, where: str, name: Callable[[int], str] = _NAME) -> Iterator[None]:
        """Put `where` in front of the message of every StepError raised inside, and give its clients their names."""
        try:
            yield
        except StepError as error:
            raise type(error)(f"{where}: {error.message}", error.failures, name) from error.__cause__


class DivergenceError(StepError):
    """The server half's loss or gradients are NaN or infinite."""


class HijackedError(PSLError, RuntimeError):
    """What the server sends back does not follow the labels that it was told: it trains something else."""


class StoppedError(PSLError, RuntimeError):
    """The run was ended from outside: by Ctrl-C, or ``flwr stop``."""


class BadRowsError(PSLError, ValueError):
    """Some of a client's examples cannot be used, while others can: they are to be left out.

    Parameters
    ----------
    message : str
        What happened, naming the data.
    rows : dict[int, str], optional
        What is wrong with each, keyed by its index in the dataset.
    """

    def __init__(self, message: str, rows: dict[int, str] | None = None) -> None:
        self.message = message
        self.rows = dict(rows or {})
        super().__init__(message + "".join(f"\n  example {index}: {why}" for index, why in sorted(self.rows.items())))


class StopTraining(Exception):
    """Raised by a callback or by `evaluate_fn`: the run is to end here, in order, with all that it leaves behind.

    Parameters
    ----------
    reason : str
        Logged.
    """
