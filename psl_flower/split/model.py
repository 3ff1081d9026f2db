"""Models cut by hand (``SplitModel``), and one way to the parts of any model (``cut_model``)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from psl_flower.errors import ConfigError, CutError
from psl_flower.split.copying import copy_model
from psl_flower.split.cut import cut_apart, cut_candidates
from psl_flower.split.half import CutNames, Part, as_activations, listing
from psl_flower.split.modes import pinned_modules
from psl_flower.split.stored import hold_tensors


class SplitModel(nn.Module):
    """A model cut by hand, in two or (U-shaped) three, for models that `split_module` cannot cut.

    Called, it runs its parts, so it trains and evaluates like any other module. The keys of its state dict are its
    parts' own, prefixed ``client.``, ``server.`` and ``tail.``.

    Parameters
    ----------
    client : nn.Module
        Takes the model's inputs; returns a tensor, or a tuple or list of tensors, each with the batch first. With a
        tail it may return a pair of tuples: what crosses to the server, and what is kept on the client for the tail.
    server : nn.Module
        Takes what crosses, one argument a tensor; returns the model's output, or, with a tail, what crosses back: a
        tensor, or a tuple or list of tensors, each with the batch first.
    tail : nn.Module, optional
        Runs on the client. Takes what crosses back and then what was kept; returns the model's output.

    Raises
    ------
    ConfigError
        If a part is not a module.
    CutError
        If the client or the server has no parameters, or both sides share a parameter or buffer.
    """

    def __init__(self, *, client: nn.Module, server: nn.Module, tail: nn.Module | None = None) -> None:
        super().__init__()
        for name, part in (("client", client), ("server", server), ("tail", tail)):
            if not (isinstance(part, nn.Module) or (part is None and name == "tail")):
                raise ConfigError(f"{name} must be an nn.Module, got {part!r}: wrap a function in a module")
        self.client = client
        self.server = server
        self.tail = tail
        _check_parts(self)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the parts one after the other."""
        values = self.client(*inputs, **named)
        if self.tail is None:
            return self.server(*as_activations(values, (inputs, named)))
        activations, kept = _sent_and_kept(values, (inputs, named))
        return self.tail(*as_activations(self.server(*activations), activations), *kept)


