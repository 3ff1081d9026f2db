"""What code asks of torch's settings, or sets for good, while it is recorded: that would hold ever, or never."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from psl_flower.origin import is_users
from psl_flower.split.refused import BY_HAND, recording, refused

_ASKED = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled")
_SET = ("manual_seed", "seed", "set_rng_state", "set_default_dtype", "set_num_threads")


@contextmanager
def settings_refused() -> Iterator[None]:
    """Refuse the user's own code to ask for the settings of a call, or to set those of a process, while it is recorded.

    Raises
    ------
    CutError
        If it does.
    """
    own = {name: getattr(torch, name) for name in (*_ASKED, *_SET)}
    try:
        for name, function in own.items():
            setattr(torch, name, _refusing(name, function))
        yield
    finally:
        for name, function in own.items():
            setattr(torch, name, function)


def _refusing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if recording() and is_users(sys._getframe(1).f_code.co_filename):
            lost = "what it tells would be recorded for ever" if name in _ASKED else "that would not be recorded"
            raise refused(
                f"the model calls torch.{name}, and {lost}: decide by self.training, or do it outside of forward; else "
                f"move this code into a submodule of its own, or {BY_HAND}."
            )
        return function(*args, **kwargs)

    return call
