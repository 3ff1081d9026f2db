"""Whether two sides cut the same model in the same place, said before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from psl_flower.split.half import CutNames, Part
from psl_flower.split.model import Halves

_PARTS = ("client", "server", "tail")
_RUN_BY_CLIENTS = ("client", "tail")
_LIBRARIES = ("torch", "psl_flower")


def signature(parts: nn.Module | Sequence[nn.Module] | Halves) -> dict[str, Any]:
    """Return what tells a cut model from another: a small dictionary that JSON can hold.

    Parameters
    ----------
    parts : nn.Module, sequence of nn.Module, or Halves
        The client half, or the parts in the order in which they run.

    Returns
    -------
    dict
        "cut" and "tail", the names given or None, and "parts": for each part the number of its tensors (parameters and
        buffers) and of the values in them, and a digest of their names and shapes; for those that clients run, one of
        their layers and calls, too, which another version of torch ("by") may name otherwise, and one of the whole
        numbers that modules keep in lists and arrays, if there are any.
    """
    if isinstance(parts, Halves):
        parts = parts.parts
    elif isinstance(parts, nn.Module):
        parts = (parts,)
    names = parts[0].cut_names if isinstance(parts[0], Part) else CutNames()
    return {
        "cut": names.cut,
        "tail": names.tail,
        "by": str(torch.__version__),
        "parts": {name: _content(name, part) for name, part in zip(_PARTS, parts, strict=False)},
    }


def difference(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], names: tuple[str, str] = ("the server", "the client")
) -> str | None:
    """Say how two signatures differ, or None where they are of the same cut of the same model.

    Parameters
    ----------
    mine, theirs : mapping
        Of `signature`; of the parts, those in both are compared. What comes from elsewhere may be anything.
    names : tuple of str
        What to call the sides.
    """
    remedy = "give both the same model and the same cut"
    one, other = names
    if _where(mine) != _where(theirs):
        return f"{one} cuts {_where(mine)}, {other} {_where(theirs)}: {remedy}"
    ours, yours = _parts(mine), _parts(theirs)
    if not ours.keys() & yours.keys():
        return f"{one} and {other} name no part of the model in common: {remedy}"
    for part in _PARTS:
        a, b = ours.get(part), yours.get(part)
        if a is None or b is None or a == b:
            continue
        counts = [_counts(content) for content in (a, b)]
        if counts[0] != counts[1]:
            what = f"on {one} its {part} part has {counts[0]}, on {other} {counts[1]}"
        elif _without(a, "layers", "numbers") != _without(b, "layers", "numbers"):
            what = f"names or shapes of the tensors in its {part} part differ"
        elif _without(a, "layers") != _without(b, "layers"):
            what = (
                f"lists of whole numbers that modules of its {part} part keep differ (a permutation drawn at random?)"
            )
            remedy = "make them buffers (register_buffer), which clients are sent"
        elif mine.get("by") == theirs.get("by"):
            what = f"its {part} part has the same tensors, but other layers, options of layers or calls of functions"
        else:
            continue
        return f"{one} and {other} cut {_where(mine)}, but not the same model: {what}; {remedy}"
    return None


def _content(name: str, part: nn.Module) -> dict[str, Any]:
    shapes = {name: list(tensor.shape) for name, tensor in part.state_dict().items()}
    values = sum(tensor.numel() for tensor in part.state_dict().values())
    content: dict[str, Any] = {"tensors": len(shapes), "values": values, "digest": _digest(shapes)}
    if name in _RUN_BY_CLIENTS:
        content["layers"] = _digest(_layers(part))
        if numbers := _numbers(part):
            content["numbers"] = _digest(numbers)
    return content


def _numbers(part: nn.Module) -> dict[str, list[int]]:
    """Return the whole numbers in lists and arrays that modules keep (a permutation, say), but torch's own modules."""
    found = {}
    for name, module in part.named_modules():
        if type(module).__module__.partition(".")[0] in _LIBRARIES:
            continue
        for key, value in vars(module).items():
            listed = value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "iu" else value
            if isinstance(listed, list) and listed and all(type(each) is int for each in listed):
                found[f"{name}.{key}"] = listed
    return found


def _layers(part: nn.Module) -> list[Any]:
    """Return what a part does, as far as it shows: its modules, the options of torch's own, and what is called."""
    modules = [
        (name, type(module).__name__, module.extra_repr() if type(module).__module__.startswith("torch.") else "")
        for name, module in part.named_modules()
        if name
    ]
    return [sorted(modules), part.calls if isinstance(part, Part) else ()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _where(signed: Mapping[str, Any]) -> str:
    cut, tail = signed.get("cut"), signed.get("tail")
    return ("by hand" if cut is None else f"at {cut!r:.80}") + ("" if tail is None else f" with the tail {tail!r:.80}")


def _parts(signed: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = signed.get("parts")
    return parts if isinstance(parts, Mapping) else {}


def _without(content: Any, *names: str) -> Any:
    return {k: v for k, v in content.items() if k not in names} if isinstance(content, Mapping) else content


def _counts(content: Any) -> str:
    known = content if isinstance(content, Mapping) else {}
    return f"{known.get('tensors')!r:.20} tensors with {known.get('values')!r:.20} values"
