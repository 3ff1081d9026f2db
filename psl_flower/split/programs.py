"""The parts of a trained model as programs of their own, for where they are used apart: a device, and a server.

Two formats: `torch.export` programs (.pt2), which torch loads, and ONNX, which onnxruntime and many devices do.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from psl_flower.errors import ConfigError, CutError
from psl_flower.extras import check_extra
from psl_flower.signatures import whole_dict
from psl_flower.split.half import input_names, signature_of
from psl_flower.split.model import cut_model
from psl_flower.split.nodes import constant
from psl_flower.split.place import example_of, is_text, needs_example

INDEX = "parts.json"
NAMES = ("client", "server", "tail")
FORMATS = ("pt2", "onnx")


def export_halves(
    model: nn.Module,
    folder: str | Path,
    cut: str | None = None,
    tail: str | None = None,
    formats: Sequence[str] = ("pt2",),
) -> list[Path]:
    """Write the parts of a model in evaluation mode, a program each, and what crosses between them.

    Without this package and the model's code, ``torch.export.load(path).module()`` loads a program, which takes its
    tensors by position and returns a dict of tensors; ``onnxruntime.InferenceSession(path)`` loads one in ONNX, whose
    inputs and outputs have the names of ``parts.json``. That file has for each part its files and its inputs and
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
        SplitModel, ``Cut("", example=...)`` names it. Its names are those of the inputs of the first program.

    formats : sequence of str
        "pt2", "onnx", or both. ONNX needs the extra ``onnx``.

    Returns
    -------
    list of Path
        The files, in the order in which the parts run, those of a part in that of the formats.

    Raises
    ------
    CutError
        If there is no example batch, or `torch.export` cannot record a part, or it has no form in ONNX.
    ConfigError
        If a format is another, or the packages for it are missing.
    """
    if isinstance(formats, str) or not formats or not set(formats) <= set(FORMATS):
        raise ConfigError(f"formats must name some of {', '.join(FORMATS)}, as in ('pt2', 'onnx'), got {formats!r}")
    if "onnx" in formats:
        check_extra("onnxscript", "onnx", "the format onnx")
    halves, batch = cut_model(model, cut or None, tail), example_of(model, "" if cut is None else cut)
    if batch is None:
        raise CutError(f"export_halves {needs_example(model)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    call = _Call(halves.client, batch)
    given, kept = {name: batch[name] for name in call.names}, dict[str, Tensor]()
    files, told = list[Path](), dict[str, Any]()
    for name, part in zip(NAMES, halves.parts, strict=False):
        program = _Program(part, name, call if name == "client" else None).eval()
        texts = [is_text(value) for value in given.values()] if name == "client" else getattr(part, "takes", ())
        made = _record(program, name, given, texts)
        written = {each: folder / f"{name}.{each}" for each in formats}
        told[name] = {"files": {each: path.name for each, path in written.items()}, **_described(made, program, given)}
        for each, path in written.items():
            if each == "pt2":
                torch.export.save(made, path)
            else:
                _save_onnx(made, told[name], path)
        files += written.values()
        with torch.no_grad():
            returned = program(*given.values())
        if name == "client":
            kept = {key: returned.pop(key) for key in list(returned) if key.startswith("kept_")}
        given = {**returned, **kept} if name == "server" else returned
    (folder / INDEX).write_text(json.dumps(told, indent=2) + "\n")
    return files


class _Call:
    """How the first part is called with the inputs of an example batch: by name, or with all of them as one dict."""

    def __init__(self, part: nn.Module, batch: Mapping[str, Tensor]) -> None:
        signature = signature_of(part)
        self._whole = whole_dict(signature, batch)
        taken = input_names(part)
        self.names = [*(name for name in taken if name in batch), *(name for name in batch if name not in taken)]
        try:
            signature.bind(**self._arguments(batch))
        except TypeError as error:
            raise CutError(
                f"the client part takes {', '.join(taken)}, the example has {list(batch)}: {error}"
            ) from error

    def __call__(self, part: nn.Module, tensors: Sequence[Tensor]) -> Any:
        return part(**self._arguments(dict(zip(self.names, tensors, strict=True))))

    def _arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        return dict(batch) if self._whole is None else {self._whole.name: dict(batch)}


class _Program(nn.Module):
    """A part that takes tensors by position and returns them by name."""

    def __init__(self, part: nn.Module, name: str, call: _Call | None) -> None:
        super().__init__()
        self.part, self._name, self._call = part, name, call

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Run the part."""
        outputs = self.part(*tensors) if self._call is None else self._call(self.part, tensors)
        if isinstance(outputs, Mapping):
            return {key: value for key, value in outputs.items() if isinstance(value, Tensor)}
        if isinstance(outputs, tuple) and isinstance(outputs[0], tuple):
            return {**_numbered(self._name, outputs[0]), **_numbered("kept", outputs[1])}
        return _numbered(self._name, outputs if isinstance(outputs, tuple | list) else (outputs,))


def _numbered(name: str, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{name}_{i}": tensor for i, tensor in enumerate(tensors)}


def _record(
    program: nn.Module, name: str, given: Mapping[str, Tensor], texts: Sequence[bool]
) -> torch.export.ExportedProgram:
    """Return a program for any number of rows, and texts of any length."""
    sizes, tensors = torch.export.Dim, tuple(given.values())
    long = [*texts, *[False] * (len(tensors) - len(texts))]
    dynamic = tuple({0: sizes.DYNAMIC, 1: sizes.AUTO} if each else {0: sizes.DYNAMIC} for each in long)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(program, tensors, dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:
        raise CutError(f"torch.export cannot write the {name} part ({type(error).__name__}: {error})") from error


def _save_onnx(made: torch.export.ExportedProgram, told: Mapping[str, Any], path: Path) -> None:
    """Write a program in ONNX, with the names that are told."""
    from onnx_ir import Shape

    inputs, outputs = ([each["name"] for each in told[side]] for side in ("inputs", "outputs"))
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(made, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
            assert program is not None, "it returns None for a file only"
            graph = program.model.graph
            for value, each in zip([*graph.inputs, *graph.outputs], [*told["inputs"], *told["outputs"]], strict=True):
                value.shape = Shape(each["shape"])
            program.save(path)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CutError(f"torch.onnx cannot write the {path.stem} part ({type(error).__name__}: {reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch.onnx prints and logs on its way."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def _described(made: torch.export.ExportedProgram, program: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a program takes and gives."""
    signature = made.graph_signature
    nodes = {node.name: node for node in made.graph.nodes}
    with torch.no_grad():
        returned = program(*given.values())
    inputs = [nodes[str(each)] for each in signature.user_inputs]
    outputs = [nodes[str(each)] for each in signature.user_outputs]
    return {
        "inputs": [_tensor(*pair) for pair in zip(given, inputs, strict=True)],
        "outputs": [_tensor(*pair) for pair in zip(returned, outputs, strict=True)],
    }


def _tensor(name: str, node: fx.Node) -> dict[str, Any]:
    """Return what is told of a tensor; of the sizes that vary the first is the batch, another the length of texts.

    torch.export may have several names for either: those of a mask and of what it hides need not be the same to it.
    """
    value, shape = node.meta["val"], list[int | str]()
    for dimension, size in enumerate(value.shape):
        known = constant(size)
        shape.append(known if known is not None else "length" if dimension else "batch")
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
