"""The parts of a trained model as programs of their own, for where they are used apart: a device, and a server."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from psl_flower.errors import CutError
from psl_flower.split.half import input_names
from psl_flower.split.model import cut_model
from psl_flower.split.place import NEEDS_EXAMPLE, example_of, is_text

INDEX = "parts.json"
NAMES = ("client", "server", "tail")


def export_halves(model: nn.Module, folder: str | Path, cut: str | None = None, tail: str | None = None) -> list[Path]:
    """Write the parts of a model in evaluation mode, a `torch.export` program each, and what crosses between them.

    A program is loaded with ``torch.export.load(path).module()``, without this package and the model's code, takes its
    tensors by position and returns a dict of tensors. ``parts.json`` has for each part its file and its inputs and
    outputs in order: name, dtype and shape, in which "batch" is any number of rows, and "length" any number that is
    the same wherever it stands. A client returns what crosses, and of three parts what it keeps (``kept_0``, ...),
    which the tail takes after what has come back.

    Parameters
    ----------
    model : nn.Module or SplitModel
        With its trained weights; left untouched.
    folder : path
        Made if need be.
    cut, tail : str, optional
        As in training. An example batch comes from the model (``dummy_inputs``) or with the cut, see `Cut`; for a
        SplitModel, ``Cut("", example=...)`` names it.

    Returns
    -------
    list of Path
        The files, in the order in which the parts run.

    Raises
    ------
    CutError
        If there is no example batch, or `torch.export` cannot record a part.
    """
    halves, batch = cut_model(model, cut or None, tail), example_of(model, "" if cut is None else cut)
    if batch is None:
        raise CutError(f"export_halves {NEEDS_EXAMPLE}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in input_names(halves.client) if name in batch]
    if len(names) != len(batch):
        raise CutError(f"the client part takes {', '.join(input_names(halves.client))}, the example has {list(batch)}")
    given, kept = {name: batch[name] for name in names}, dict[str, Tensor]()
    files, told = [], {}
    for name, part in zip(NAMES, halves.parts, strict=False):
        program = _Program(part, name, list(given) if name == "client" else None).eval()
        files.append(folder / f"{name}.pt2")
        texts = [is_text(value) for value in given.values()] if name == "client" else getattr(part, "takes", ())
        told[name] = {"file": files[-1].name, **_save(program, name, given, texts, files[-1])}
        with torch.no_grad():
            returned = program(*given.values())
        if name == "client":
            kept = {key: returned.pop(key) for key in list(returned) if key.startswith("kept_")}
        given = {**returned, **kept} if name == "server" else returned
    (folder / INDEX).write_text(json.dumps(told, indent=2) + "\n")
    return files


class _Program(nn.Module):
    """A part that takes tensors by position and returns them by name."""

    def __init__(self, part: nn.Module, name: str, inputs: Sequence[str] | None) -> None:
        super().__init__()
        self.part, self._name, self._inputs = part, name, inputs

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Run the part."""
        if self._inputs is None:
            outputs = self.part(*tensors)
        else:
            outputs = self.part(**dict(zip(self._inputs, tensors, strict=True)))
        if isinstance(outputs, Mapping):
            return {key: value for key, value in outputs.items() if isinstance(value, Tensor)}
        if isinstance(outputs, tuple) and isinstance(outputs[0], tuple):
            return {**_numbered(self._name, outputs[0]), **_numbered("kept", outputs[1])}
        return _numbered(self._name, outputs if isinstance(outputs, tuple | list) else (outputs,))


def _numbered(name: str, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{name}_{i}": tensor for i, tensor in enumerate(tensors)}


def _save(
    program: nn.Module, name: str, given: Mapping[str, Tensor], texts: Sequence[bool], path: Path
) -> dict[str, Any]:
    """Write a program for any number of rows, and texts of any length; return what it takes and gives."""
    sizes, tensors = torch.export.Dim, tuple(given.values())
    long = [*texts, *[False] * (len(tensors) - len(texts))]
    dynamic = tuple({0: sizes.DYNAMIC, 1: sizes.AUTO} if each else {0: sizes.DYNAMIC} for each in long)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.export.export(program, tensors, dynamic_shapes=(dynamic,), strict=False)
            torch.export.save(made, path)
    except Exception as error:
        raise CutError(f"torch.export cannot write the {name} part ({type(error).__name__}: {error})") from error
    signature = made.graph_signature
    nodes = {node.name: node for node in made.graph.nodes}
    returned = program(*tensors)
    inputs = [nodes[str(each)] for each in signature.user_inputs]
    outputs = [nodes[str(each)] for each in signature.user_outputs]
    symbols: dict[str, str] = {}
    return {
        "inputs": [_described(*pair, symbols) for pair in zip(given, inputs, strict=True)],
        "outputs": [_described(*pair, symbols) for pair in zip(returned, outputs, strict=True)],
    }


def _described(name: str, node: fx.Node, symbols: dict[str, str]) -> dict[str, Any]:
    """Return what is told of a tensor; sizes that vary have the names batch and length, as they come."""
    value, shape = node.meta["val"], list[int | str]()
    for size in value.shape:
        fixed = isinstance(size, int)
        shape.append(int(size) if fixed else symbols.setdefault(str(size), "length" if symbols else "batch"))
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
