"""A model's state dict as Flower arrays, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from psl_flower.checks import check_choice
from psl_flower.errors import ConfigError
from psl_flower.server import load_known
from psl_flower.tree import is_finite

_PREFIXES = "module.", "_orig_mod."  # of DataParallel and torch.compile


def kept_state(model: nn.Module, state: str) -> dict[str, Tensor]:
    """Return a model's state dict, as far as a run takes, keeps and returns it; without values.

    Parameters
    ----------
    model : nn.Module
    state : str
        "all", or "trainable": all but the frozen parameters.
    """
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    trainable = check_choice(state, "state", ("all", "trainable")) == "trainable"
    held = model.state_dict(keep_vars=True)
    return {name: t.detach().to("meta") for name, t in held.items() if not (trainable and id(t) in frozen)}


def as_record(arrays: ArrayRecord | Result | Mapping[str, Tensor], name: str = "initial_arrays") -> ArrayRecord:
    """Return the arrays that someone means, of a result or a state dict too, as Flower's.

    Raises
    ------
    ConfigError
        If it is something else.
    """
    if isinstance(arrays, Result):
        arrays = arrays.arrays
    if isinstance(arrays, ArrayRecord):
        return arrays
    state = {name: t for name, t in arrays.items() if isinstance(t, Tensor)} if isinstance(arrays, Mapping) else {}
    if state and len(state) == len(arrays):
        return state_to_arrays(state)
    raise ConfigError(f"{name} must be an ArrayRecord: pass ArrayRecord(model.state_dict()), got {arrays!r:.80}")


def arrays_to_state(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return arrays as a state dict in the dtypes of `template`.

    Raises
    ------
    ConfigError
        If names or shapes are not those of `template`, or a value is NaN.
    """
    if different := sorted(set(arrays) ^ set(template)):
        where = "missing from the arrays" if different[0] in template else "not in the model"
        remedy = "pass ArrayRecord(model.state_dict()), with state='trainable' only what is not frozen"
        for prefix in _PREFIXES:
            if {name.removeprefix(prefix) for name in arrays} == set(template):
                remedy = f"take the prefix {prefix!r} off the names: a wrapper's state dict has it"
        raise ConfigError(
            f"initial_arrays must be the model's state dict, {len(different)} names differ: {different[0]!r} is "
            f"{where}; {remedy}"
        )
    state = {}
    for name, tensor in template.items():
        value = torch.from_numpy(arrays[name].numpy())
        if value.shape != tensor.shape:
            raise ConfigError(
                f"initial_arrays: {name!r} must have shape {tuple(tensor.shape)}, got {tuple(value.shape)}"
            )
        if not is_finite(value) and value.isnan().any():
            raise ConfigError(
                f"initial_arrays: {name!r} holds NaN: the training that it is from had diverged, take arrays from "
                "before that"
            )
        state[name] = value.to(tensor.dtype)
    return state


def state_to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a state dict as arrays; bfloat16, which Flower's arrays lack, as the float32 of the same value."""
    tensors = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in state.items()}
    return ArrayRecord(tensors)


def with_state(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return the parts of a model with the values that a state dict has of them; the rest keeps its own."""
    for part in parts.values():
        load_known(part, state)
    return dict(parts)


def sizes(parts: Iterable[nn.Module], on_clients: Iterable[nn.Module]) -> str:
    """Return how many parameters a model's parts have on the client, and how many on the server."""
    theirs = {p for part in on_clients for p in part.parameters()}
    here = {p for part in parts for p in part.parameters()} - theirs
    counts = [sum(p.numel() for p in some) for some in (theirs, here)]
    return f"{counts[0]:,} parameters on the client, {counts[1]:,} on the server"
