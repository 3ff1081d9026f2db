"""Checks of arguments and configuration values: one rule each, one way to say what is wrong."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from psl_flower.errors import ConfigError


def check_int(value: Any, name: str, *, least: int) -> int:
    """Return `value` as an int of at least `least`, or raise ConfigError naming it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_float(value: Any, name: str, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """Return `value` as a finite float, at least `least` and greater than `above`, or raise ConfigError naming it."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
    if value <= above:
        raise ConfigError(f"{name} must be greater than {above}, got {value}")
    return float(value)


def check_choice(value: Any, name: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`, or raise ConfigError listing them and the nearest."""
    choices = list(allowed)
    if value in choices:
        return str(value)
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def check_options(
    options: Mapping[str, Any], factory: Callable[..., Any], name: str, *, but: Iterable[str] = ()
) -> None:
    """Raise ConfigError unless `factory` takes these keyword arguments and needs no others, those in `but` aside."""
    parameters = {p.name: p for p in inspect.signature(factory).parameters.values() if p.name not in but}
    if options and not parameters:
        raise ConfigError(f"{name} has no options, got {', '.join(map(repr, options))}")
    for option in options:
        check_choice(option, f"an option of {name}", parameters)
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise ConfigError(f"{name} needs the option {option!r}, which is not given")
