"""Models cut by hand (``SplitModel``), and one way to the halves of any model (``cut_model``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from psl_flower.errors import ConfigError, CutError
from psl_flower.split.cut import cut_candidates, listing, split_module
from psl_flower.split.half import as_activations, copy_model


class SplitModel(nn.Module):
    """A model cut in two by hand, for models that `split_module` cannot cut.

    Called, it runs both halves, so it trains and evaluates like any other module. The keys of its state dict are its
    halves' own, prefixed ``client.`` and ``server.``.

    Parameters
    ----------
    client : nn.Module
        Takes the model's inputs; returns a tensor, or a tuple or list of tensors, each with the batch first.
    server : nn.Module
        Takes what the client half returns, one argument a tensor; returns the model's output.

    Raises
    ------
    ConfigError
        If a half is not a module.
    CutError
        If a half has no parameters, or both halves share a parameter or buffer.
    """

    def __init__(self, *, client: nn.Module, server: nn.Module) -> None:
        super().__init__()
        for name, half in (("client", client), ("server", server)):
            if not isinstance(half, nn.Module):
                raise ConfigError(f"{name} must be an nn.Module, got {half!r}: wrap a function in a module")
        self.client = client
        self.server = server
        _check_halves(self)

    def forward(self, *inputs: Any) -> Any:
        """Run the client half, then the server half."""
        return self.server(*as_activations(self.client(*inputs), inputs))


@dataclass(frozen=True, eq=False)
class Halves:
    """The two halves of a model; names of parameters and buffers are the whole model's.

    Parameters
    ----------
    client : nn.Module
        Takes the model's inputs, returns a tuple of tensors, each with the batch first.
    server : nn.Module
        Takes those tensors, returns the model's output. It works on copies of them.
    unused : tuple of str
        Keys of the whole model's state dict that are in neither half: what the model never uses.
    """

    client: nn.Module
    server: nn.Module
    unused: tuple[str, ...]

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy a whole model's state dict into the halves; what is unused may be absent.

        Raises
        ------
        ConfigError
            If keys are missing or unknown, or a shape differs; nothing is copied then.
        """
        parts = self.client.state_dict(), self.server.state_dict()
        expected = {**parts[0], **parts[1]}
        missing = [key for key in expected if key not in state]
        unknown = [key for key in state if key not in expected and key not in self.unused]
        if missing or unknown:
            raise ConfigError(
                f"the arrays must be the whole model's state dict: missing {listing(missing) or 'none'}, unknown "
                f"{listing(unknown) or 'none'}"
            )
        for key, value in expected.items():
            if state[key].shape != value.shape:
                raise ConfigError(f"shape of {key!r}: expected {tuple(value.shape)}, got {tuple(state[key].shape)}")
        for half, part in zip((self.client, self.server), parts, strict=True):
            half.load_state_dict({key: state[key] for key in part})

    def merge(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a whole model's state dict: the halves' present values (not copies), and `state` for the unused rest.

        Parameters
        ----------
        state : mapping
            The state dict the model started from; its order of keys is kept.
        """
        return {**state, **self.client.state_dict(), **self.server.state_dict()}


def cut_model(model: nn.Module, cut: str | None = None) -> Halves:
    """Return copies of the two halves of a model, cut by name or by hand.

    Parameters
    ----------
    model : nn.Module or SplitModel
        Left untouched.
    cut : str, optional
        The first server-side submodule; for a SplitModel there is none to name.

    Raises
    ------
    ConfigError
        If a SplitModel comes with a cut, or any other model without.
    CutError
        If the model cannot be cut there, see `split_module` and `SplitModel`.
    """
    if not isinstance(model, SplitModel):
        if cut is None:
            raise ConfigError(
                f"{type(model).__name__} needs a cut, the name of its first server-side submodule: one of "
                f"{listing(cut_candidates(model, depth=1))}, or a deeper one; or pass a "
                f"SplitModel(client=..., server=...)"
            )
        client, server = split_module(model, cut)
    elif cut is not None:
        raise ConfigError(f"a SplitModel is cut already, got cut={cut!r}: leave cut out")
    else:
        _check_halves(model)
        client, server = _Client(copy_model(model.client)), _Server(copy_model(model.server))
    used = client.state_dict().keys() | server.state_dict().keys()
    return Halves(client, server, tuple(key for key in model.state_dict() if key not in used))


class _Client(nn.Module):
    """The client half of a SplitModel, under its name in the whole model."""

    def __init__(self, client: nn.Module) -> None:
        super().__init__()
        self.client = client
        self.training = client.training

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return as_activations(self.client(*inputs), inputs)


class _Server(nn.Module):
    """The server half of a SplitModel, under its name in the whole model."""

    def __init__(self, server: nn.Module) -> None:
        super().__init__()
        self.server = server
        self.training = server.training

    def forward(self, *activations: torch.Tensor) -> Any:
        # copies, because a first layer in place is refused by autograd on the leaf tensors a server receives
        return self.server(*(activation.clone() for activation in activations))


def _check_halves(model: SplitModel) -> None:
    names: list[dict[int, str]] = []
    for name, half in (("client", model.client), ("server", model.server)):
        if next(half.parameters(), None) is None:
            raise CutError(f"the {name} half has no parameters: a cut needs something to train on either side")
        names.append({id(value): f"{name}.{key}" for key, value in half.state_dict(keep_vars=True).items()})
    for key in names[0].keys() & names[1].keys():
        raise CutError(f"{names[0][key]!r} and {names[1][key]!r} are one tensor: give each half its own")
