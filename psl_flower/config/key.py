"""What a key of the default app is: type, default, range, unit and sentence, by which pydantic checks values."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import AfterValidator, Field, ValidationError
from pydantic.fields import FieldInfo

from psl_flower.checks import check_choice
from psl_flower.errors import ConfigError

T = TypeVar("T")


def key(default: Any, sentence: str, *, section: str = "", unit: str = "", **rules: Any) -> Any:
    """Define a key: the default of a field of a pydantic dataclass.

    Parameters
    ----------
    default : str, int, float or bool
        As TOML has it; its type is that of the field's annotation.
    sentence : str
        What the key means, in one sentence without a full stop: it becomes a comment and a cell of a table.
    section : str
        Heading of the group of keys that begins here.
    unit : str
        What a number counts.
    rules
        What pydantic's ``Field`` checks: ge, gt, le, lt, min_length.
    """
    return Field(default=default, description=sentence, json_schema_extra={"section": section, "unit": unit}, **rules)


class OneOf:
    """In an annotation: the value is one of these names.

    Parameters
    ----------
    names : iterable of str
    or_empty : bool
        Whether an empty string, "choose automatically", is right, too.
    """

    def __init__(self, names: Iterable[str], *, or_empty: bool = False) -> None:
        self.names, self._or_empty = tuple(names), or_empty

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return AfterValidator(self._check).__get_pydantic_core_schema__(source, handler)

    def _check(self, value: str) -> str:
        return value if self._or_empty and not value else check_choice(value, "", self.names)


def _absolute(path: str) -> str:
    if path and not Path(path).expanduser().is_absolute():
        raise ValueError(f"must be absolute, got {path!r}: every process has a working directory of its own")
    return path


ABSOLUTE_PATH = AfterValidator(_absolute)


@dataclass(frozen=True)
class Key:
    """A key as documentation shows it.

    Parameters
    ----------
    name : str
        With dashes.
    default : str, int, float or bool
    rule : str
        Which values are right.
    sentence : str
        What they mean.
    section : str
        Heading of the group that begins here, or "".
    """

    name: str
    default: Any
    rule: str
    sentence: str
    section: str


def keys_of(kind: Any) -> Iterator[Key]:
    """Yield the keys that a pydantic dataclass defines, in order."""
    infos: Mapping[str, FieldInfo] = kind.__pydantic_fields__
    for field in fields(kind):
        info = infos[field.name]
        extra: Any = info.json_schema_extra
        yield Key(dashed(field.name), info.default, _rule(info), info.description or "", extra["section"])


def _rule(info: FieldInfo) -> str:
    """Return in words which values a key takes."""
    for each in info.metadata:
        if isinstance(each, OneOf):
            return ", ".join(each.names)
    bounds = {name: getattr(each, name) for each in info.metadata for name in _BOUNDS if hasattr(each, name)}
    extra: Any = info.json_schema_extra
    if ABSOLUTE_PATH in info.metadata:
        kind = "an absolute path"
    else:
        kind = extra["unit"] or ("a number" if float in get_args(info.annotation) else _KINDS.get(info.annotation, ""))
    return ", ".join(filter(None, [kind, *(f"{_BOUNDS[name]} {bound:g}" for name, bound in bounds.items())]))


_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "below"}
_KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}


# --- refusals --------------------------------------------------------------------------------------------------------
def refusing(kind: type[T]) -> type[T]:
    """Make a pydantic dataclass raise ConfigError, in sentences that name keys, where pydantic refuses values."""
    checked: Any = kind.__init__

    @functools.wraps(checked)
    def __init__(self: T, **values: Any) -> None:
        for name in values:
            check_choice(name, "a configuration key", [field.name for field in fields(kind)])  # type: ignore[arg-type]
        try:
            checked(self, **values)
        except ValidationError as error:
            raise ConfigError(_sentences(error)) from None

    kind.__init__ = __init__  # type: ignore[method-assign,assignment]
    return kind


def dashed(name: str) -> str:
    """Return the key of a field."""
    return name.replace("_", "-")


def _sentences(error: ValidationError) -> str:
    """Say what is wrong, a sentence a key."""
    by_key: dict[str, list[Any]] = {}
    for each in error.errors(include_url=False):
        by_key.setdefault(dashed(str(each["loc"][0])) if each["loc"] else "", []).append(each)
    return "; ".join(_sentence(name, each) for name, each in by_key.items())


def _sentence(name: str, errors: list[Any]) -> str:
    first, kinds = errors[0], [each["type"] for each in errors]
    if kinds == ["value_error"]:  # of our own checks: a rule of several keys names them itself
        return f"{name} {first['ctx']['error']!s}".replace("  ", " ").strip()
    if len(errors) > 1:  # none of several types
        wanted = "a number or a string"
    elif first["type"] in _WANTED:
        wanted = _WANTED[first["type"]].format(**first.get("ctx", {}))
    else:
        wanted = f"right ({first['msg']})"
    return f"{name} must be {wanted}, got {first['input']!r}"


# pydantic's types of errors that a key can meet: https://docs.pydantic.dev/latest/errors/validation_errors/
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "finite",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_too_short": "given",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "greater than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
}
