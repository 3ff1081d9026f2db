"""A model's state dict as Flower arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from psl_flower.checks import check_choice
from psl_flower.errors import ConfigError


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


def arrays_to_state(arrays: ArrayRecord | Result, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return arrays, or those of a result, as a state dict in the dtypes of `template`.

    Raises
    ------
    ConfigError
        If names or shapes are not those of `template`.
    """
    arrays = arrays.arrays if isinstance(arrays, Result) else arrays
    if different := sorted(set(arrays) ^ set(template)):
        where = "missing from the arrays" if different[0] in template else "not in the model"
        raise ConfigError(
            f"initial_arrays must be the model's state dict, {len(different)} names differ: {different[0]!r} is "
            f"{where}; pass ArrayRecord(model.state_dict()), with state='trainable' only what is not frozen"
        )
    state = {}
    for name, tensor in template.items():
        value = torch.from_numpy(arrays[name].numpy())
        if value.shape != tensor.shape:
            raise ConfigError(
                f"initial_arrays: {name!r} must have shape {tuple(tensor.shape)}, got {tuple(value.shape)}"
            )
        state[name] = value.to(tensor.dtype)
    return state


def state_to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a state dict as arrays; bfloat16, which Flower's arrays lack, as the float32 of the same value."""
    tensors = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in state.items()}
    return ArrayRecord(tensors)
