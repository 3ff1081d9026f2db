"""Where a model is cut, and what `torch.export` needs besides: an example batch, and what of it is no secret."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from psl_flower.errors import CutError
from psl_flower.signatures import needed_arguments

# What says how long texts are, and nothing of what is in them: whatever masks attention tells the server as much.
SHARED = ("attention_mask",)

# What to write for an input in an example, where its name tells.
_EXAMPLES = dict.fromkeys(("input_ids", "attention_mask"), "torch.zeros(2, 8).long()")

_ROWS = 2  # of an example that is made up: not 1, which torch.export takes for a constant


class Cut(str):
    """The name of a submodule to cut at, and what a cut with `torch.export` needs to know besides.

    It is a string, and goes wherever the name of a cut goes; server and clients need the same.

    Parameters
    ----------
    name : str
        Qualified name of the first server-side submodule.
    example : dict of str to Tensor, optional
        Inputs of the model's ``forward`` by name, or what is in the one dict that it takes; at least two rows, of at
        least two positions; only names, dtypes and sizes matter. The cut model takes these inputs and no others.
        Default: what the model says itself (``dummy_inputs``, or its configuration), with an ``attention_mask`` if its
        ``forward`` takes one.
    share : collection of str
        Inputs that may go to the server as they are, in place of what is computed of them. Default: the attention
        mask, from which the server computes its own masks.
    """

    example: Mapping[str, Tensor] | None
    share: tuple[str, ...]

    def __new__(
        cls, name: str, *, example: Mapping[str, Tensor] | None = None, share: Collection[str] = SHARED
    ) -> Self:
        """Make a string of it that holds the rest."""
        made = super().__new__(cls, name)
        if isinstance(share, str):
            raise CutError(f"share must hold names of inputs, got the string {share!r}: write share=({share!r},)")
        made.example, made.share = (None if example is None else dict(example)), tuple(share)
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        """Tell pickle and copy how to make it."""
        return (str(self),), {"example": self.example, "share": self.share}


def share_of(cut: str) -> tuple[str, ...]:
    """Return the inputs that may cross a cut as they are."""
    return cut.share if isinstance(cut, Cut) else SHARED


def needs_example(model: nn.Module) -> str:
    """Return what to do where there is no example batch of a model."""
    signature = inspect.signature(model.forward)
    names = [parameter.name for parameter in needed_arguments(signature)] or list(signature.parameters)[:1]
    shown = ", ".join(f"{name!r}: {_EXAMPLES.get(name, 'torch.zeros(2, ...)')}" for name in names)
    return f"needs an example batch, two rows of each input: name it with the cut, Cut(name, example={{{shown}}})"


def example_of(model: nn.Module, cut: str) -> dict[str, Tensor] | None:
    """Return an example batch of a model by the names of its inputs: the cut's, or what the model says itself.

    Raises
    ------
    CutError
        If `torch.export` would take its sizes for constants.
    """
    example = cut.example if isinstance(cut, Cut) else None
    if example is None:
        example = _made_up(model)
    if example is None:
        return None
    value: Any  # it is the user's
    for name, value in example.items():
        if isinstance(value, Mapping):
            raise CutError(
                f"the example's {name!r} must be a tensor, got a dict: put its entries into the example itself"
            )
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise CutError(f"the example's {name!r} must be a tensor with a row an example, got {value!r:.60}")
        if len(value) < 2 or (is_text(value) and value.shape[1] < 2):
            raise CutError(
                f"the example's {name!r} must have at least two rows, of two positions, for torch.export takes a size "
                f"of 1 for a constant, got shape {tuple(value.shape)}"
            )
    return dict(example)


def is_text(value: Tensor) -> bool:
    """Return whether an input has a number a position, (rows, length): its length varies."""
    return value.ndim == 2 and not value.is_floating_point()


def _made_up(model: nn.Module) -> dict[str, Tensor] | None:
    """Return what a model's class, or its configuration, tells of its inputs."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values":
        side, channels = (getattr(config, name, None) for name in ("image_size", "num_channels"))
        if not isinstance(side, int) or not isinstance(channels, int):
            return None
        return {"pixel_values": torch.zeros(_ROWS, channels, side, side)}
    dummy: Any = getattr(model, "dummy_inputs", None)
    if not isinstance(dummy, Mapping):
        return None
    example = {name: value for name, value in dummy.items() if isinstance(value, Tensor)}
    tokens = example.get("input_ids")
    if tokens is not None and "attention_mask" not in example and _takes(model, "attention_mask"):
        example["attention_mask"] = torch.ones_like(tokens)
    return example


def _takes(model: nn.Module, name: str) -> bool:
    """Return whether a model's forward takes an argument; of one that takes any, whether the model within does."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):  # a wrapper, as peft's
        return any(_takes(child, name) for child in model.children())
    return name in parameters
