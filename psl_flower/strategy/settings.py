"""The settings of a run as plain data: what a resumed run shares with its checkpoint, and what it has changed since.

A run that resumes is built by the user's code, which may have been edited. What decides what the checkpoint's state
means (model, cut, sampler, kind of optimizer) must be as it was; of everything else, the new value is used and told.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from psl_flower.errors import ConfigError
from psl_flower.server import Accumulated
from psl_flower.split.signature import layers

# Settings that decide what is in a checkpoint, or which examples an epoch has left.
_FIXED = ("model", "cut", "method", "sampler", "classification")
# Where a run was resumed from is no setting of the run.
_IGNORED = ("resume_from", "resume-from")
_ABSENT = object()
_DEEPEST = 4  # objects in objects that are described


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was when the checkpoint was written.

    Parameters
    ----------
    name : str
        The way to it, as "optimizer: group 0: lr".
    then, now : plain data
        None for one that is not there.
    """

    name: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {self.then!r}, now {self.now!r}"


# --- describing ------------------------------------------------------------------------------------------------------
def describe(value: Any, depth: int = _DEEPEST) -> Any:
    """Return a setting as numbers, strings, lists and dicts that are equal for equal settings in another process.

    An object is described by its class and the arguments of its constructor, as far as it keeps them under their names
    (with or without an underscore), a function by its name, a tensor by a checksum.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray | np.generic):
        if value.ndim == 0:
            return value.item()
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()[:12]}"
    if isinstance(value, Mapping):
        return {str(key): describe(v, depth) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v, depth) for v in value]
    if isinstance(value, functools.partial):
        called = {"function": describe(value.func, depth), "arguments": describe(value.args, depth)}
        return {**called, **describe(value.keywords, depth)}
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    arguments = _arguments(value) if depth else {}
    return {"class": type(value).__name__, **{name: describe(v, depth - 1) for name, v in arguments.items()}}


def _arguments(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in type(value).__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        for name in list(inspect.signature(vars(base)["__init__"]).parameters)[1:]:
            kept = getattr(value, name, getattr(value, f"_{name}", _ABSENT))
            if kept is not _ABSENT:
                found.setdefault(name, kept)
    return found


def describe_layers(parts: Iterable[nn.Module]) -> dict[str, str]:
    """Return torch's own layers in the parts of a model, by name, with their options; "" for modules of one's own."""
    return {name: each for part in parts for name, each in layers(part).items()}


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's hyper-parameters as its factory gave them: call it before the first step.

    A scheduler may have changed the learning rate already; the one it begins from is in ``initial_lr``.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, Accumulated):
        kind = f"{type(optimizer.inner).__name__}, {optimizer.steps} gradients to a step"
    described: dict[str, Any] = {"class": kind}
    for i, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names", "initial_lr")}
        options["lr"] = group.get("initial_lr", group.get("lr"))
        described[_group(i)] = {"parameters": len(group["params"]), **describe(options)}
    return described


def describe_scheduler(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's options as its factory gave them: call it before the first step.

    They are what it keeps in its state, but for learning rates, which are the optimizer's.
    """
    if scheduler is None:
        return {"class": None}
    state = scheduler.state_dict() if hasattr(scheduler, "state_dict") else {}
    return {"class": type(scheduler).__name__, **_without_rates(state)}


