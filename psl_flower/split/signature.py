"""Whether two sides cut the same model in the same place, said before the first step."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from psl_flower.split.functions import in_code, of_layer
from psl_flower.split.half import BY_MODE, CutNames, Part, frozen_in
from psl_flower.split.model import Halves
from psl_flower.split.stored import stored_names

_IN_PLACE = re.compile(r"(, )?inplace=(True|False)")
_PARTS = ("client", "server", "tail")
_RUN_BY_CLIENTS = ("client", "tail")
_LIBRARIES = ("torch", "psl_flower")
_LONGEST = 120  # characters of a layer with its options
_NUMBERS = (bool, int, float)
_MOST_SETTINGS = 500

# Functions of one tensor, no two of which are the same whatever their options.
_ACTIVATIONS = {"relu", "relu6", "tanh", "sigmoid", "gelu", "silu", "mish", "selu", "softplus", "softsign"}
_ACTIVATIONS |= {"hardswish", "hardsigmoid", "logsigmoid", "tanhshrink", "sin", "cos", "exp"}
_WITH_OPTIONS = {"leaky_relu", "elu", "celu"}  # of which this holds of each, with other options (one may be a relu)


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
        buffers) and of the values in them, and a digest of their names and shapes. For those that clients run also
        "layers", torch's own by name with their options, which another version of torch ("by") may write otherwise;
        "calls", how often it calls which function, where a trace tells, with the numbers with a point it gives it (a
        layer without state is its function); "code", the functions that modules of one's own name in their code;
        "settings", numbers that modules of one's own keep by name; and of the whole numbers that they keep in lists and
        arrays two digests, one of them in any order.
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
        elif a.get("digest") != b.get("digest"):
            what = f"names or shapes of the tensors in its {part} part differ"
        elif name := _reordered(a, b):
            what = f"the whole numbers in {name!r:.80} of its {part} part are in another order (drawn at random?)"
            remedy = "make them a buffer (register_buffer), which clients are sent"
        elif mine.get("by") == theirs.get("by") and (layer := _other_layer(a, b)):
            name, here, there = layer
            what = f"{name!r:.80} of its {part} part is {here} on {one}, {there} on {other}"
        elif mine.get("by") == theirs.get("by") and (called := _other_activations(a, b)):
            what = f"its {part} part calls {called[0]} on {one}, where it calls {called[1]} on {other}"
        else:
            continue
        return f"{one} and {other} cut {_where(mine)}, but not the same model: {what}; {remedy}"
    return None


def doubt(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], names: tuple[str, str] = ("the server", "the client")
) -> str | None:
    """Say that two sides call other functions in a part, or keep other numbers; None if they do not.

    Either may be the same mathematics or not.

    Parameters are those of `difference`, which has found none.
    """
    ours, yours = _parts(mine), _parts(theirs)
    for part in _RUN_BY_CLIENTS if mine.get("by") == theirs.get("by") else ():
        a, b = (_entries(each.get(part), "settings") for each in (ours, yours))
        if name := next((name for name in a if name in b and repr(a[name]) != repr(b[name])), None):
            return (
                f"{name!r:.80} of the {part} part of the model is {a[name]!r:.40} on {names[0]}, {b[name]!r:.40} on "
                f"{names[1]}. Where that is not the same mathematics, give both the same model"
            )
        a, b = (_entries(each.get(part), "calls") for each in (ours, yours))
        if not a or not b or a == b:
            continue
        differ = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
        shown = ", ".join(f"{name!r:.40}" for name in differ[:6]) + ", ..." * (len(differ) > 6)
        return (
            f"{names[0]} and {names[1]} do not call the same functions of torch as often in the {part} part of the "
            f"model: {shown}. Where that is not the same mathematics, give both the same model"
        )
    return None


def _content(name: str, part: nn.Module) -> dict[str, Any]:
    shapes = {name: list(tensor.shape) for name, tensor in part.state_dict().items()}
    values = sum(tensor.numel() for tensor in part.state_dict().values())
    content: dict[str, Any] = {"tensors": len(shapes), "values": values, "digest": _digest(shapes)}
    if name in _RUN_BY_CLIENTS:
        content["layers"] = layers(part)
        content["code"] = _code(part)
        if isinstance(part, Part) and part.calls:
            content["calls"] = _functions(part.calls)
        content["settings"] = dict(islice(_settings(part).items(), _MOST_SETTINGS))
        if numbers := _numbers(part):
            content["numbers"] = {name: [_digest(sorted(each)), _digest(each)] for name, each in numbers.items()}
    return content


def _code(part: nn.Module) -> dict[str, list[str]]:
    """Return the functions of torch that modules of one's own name in their code."""
    own = ((n, m) for n, m in part.named_modules() if type(m).__module__.partition(".")[0] not in _LIBRARIES)
    return dict(islice(((name, found) for name, module in own if (found := in_code(module))), _MOST_SETTINGS))


def _settings(part: nn.Module) -> dict[str, int | float]:
    """Return the numbers that modules keep, but torch's own and those that a forward sets."""
    found: dict[str, int | float] = {}
    for name, module in part.named_modules():
        kind: Any = type(module)
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            kept = vars(module).keys() - stored_names(kind, loosely=True) - vars(nn.Module()).keys()
            found |= {f"{name}.{key}": value for key in sorted(kept) if type(value := vars(module)[key]) in _NUMBERS}
    return found


