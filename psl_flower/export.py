"""``psl-flower export``: the parts of a trained model as programs, for a device and a server."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import click
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from psl_flower import checkpoint
from psl_flower.app.datasets import SPECS
from psl_flower.app.task import cut_of, make_model
from psl_flower.checkpoint import Checkpoints
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.split import Cut, SplitModel, cut_model, export_halves, input_names
from psl_flower.split.place import example_of
from psl_flower.split.programs import FORMATS, INDEX
from psl_flower.strategy.recorder import CONFIG_FILE, MODEL_FILE

app = typer.Typer(add_completion=False)

_EXAMPLE = re.compile(r"(\w+)=(\d+(?:,\d+)*)(?::(\w+))?")


@app.command(
    epilog="""Examples:

  psl-flower export outputs

  psl-flower export outputs --format onnx --output device

  psl-flower export outputs --model my_app.task:Net --example x=2,3,32,32

  psl-flower export outputs/checkpoints/round-00002-step-0000045.safetensors"""
)
def _export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output_dir, or one of its checkpoints.")],
    model: Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="Makes the model; the default app's is known.")
    ] = "",
    cut: Annotated[str, typer.Option(metavar="NAME", help="First module on the server; the run's.")] = "",
    tail: Annotated[str, typer.Option(metavar="NAME", help="First module back on the client; the run's.")] = "",
    examples: Annotated[
        list[str] | None,
        typer.Option("--example", metavar="INPUT=SIZES[:DTYPE]", help="An input of the model, two rows or more."),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            click_type=click.Choice(FORMATS),
            help="pt2 unless given; may be repeated.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where they go; RUN's folder, parts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is in parts.json, for scripts.")] = False,
) -> None:
    """Write the parts of a trained model as programs: one for the device, one for the server.

    Each loads without this package and the model's code: .pt2 with
    torch.export.load, .onnx with onnxruntime. parts.json has the names, dtypes
    and shapes of what they take and give, and so of what crosses.
    """
    trained = find(run)
    whole, name, example = _model(trained, model, cut)
    for spec in examples or ():
        example |= _tensor(spec)
    if not example:
        inputs = ", ".join(input_names(cut_model(whole, name or None, tail or trained.tail or None).client))
        raise ConfigError(f"give the sizes of the model's inputs ({inputs}), as in --example x=2,3,32,32")
    _load(whole, trained)
    where = Cut(name, example=example or None)
    folder = output or trained.folder / "parts"
    files = export_halves(whole, folder, where, tail or trained.tail or None, tuple(formats or FORMATS[:1]))
    if as_json:
        print((folder / INDEX).read_text(), end="")
        return
    for path in [*files, folder / INDEX]:
        print(f"{path}  {path.stat().st_size:,} bytes")


@dataclass(frozen=True)
class Trained:
    """What a run has left.

    Parameters
    ----------
    folder : Path
        Of the run.
    state : dict of str to Tensor
        The model's, or what trained of it.
    cut, tail : str
        Where it was cut; empty for a model that was cut by hand.
    config : dict
        The run's configuration.
    """

    folder: Path
    state: Mapping[str, Tensor]
    cut: str
    tail: str
    config: Mapping[str, Any]


def find(run: Path) -> Trained:
    """Return what a run has left in its folder: its model, or of one that did not end its last checkpoint.

    Parameters
    ----------
    run : Path
        The folder, or a checkpoint.

    Raises
    ------
    ConfigError
        If there is neither.
    """
    if run.is_dir() and (run / MODEL_FILE).is_file():
        try:
            state, config = load_file(run / MODEL_FILE), json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{run} must hold {MODEL_FILE} and {CONFIG_FILE} of a run: {error}") from error
        own = config.get("strategy", {})
        config = {name: value for name, value in config.items() if name not in ("strategy", "changes")}
        return Trained(run, state, own.get("cut") or "", own.get("tail") or "", config)
    if not run.exists():
        raise ConfigError(f"there is no run in {run}: name the output folder of one, or a checkpoint")
    path = run
    if run.is_dir():
        found = Checkpoints(run / checkpoint.FOLDER, 1).latest()
        if found is None:
            raise ConfigError(
                f"{run} must hold the {MODEL_FILE} of a run, or its {checkpoint.FOLDER}: there is neither"
            )
        path = found[0]
    saved = checkpoint.read(path)
    own = saved["settings"]
    return Trained(
        path.parent.parent, saved["trainer"]["state"], own["cut"] or "", own["tail"] or "", own["run_config"]
    )


def _model(trained: Trained, named: str, cut: str) -> tuple[nn.Module, str, dict[str, Tensor]]:
    """Return the model as it is built, where it is cut, and an example batch as far as it is known."""
    if named:
        sys.path.insert(0, "")  # as python -m has it
        module, _, attribute = named.partition(":")
        try:
            function = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"--model {named!r} cannot be imported ({error}): write package.module:function"
            ) from error
        try:
            model = function()
        except TypeError as error:
            raise ConfigError(f"--model {named!r} must be a function that needs no argument: {error}") from error
        if not isinstance(model, nn.Module):
            raise ConfigError(f"--model {named!r} must return the model, an nn.Module, got {model!r:.80}")
        name = cut or trained.cut
        if not name and not isinstance(model, SplitModel):
            raise ConfigError(
                "the run does not say where its model was cut: name the first module on the server, --cut"
            )
        return model, name, dict(example_of(model, name) or {})
    try:
        config = RunConfig.read(trained.config)
        if not {"model", "dataset"} <= trained.config.keys():
            raise ConfigError("it has no model and dataset of the default app")
    except ConfigError as error:
        raise ConfigError(
            f"the model of {trained.folder} is not known ({error}): name the function that makes it, "
            "--model package.module:function"
        ) from error
    model, name = make_model(config), cut or trained.cut or cut_of(config)
    inputs = input_names(cut_model(model, name).client)
    return model, name, {inputs[0]: torch.zeros(2, *SPECS[config.dataset].shape)}


def _tensor(spec: str) -> dict[str, Tensor]:
    """Return an input that is named with its sizes."""
    found = _EXAMPLE.fullmatch(spec)
    dtype = getattr(torch, (found and found[3]) or "float32", None)
    if found is None or not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--example must be like x=2,3,32,32 or input_ids=2,8:int64, got {spec!r}")
    return {found[1]: torch.zeros([int(size) for size in found[2].split(",")], dtype=dtype)}


def _load(model: nn.Module, trained: Trained) -> None:
    """Load what was trained; what the run did not keep is as the model has it, for it was frozen."""
    own, frozen = model.state_dict(keep_vars=True), {id(p) for p in model.parameters() if not p.requires_grad}
    missing = [n for n, t in own.items() if n not in trained.state and id(t) not in frozen]
    if wrong := [*missing, *(n for n in trained.state if n not in own)]:
        where = "missing in the run" if wrong[0] in own else "not in the model"
        raise ConfigError(
            f"the model must be that of {trained.folder}: {len(wrong)} names of its state differ, {wrong[0]!r} is "
            f"{where}"
        )
    try:
        model.load_state_dict(dict(trained.state), strict=False)
    except RuntimeError as error:
        raise ConfigError(f"the model must be that of {trained.folder}: {error}") from error
