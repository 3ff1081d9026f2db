"""Checks of arguments and configuration values: one rule each, one way to say what is wrong."""

import difflib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.errors import ConfigError
from psl_flower.typing import FloatArray, IntArray

_MANY = 20  # choices; more are not listed where some are near


def check_int(value: Any, name: str, *, least: int, most: int | None = None) -> int:
    """Return `value` as an int from `least` to `most`, or raise ConfigError naming it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most}, got {value}")
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


def check_not_negative(values: FloatArray, name: str, unit: str = "") -> None:
    """Raise ConfigError naming them, and their unit if given, unless all of `values` are finite and at least 0."""
    broken = values[~(np.isfinite(values) & (values >= 0))]
    if broken.size:
        what = f" ({unit})" if unit else ""
        raise ConfigError(f"{name} must be finite and not negative{what}, got {broken[0]}")


def check_choice(value: Any, name: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`, or raise ConfigError listing them, or of many the nearest only."""
    choices = list(allowed)
    if value in choices:
        return str(value)
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    listed = f"{len(choices)} names" if near and len(choices) > _MANY else ", ".join(map(repr, choices))
    raise ConfigError(f"{name} must be one of {listed}, got {value!r}{hint}")


def check_mapping(value: Any, name: str) -> dict[str, Any]:
    """Return `value` as a dict, empty for None, or raise ConfigError naming it."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a dict, got {value!r:.80}")
    return dict(value)


def check_path(value: Any, name: str) -> Path | None:
    """Return `value` as an absolute path, its ``~`` expanded, None for None, or raise ConfigError naming it."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name} must be a path, got {value!r:.80}")
    return Path(value).expanduser().absolute()


@contextmanager
def writing_to(folder: Path, option: str) -> Iterator[None]:
    """Raise ConfigError, with the option that names the folder, where something within cannot be written."""
    try:
        yield
    except OSError as exc:
        raise ConfigError(
            f"{option}: {folder} cannot be written to ({exc}): give a folder that can, or leave {option} out"
        ) from exc


def why_not_called(function: Callable[..., Any], count: int) -> str | None:
    """Return why a function cannot be called with so many arguments; None if it can, or does not tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C
        return None
    try:
        signature.bind(*range(count))
    except TypeError as exc:
        return f"{signature}: {exc}"
    return None


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


def as_int64(values: ArrayLike, name: str, *, copy: bool = True) -> IntArray:
    """Return `values` as a read-only int64 array, refusing anything that is not whole numbers.

    Parameters
    ----------
    values : array_like
        Integers, or floats without a fraction.
    name : str
        What the error calls them.
    copy : bool
        Without it, an int64 array is viewed, not copied.

    Raises
    ------
    ConfigError
        If a value is not a whole number, or does not fit in 64 bits.
    """
    try:
        array = np.asarray(values)
    except ValueError as exc:
        raise ConfigError(f"{name} must be an array of whole numbers: {exc}") from exc
    if array.size and array.dtype.kind not in "iuf":
        raise ConfigError(f"{name} must be whole numbers, got dtype {array.dtype}: pass an int64 array")
    if array.dtype.kind == "f":
        numbers = array.astype(np.float64)
        broken = array[~(np.isfinite(numbers) & (numbers == np.floor(numbers)))]
        if broken.size:
            raise ConfigError(f"{name} must be whole numbers, got {broken.flat[0]}")
        too_large = array[np.abs(numbers) >= 2.0**63]
    else:
        too_large = array[array > np.iinfo(np.int64).max] if array.dtype.kind == "u" else array[:0]
    if too_large.size:
        raise ConfigError(f"{name} must fit in 64 bits, got {too_large.flat[0]}")
    result = array.astype(np.int64, copy=copy).view()
    result.setflags(write=False)
    return result