def _numbers(part: nn.Module) -> dict[str, list[int]]:
    """Return the whole numbers in lists and arrays that modules keep (a permutation, say), but torch's own modules."""
    found = {}
    for name, module in part.named_modules():
        if type(module).__module__.partition(".")[0] in _LIBRARIES:
            continue
        for key, value in vars(module).items():
            listed = value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "iu" else value
            if isinstance(listed, list) and len(listed) > 1 and all(type(each) is int for each in listed):
                found[f"{name}.{key}"] = listed
    return found


def layers(part: nn.Module) -> dict[str, str]:
    """Return modules by name: torch's own with their options, "" for all others, whose names mean nothing.

    Containers do nothing by themselves, and of an Identity as little is said as of a module that is not there.
    Where a layer keeps its result is no difference, so options in place are left out.
    """
    found, frozen = {}, frozen_in(part)
    for name, module in part.named_modules():
        kind = type(module)
        if not name or kind is nn.Identity or kind.__module__.startswith("torch.nn.modules.container"):
            continue
        own = kind.__module__.startswith("torch.") and kind is not nn.Module
        shown = f"{kind.__name__}({_IN_PLACE.sub('', module.extra_repr())})"[:_LONGEST] if own else ""
        found[name] = shown + ".eval()" * (isinstance(module, BY_MODE) and own and name in frozen)
    return found


def _functions(calls: Sequence[str]) -> dict[str, int]:
    kinds = (call.partition(" ") for call in calls)
    return dict(Counter(name for kind, _, name in kinds if kind == "call_function"))


def _other_layer(a: Any, b: Any) -> tuple[str, str, str] | None:
    """Return a layer of torch's own that is another on the other side: its name, and what it is on both."""
    ours, yours = _entries(a, "layers"), _entries(b, "layers")
    for name in [*ours, *yours] if isinstance(b.get("layers"), Mapping) else ():
        here, there = ours.get(name), yours.get(name)
        if here != there and "" not in (here, there):
            if (here is None and _is_function(name, there, b, a)) or (there is None and _is_function(name, here, a, b)):
                continue
            here, there = ("nothing" if each is None else f"{each!s:.{_LONGEST}}" for each in (here, there))
            return name, here, there
    return None


def _is_function(name: str, layer: Any, mine: Any, theirs: Any) -> bool:
    """Return whether the other side calls a function in the place of a layer of torch's that only one side has."""
    function = of_layer(str(layer).partition("(")[0])
    if function is None:
        return False
    path = name.split(".")[:-1]
    above = {".".join(path[:depth]) for depth in range(len(path) + 1)}
    code = _entries(theirs, "code")
    if any(isinstance(names, list) and function in names for at, names in code.items() if at in above):
        return True
    ours, yours = (
        {key: n for key, n in _counted(each).items() if key.partition("(")[0] == function} for each in (mine, theirs)
    )
    return bool(ours) and ours == yours


def _counted(content: Any) -> Counter[str]:
    """Return how often a side calls each function, wherever it keeps the result, and whoever has recorded it."""
    counts = Counter[str]()
    for name, count in _entries(content, "calls").items():
        base, bracket, options = name.partition("(")
        base = base.removesuffix(".default").removesuffix("_")
        counts[base + bracket + options] += count if type(count) is int else 0
    return counts


def _other_activations(a: Any, b: Any) -> tuple[str, str] | None:
    """Return activation functions that both sides call, each in the place of the other's; None if more differs.

    Of other functions it may be that another one computes the same: of these it is certain that none does.
    """
    ours, yours = _counted(a), _counted(b)
    here, there = ours - yours, yours - ours
    bases = [sorted(name.partition("(")[0] for name in each.elements()) for each in (here, there)]
    known = _ACTIVATIONS | _WITH_OPTIONS if bases[0] == bases[1] else _ACTIVATIONS
    if not here or len(bases[0]) != len(bases[1]) or not known.issuperset(bases[0] + bases[1]):
        return None
    return ", ".join(map(repr, sorted(here))), ", ".join(map(repr, sorted(there)))


def _reordered(a: Any, b: Any) -> str | None:
    """Return the name of whole numbers that both sides keep, in another order."""
    ours, yours = _entries(a, "numbers"), _entries(b, "numbers")
    for name, here in ours.items():
        there = yours.get(name)
        if isinstance(there, list) and here != there and here[:1] == there[:1]:
            return name
    return None


def _entries(content: Any, name: str) -> Mapping[str, Any]:
    found = content.get(name) if isinstance(content, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _where(signed: Mapping[str, Any]) -> str:
    cut, tail = signed.get("cut"), signed.get("tail")
    return ("by hand" if cut is None else f"at {cut!r:.80}") + ("" if tail is None else f" with the tail {tail!r:.80}")


def _parts(signed: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = signed.get("parts")
    return parts if isinstance(parts, Mapping) else {}


def _counts(content: Any) -> str:
    known = content if isinstance(content, Mapping) else {}
    return f"{known.get('tensors')!r:.20} tensors with {known.get('values')!r:.20} values"
