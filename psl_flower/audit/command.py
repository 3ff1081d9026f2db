"""``psl-flower audit``: attack what the server receives of the default app's models and data, and report what leaks."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from psl_flower.app.datasets import SPECS
from psl_flower.app.models import build_model
from psl_flower.app.task import load_images, make_optimizer
from psl_flower.audit.attacks import ACTIVE, ATTACKS
from psl_flower.audit.auditing import audit
from psl_flower.audit.preset import read_preset
from psl_flower.audit.quiet import quietly
from psl_flower.audit.rehearsal import prepared
from psl_flower.audit.report import JSON_FILE, save_report
from psl_flower.audit.target_epsilon import TargetEpsilon
from psl_flower.checks import check_int, writing_to
from psl_flower.config import RunConfig
from psl_flower.errors import CutError
from psl_flower.machine import machine
from psl_flower.presets import elsewhere, preset_names
from psl_flower.privacy import parse_defences
from psl_flower.split.model import cut_model

app = typer.Typer(add_completion=False)

_ATTACKS = (*ATTACKS, *ACTIVE)
_OF_MODEL = {"TargetEpsilon": TargetEpsilon}


def _presets(begun: str) -> list[str]:
    return [name for name in preset_names("audit") if name.startswith(begun)]


def _attacks(begun: str) -> list[str]:
    return [name for name in _ATTACKS if name.startswith(begun)]


def _list(wanted: bool) -> None:
    if wanted:
        names = preset_names("audit")
        width = max(map(len, names))
        print(*(f"{name:{width}}   {read_preset(name).title}" for name in names), elsewhere("audit"), sep="\n")
        raise typer.Exit


def _option(what: str, metavar: str, *names: str, panel: str = "Training", **more: Any) -> Any:
    return typer.Option(*names, help=what, metavar=metavar, rich_help_panel=panel, **more)


@app.command(
    epilog="""Examples:

  psl-flower audit

  psl-flower audit --cut stage2 --cut head --defences none --defences "GaussianNoise(0.5)" --seeds 3

  psl-flower audit --cut stage2 --tail head --secure-aggregation

  psl-flower audit cifar10 --data-path ~/data/cifar10"""
)
def _audit(
    ctx: typer.Context,
    preset: Annotated[str, typer.Argument(metavar="PRESET", autocompletion=_presets)] = "digits",
    listed: Annotated[
        bool, _option("List the presets.", "", "--list", panel="Output", callback=_list, is_eager=True)
    ] = False,
    data_path: Annotated[str, _option("Where the dataset's files are, as in the app.", "DIR")] = "",
    examples: Annotated[int | None, _option("Training examples used, at most; the preset's.", "N")] = None,
    model: Annotated[str, _option("The default app's; the preset's.", "NAME")] = "",
    cuts: Annotated[list[str] | None, _option("First module on the server; the preset's.", "NAME", "--cut")] = None,
    tail: Annotated[str, _option("First module that is back on the clients, where labels stay then.", "NAME")] = "",
    secure_aggregation: Annotated[bool, _option("Clients mask their sums.", "", "--secure-aggregation")] = False,
    defences: Annotated[
        list[str] | None,
        _option(
            "Of the clients, as the key of the default app takes them, or none; TargetEpsilon(8): DP-SGD of the model.",
            "DEFENCES",
            "--defences",
        ),
    ] = None,
    num_clients: Annotated[int | None, _option("How many, half of them the attacker's; the preset's.", "K")] = None,
    rounds: Annotated[int | None, _option("Of training; the last is attacked. The preset's.", "N")] = None,
    batch_size: Annotated[int | None, _option("Examples a step, over all clients; the preset's.", "B")] = None,
    learning_rate: Annotated[float | None, _option("Of SGD; the preset's.", "RATE")] = None,
    attacks: Annotated[
        list[str] | None,
        _option(
            f"{', '.join(_ATTACKS[:-1])} or {_ATTACKS[-1]}; the preset's, or all.",
            "NAME",
            "--attack",
            panel="Attacks",
            autocompletion=_attacks,
        ),
    ] = None,
    seeds: Annotated[
        int | None, _option("Trainings of each cut with each of the defences; the preset's.", "N", panel="Attacks")
    ] = None,
    output: Annotated[Path, _option("Where the report goes.", "DIR", panel="Output")] = Path("outputs/audit"),
    as_json: Annotated[bool, _option("Print JSON, for scripts.", "", "--json", panel="Output")] = False,
) -> None:
    """Measure what a curious server learns from what crosses a cut.

    Trains a model split at each cut, with and without defences, records what
    the server sends and receives, and attacks it: how well are inputs
    reconstructed, labels inferred, members recognised? PRESET is a name that
    --list shows. Options that are named twice are compared. docs/audit.md says
    how to read the report, docs/privacy.md what not to conclude from it.
    """
    given = read_preset(preset)
    seeds = check_int(given.seeds if seeds is None else seeds, "--seeds", least=1)
    config = RunConfig(
        dataset=given.dataset,
        data_path=str(Path(data_path).expanduser().resolve()) if data_path else "",
        model=model or given.model,
        learning_rate=given.learning_rate if learning_rate is None else learning_rate,
        momentum=given.momentum,
        augment="none",  # what is reconstructed is compared with what is in the data
    )
    with quietly(logging.WARNING), _folder(output):  # the runs' own log
        found = audit(
            partial(_model, config),
            load_images(config, "train"),
            load_images(config, "test"),
            cuts=cuts or _fitting(given.cuts, _model(config, 0), tail or None),
            tail=tail or None,
            defences={
                spec: () if spec == "none" else parse_defences(spec, _OF_MODEL) for spec in defences or given.defences
            },
            attacks=attacks or given.attacks or None,
            num_clients=given.num_clients if num_clients is None else num_clients,
            num_rounds=given.rounds if rounds is None else rounds,
            batch_size=given.batch_size if batch_size is None else batch_size,
            optimizer=partial(make_optimizer, config),
            secure_aggregation=secure_aggregation,
            examples=given.examples if examples is None else examples,
            seeds=range(seeds),
        )
    found.settings.update(model=config.model, dataset=config.dataset, command=shlex.join(["psl-flower", *ctx.obj]))
    found.settings.update(machine())
    paths = save_report(found, output)
    if as_json:
        print((output / JSON_FILE).read_text(encoding="utf-8"), end="")
    else:
        print(found.markdown(), *paths, sep="\n")


@contextmanager
def _folder(output: Path) -> Iterator[None]:
    """Make the report's folder before what takes long; what is refused leaves none."""
    with writing_to(output, "--output"):
        output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # something is in it
            output.rmdir()
        raise


def _fitting(cuts: Sequence[str], model: nn.Module, tail: str | None) -> Sequence[str]:
    """Return those of a preset's cuts that leave the server something, with a tail; all, if none does."""
    fitting = []
    for cut in cuts:
        try:
            cut_model(prepared(model, cut, tail), cut, tail)
        except CutError:
            continue
        fitting.append(cut)
    return fitting or cuts


def _model(config: RunConfig, seed: int) -> nn.Module:
    spec = SPECS[config.dataset]
    return build_model(config.model, in_channels=spec.shape[0], num_classes=spec.num_classes, seed=seed)
