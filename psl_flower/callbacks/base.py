"""The callback interface, and a group of callbacks: one that fails is dropped, one that asks for it ends the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from psl_flower.errors import ConfigError, StopTraining
from psl_flower.records import RoundRecord, StepRecord

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("flwr.psl_flower")


class Callback:
    """Hears what a run does; a subclass overrides what it wants to hear.

    It is called in the server's process, between steps: what takes long there makes the run longer. It hears every step
    and round of the run once and in order, also of a run that is resumed: those before the checkpoint come again, right
    after `on_run_start`.

    It may ask for the end of the run, by raising `StopTraining` or by setting `stop`: the run ends in order then, with
    result, model and summary, before the next round at the latest.

    Attributes
    ----------
    stop : str or None
        Why the run is to end; None while it is not.
    """

    stop: str | None = None

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Hear the resolved configuration, before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """Hear of a committed step; in the first epoch maybe only at its end, when the batch deviation is known."""

    def on_round(self, record: RoundRecord) -> None:
        """Hear of a round and the evaluations after it."""

    def on_progress(self, record: StepRecord, summary: Mapping[str, Any]) -> None:
        """Hear how it goes, every few seconds: the last step, and what ``summary.json`` would hold now.

        This is for looking on: the step comes again in `on_step`, there with its batch deviation; what went before a
        checkpoint does not come again.
        """

    def on_model(self, server_round: int, state: Mapping[str, Tensor]) -> None:
        """Hear the whole model's state dict after a round, next to `on_round`; not of rounds that come again.

        It is the run's own: copy what is kept, change nothing.
        """

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Hear that the run is over: what ``summary.json`` holds, and under "completed" whether it got to its end."""


class CallbackGroup(Callback):
    """Several callbacks as one. One that raises is dropped with a warning: logging must not end a training.

    Two exceptions are not failures: `StopTraining` sets that callback's `stop`; `ConfigError` comes through and ends
    the run, for a callback whose setting is wrong does not do what it is there for.

    Parameters
    ----------
    callbacks : iterable of Callback
        Or one.

    Attributes
    ----------
    given : tuple of Callback
        All of them, also those dropped since.

    Raises
    ------
    ConfigError
        If one of them is no `Callback`.
    """

    def __init__(self, callbacks: Iterable[Callback] | Callback = ()) -> None:
        given = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
        for callback in given:
            if not isinstance(callback, Callback):
                raise ConfigError(f"callbacks must be psl_flower.callbacks.Callback objects, got {callback!r:.80}")
        self.given, self._callbacks = tuple(given), given

    @property
    def stopped(self) -> str | None:
        """Why the run is to end, with the name of the callback that says so; None while none does."""
        asking = [(type(c).__name__, c.stop) for c in self._callbacks if c.stop is not None]
        return f"{asking[0][0]}: {asking[0][1]}" if asking else None

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Tell all."""
        for callback in self._callbacks:
            callback.stop = None  # of an earlier run
        self._tell(lambda callback: callback.on_run_start(config))

    def on_step(self, record: StepRecord) -> None:
        """Tell all."""
        self._tell(lambda callback: callback.on_step(record))

    def on_round(self, record: RoundRecord) -> None:
        """Tell all."""
        self._tell(lambda callback: callback.on_round(record))

    def on_progress(self, record: StepRecord, summary: Mapping[str, Any]) -> None:
        """Tell all."""
        self._tell(lambda callback: callback.on_progress(record, summary))

    def on_model(self, server_round: int, state: Mapping[str, Tensor]) -> None:
        """Tell all."""
        self._tell(lambda callback: callback.on_model(server_round, state))

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Tell all."""
        self._tell(lambda callback: callback.on_run_end(summary))

    def _tell(self, call: Callable[[Callback], None]) -> None:
        for callback in list(self._callbacks):
            try:
                call(callback)
            except StopTraining as reason:
                callback.stop = str(reason) or "no reason given"
            except ConfigError:
                raise
            except Exception as error:
                self._callbacks.remove(callback)
                name = type(callback).__name__
                log.warning("%s failed and is not called again: %s", name, error, exc_info=error)
