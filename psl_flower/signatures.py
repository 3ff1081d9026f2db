"""What the signature of a ``forward`` says of a batch whose inputs are a dict."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def needed_arguments(signature: inspect.Signature) -> list[inspect.Parameter]:
    """Return the arguments without a default."""
    return [p for p in signature.parameters.values() if p.default is p.empty and p.kind not in _VARIABLE]


def whole_dict(signature: inspect.Signature, names: Collection[str]) -> inspect.Parameter | None:
    """Return the argument that takes inputs of these names as one dict; None where they go by name.

    It is the only one that is needed, has none of these names, and is annotated as a dict.
    """
    needed = needed_arguments(signature)
    whole = len(needed) == 1 and needed[0].name not in names and _is_dict(needed[0].annotation)
    return needed[0] if whole else None


def annotate_whole(argument: str) -> str:
    """Return how an argument is to say that it takes the whole dict."""
    return f"if {argument!r} is the row's whole dict, annotate it, {argument}: dict"


def _is_dict(annotation: Any) -> bool:
    """Return whether an annotation, which may be a string, is of a dict or another mapping, or allows one."""
    if isinstance(annotation, str):
        kinds = re.split(r"\|(?![^\[]*\])", annotation.removeprefix("typing.").removeprefix("Optional["))
        return any(kind.strip().rpartition("typing.")[2].startswith(("dict", "Dict", "Mapping")) for kind in kinds)
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return any(map(_is_dict, get_args(annotation)))
    return isinstance(kind, type) and issubclass(kind, Mapping)
