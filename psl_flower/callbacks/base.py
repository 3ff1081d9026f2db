"""The callback interface, and a group of callbacks that cannot harm the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from psl_flower.errors import ConfigError
from psl_flower.records import RoundRecord, StepRecord

log = logging.getLogger("flwr.psl_flower")


class Callback:
    """Hears what a run does; a subclass overrides what it wants to hear.

    It is called in the server's process, between steps: what takes long there makes the run longer. It hears every step
    and round of the run once and in order, also of a run that is resumed: those before the checkpoint come again, right
    after `on_run_start`.
    """

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Hear the resolved configuration, before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """Hear of a committed step; in the first epoch maybe only at its end, when the batch deviation is known."""

    def on_round(self, record: RoundRecord) -> None:
        """Hear of a round and the evaluations after it."""

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Hear that the run is over: what ``summary.json`` holds, and under "completed" whether it got to its end."""


class CallbackGroup(Callback):
    """Several callbacks as one. One that raises is dropped with a warning: logging must not end a training.

    Parameters
    ----------
    callbacks : iterable of Callback

    Raises
    ------
    ConfigError
        If one of them is no `Callback`.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = list(callbacks)
        for callback in self._callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(f"callbacks must be psl_flower.callbacks.Callback objects, got {callback!r:.80}")

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Tell all."""
        self._tell(lambda callback: callback.on_run_start(config))

    def on_step(self, record: StepRecord) -> None:
        """Tell all."""
        self._tell(lambda callback: callback.on_step(record))

    def on_round(self, record: RoundRecord) -> None:
        """Tell all."""
        self._tell(lambda callback: callback.on_round(record))

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Tell all."""
        self._tell(lambda callback: callback.on_run_end(summary))

    def _tell(self, call: Callable[[Callback], None]) -> None:
        for callback in list(self._callbacks):
            try:
                call(callback)
            except Exception as error:
                self._callbacks.remove(callback)
                name = type(callback).__name__
                log.warning("%s failed and is not called again: %s", name, error, exc_info=error)