def _without_rates(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {k: _without_rates(v) for k, v in state.items() if k not in ("base_lrs", "_last_lr")}
    return [_without_rates(v) for v in state] if isinstance(state, list | tuple) else deepcopy(state)


def _group(index: int) -> str:
    return f"group {index}"


# --- comparing -------------------------------------------------------------------------------------------------------
def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return what has changed between two descriptions of a run.

    Parameters
    ----------
    then, now : dict
        Settings by name, described: those in the checkpoint, and those of this run.

    Raises
    ------
    ConfigError
        If something has changed that a checkpoint depends on; names the first.
    """
    changes = []
    for path, was, wanted in _differences((), then, now):
        if any(name in _IGNORED for name in path):
            continue
        if path[0] == "optimizer" and len(path) == 3 and _ABSENT in (was, wanted):
            continue  # another version of torch has another option
        name = ": ".join(path)
        rule = _refusal(path, was, wanted, then)
        if rule is not None:
            raise ConfigError(
                f"the checkpoint is not of this run: {name}: {_told(was, wanted)}{rule}: set it back, "
                "or start anew without resume_from"
            )
        changes.append(Change(name, None if was is _ABSENT else was, None if wanted is _ABSENT else wanted))
    return changes


def _differences(path: tuple[str, ...], then: Any, now: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in {**then, **now}:
            yield from _differences((*path, str(key)), then.get(key, _ABSENT), now.get(key, _ABSENT))
    elif then != now:
        yield path, then, now


def _told(was: Any, wanted: Any) -> str:
    if was is _ABSENT:
        return f"this run has {wanted!r}, the checkpoint has none"
    if wanted is _ABSENT:
        return f"the checkpoint has {was!r}, this run has none"
    return f"the checkpoint has {was!r}, this run {wanted!r}"


def _refusal(path: tuple[str, ...], was: Any, wanted: Any, then: Mapping[str, Any]) -> str | None:
    """Return None if this may change, else the rule to be told (empty where it is plain)."""
    section, option = path[0], path[-1]
    if section in _FIXED or (section in ("optimizer", "scheduler") and option == "class"):
        return ""
    if section != "optimizer":
        return None
    if len(path) < 3 or option == "parameters":
        return " (the optimizer's groups of parameters may not change)"
    if not (_is_numeric(was) and _is_numeric(wanted)):
        return " (of an optimizer's options only numbers may change: the others decide what its state holds)"
    # SGD makes its momentum buffers when it first needs them, others do so at the first step of all
    if option == "momentum" and not was and then["optimizer"]["class"] != "SGD":
        return " (the optimizer's state in the checkpoint has no momentum to go on with)"
    return None


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_numeric, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- applying --------------------------------------------------------------------------------------------------------
def apply(optimizer: torch.optim.Optimizer, scheduler: Any, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Give an optimizer and its scheduler the options that have changed, after their states were loaded.

    Their states hold the options that were in force when the checkpoint was written. Those that differ between the two
    descriptions, that is, between what the factories gave then and give now, are replaced; what a scheduler has made of
    a learning rate in the meantime, it has made of the new one, too.

    Parameters
    ----------
    optimizer : torch optimizer
        Changed in place.
    scheduler : torch learning-rate scheduler, optional
        Changed in place.
    then, now : dict
        Settings that `compare` has accepted; of these, "optimizer" and "scheduler" are used.
    """
    for i, group in enumerate(optimizer.param_groups):
        was, wanted = then["optimizer"][_group(i)], now["optimizer"][_group(i)]
        for name in was.keys() & wanted.keys():
            if was[name] == wanted[name]:
                continue
            if name == "lr":
                _set(group, name, _moved(float(group["lr"]), was[name], wanted[name]))
                if "initial_lr" in group:
                    _set(group, "initial_lr", wanted[name])
            else:
                _set(group, name, wanted[name])
    changed = any(then[name] != now[name] for name in ("optimizer", "scheduler"))
    if changed and hasattr(scheduler, "state_dict"):
        state = _merged(then["scheduler"], now["scheduler"], scheduler.state_dict())
        scheduler.load_state_dict(_with_rates(state, optimizer))


def _moved(rate: float, was: float, wanted: float) -> float:
    """Return a learning rate that was `was` at first and is `rate` now, had it been `wanted` at first."""
    return wanted if rate == was or not was else rate * wanted / was


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = tuple(value) if isinstance(value, list) else value


def _merged(then: Any, now: Any, state: Any) -> Any:
    """Return a state with what differs between `then` and `now` as it is in `now`."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        kept = {k: v for k, v in state.items() if k in now or k not in then}
        merged = {k: _merged(then[k], now[k], v) if k in then and k in now else v for k, v in kept.items()}
        return {**merged, **{k: deepcopy(v) for k, v in now.items() if k not in then}}
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now) == len(state):
        return [_merged(*each) for each in zip(then, now, state, strict=True)]
    return state if then == now else deepcopy(now)


def _with_rates(state: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Return a scheduler's state with the learning rates that its optimizer has."""
    if isinstance(state, list):
        return [_with_rates(v, optimizer) for v in state]
    if not isinstance(state, Mapping):
        return state
    groups = optimizer.param_groups
    rates = {"_last_lr": "lr", "base_lrs": "initial_lr"}
    return {
        k: [group.get(rates[k], before) for group, before in zip(groups, v, strict=True)]
        if k in rates
        else _with_rates(v, optimizer)
        for k, v in state.items()
    }