@dataclass(frozen=True, eq=False)
class Halves:
    """The two halves or three parts of a model; names of parameters and buffers are the whole model's.

    Parameters
    ----------
    client : nn.Module
        Takes the model's inputs, returns a tuple of tensors, each with the batch first; with a tail, a pair of such
        tuples: what crosses, and what is kept on the client for the tail.
    server : nn.Module
        Takes what crosses, returns the model's output, or, with a tail, the tuple of tensors that crosses back. It
        works on copies of what it is given.
    unused : tuple of str
        Keys of the whole model's state dict that are in no part: what the model never uses.
    tail : nn.Module, optional
        Takes what crosses back and then what was kept, returns the model's output. It works on copies too.
    """

    client: nn.Module
    server: nn.Module
    unused: tuple[str, ...]
    tail: nn.Module | None = None

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The parts in the order in which they run."""
        return (self.client, self.server) if self.tail is None else (self.client, self.server, self.tail)

    def copied_parts(self) -> tuple[nn.Module, ...]:
        """Return copies of the parts, to be trained; frozen parameters are the same, so that there is one of them."""
        frozen = {id(p): p for part in self.parts for p in part.parameters() if not p.requires_grad}
        return copy.deepcopy(self.parts, frozen)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy a whole model's state dict into the parts; what is unused may be absent.

        Raises
        ------
        ConfigError
            If keys are missing or unknown, or a shape differs; nothing is copied then.
        """
        states = [part.state_dict() for part in self.parts]
        expected = {key: value for part in states for key, value in part.items()}
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
        for part, own in zip(self.parts, states, strict=True):
            part.load_state_dict({key: state[key] for key in own})

    def merge(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a whole model's state dict: the parts' present values (not copies), and `state` for the unused rest.

        Parameters
        ----------
        state : mapping
            The state dict the model started from; its order of keys is kept.
        """
        return {**state, **{key: value for part in self.parts for key, value in part.state_dict().items()}}


def cut_model(
    model: nn.Module, cut: str | None = None, tail: str | None = None, *, share_frozen: bool = False
) -> Halves:
    """Return copies of the parts of a model, cut by name or by hand.

    Parameters
    ----------
    model : nn.Module or SplitModel
        Left untouched.
    cut : str, optional
        The first server-side submodule; for a SplitModel there is none to name.
    tail : str, optional
        The first submodule that is back on the client.
    share_frozen : bool
        Whether the values of frozen parameters are the model's own, and no copies.

    Raises
    ------
    ConfigError
        If it is no module, a SplitModel comes with a cut or a tail, or any other model without a cut.
    CutError
        If the model cannot be cut there, see `split_module` and `SplitModel`.
    """
    parts: tuple[nn.Module, ...]
    given: object = model
    if not isinstance(given, nn.Module):
        found = f"the class {given.__name__}: call it" if isinstance(given, type) else f"{given!r:.80}"
        raise ConfigError(f"the model must be an nn.Module, got {found}")
    if hasattr(model, "_orig_mod"):
        raise ConfigError(
            "a model that torch.compile has wrapped cannot be cut: pass the model itself, and compile submodules of it"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError("a model of torch.jit cannot be cut: pass the nn.Module that it was made of")
    if meta := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise ConfigError(f"{meta[0]!r} is on the device 'meta' and has no values: make the model on the CPU")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ConfigError(f"a model that {type(model).__name__} has wrapped cannot be cut: pass model.module")
    if not isinstance(model, SplitModel):
        if cut is None:
            raise ConfigError(
                f"{type(model).__name__} needs a cut, the name of its first server-side submodule: one of "
                f"{listing(cut_candidates(model, depth=1))}, or a deeper one; or pass a "
                f"SplitModel(client=..., server=...)"
            )
        parts = cut_apart(model, cut, tail, share_frozen=share_frozen)
    elif cut is not None or tail is not None:
        given = " and ".join(f"{name}={value!r}" for name, value in (("cut", cut), ("tail", tail)) if value is not None)
        raise ConfigError(f"a SplitModel is cut already, got {given}: leave cut and tail out")
    else:
        _check_parts(model)
        parts = _hand_parts(copy_model(model, share_frozen=share_frozen))
    for part in parts[::2]:
        hold_tensors(part)  # the client's
    used = {key for part in parts for key in part.state_dict()}
    return Halves(
        parts[0],
        parts[1],
        unused=tuple(key for key in model.state_dict() if key not in used),
        tail=parts[2] if len(parts) == 3 else None,
    )


class _HandPart(Part):
    """A part of a SplitModel, under its name in the whole model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(CutNames())
        part = model.get_submodule(name)
        self.add_module(name, part)
        self.training = part.training
        self._pin(pinned_modules(model))


class _Client(_HandPart):
    def __init__(self, model: nn.Module, *, keeps: bool) -> None:
        super().__init__(model, "client")
        self._keeps = keeps

    def signature(self) -> inspect.Signature:
        return inspect.signature(self.get_submodule("client").forward)

    def forward(self, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        values = self.get_submodule("client")(*inputs, **named)
        return (_sent_and_kept if self._keeps else as_activations)(values, (inputs, named))


class _Later(_HandPart):
    def __init__(self, model: nn.Module, name: str, *, hands_on: bool) -> None:
        super().__init__(model, name)
        self._name, self._hands_on = name, hands_on

    def forward(self, *received: torch.Tensor) -> Any:
        # copies, because a first layer in place is refused by autograd on the leaf tensors a part receives
        output = self.get_submodule(self._name)(*(tensor.clone() for tensor in received))
        return as_activations(output, received) if self._hands_on else output


def _hand_parts(model: SplitModel) -> tuple[nn.Module, ...]:
    if model.tail is None:
        return _Client(model, keeps=False), _Later(model, "server", hands_on=False)
    return (
        _Client(model, keeps=True),
        _Later(model, "server", hands_on=True),
        _Later(model, "tail", hands_on=False),
    )


def _sent_and_kept(values: Any, inputs: Sequence[Any]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return what the client part of three returned as what crosses and what is kept."""
    pair = isinstance(values, list | tuple) and len(values) == 2 and all(isinstance(v, list | tuple) for v in values)
    sent, kept = values if pair else (values, ())
    return as_activations(sent, inputs), as_activations(kept, inputs) if kept else ()


def _check_parts(model: SplitModel) -> None:
    names: tuple[dict[int, str], dict[int, str]] = ({}, {})
    for side, name in ((0, "client"), (1, "server"), (0, "tail")):
        part: nn.Module | None = getattr(model, name)
        if part is None:
            continue
        if name != "tail" and next(part.parameters(), None) is None:
            raise CutError(f"the {name} half has no parameters: a cut needs something to train on either side")
        names[side].update({id(value): f"{name}.{key}" for key, value in part.state_dict(keep_vars=True).items()})
    for key in names[0].keys() & names[1].keys():
        raise CutError(f"{names[0][key]!r} and {names[1][key]!r} are one tensor: give each side its own")
