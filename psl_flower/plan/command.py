"""``psl-flower plan``: compare samplers on your clients before running anything."""

from __future__ import annotations

import ast
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import click
import numpy as np
import typer
from numpy.typing import NDArray

from psl_flower.checks import check_choice, check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.plan.measure import Epoch, plan_epoch, summarize_epochs
from psl_flower.plan.picture import save_picture
from psl_flower.plan.population import SPLITS, balanced_labels, read_labels, read_population, split_labels
from psl_flower.plan.table import format_table
from psl_flower.population import Population
from psl_flower.samplers.aligned import AlignedSampler
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.dirichlet import LatentDirichletSampler
from psl_flower.samplers.registry import SAMPLERS, make_sampler
from psl_flower.stragglers.delays import DELAY_MODELS, delay_model

# the default app's stream for the split of training data (psl_flower.app.task): same seed, same split
_SPLIT_STREAM = (3, 0)
_REFERENCE = "ugs"
_RECOMMENDED = ("aligned:targets=stratified,tilt=0.1",)
_SEEDED_DELAYS = ("slow-fraction", "lognormal")
_DELAYS = ", ".join(name for name in DELAY_MODELS if name != "measured")

app = typer.Typer(add_completion=False)


def _option(what: str, metavar: str, *names: str, panel: str = "Clients and data", **more: Any) -> Any:
    return typer.Option(*names, help=what, metavar=metavar, rich_help_panel=panel, **more)


@app.command(
    epilog="""Examples:

  psl-flower plan --num-clients 64 --split severe

  psl-flower plan --dataset digits --num-clients 16 --split mild --batch-size 64

  psl-flower plan ugs lds:delta=0.25 lds:delta=1 --delays lognormal:latency_sigma=0.5

  psl-flower plan --sizes clients.csv --delays csv:path=delays.csv --batch-size 256"""
)
def _plan(
    samplers: Annotated[list[str] | None, typer.Argument(metavar="SAMPLER:OPTION=VALUE,...")] = None,
    sizes: Annotated[Path | None, _option("client_id,size a line, or client_id and a column a class.", "CSV")] = None,
    labels: Annotated[Path | None, _option(".npy, or text with a label a line; split as below.", "FILE")] = None,
    dataset: Annotated[str, _option("The default app's: digits, fashion-mnist, cifar10, cifar100.", "NAME")] = "",
    data_path: Annotated[str, _option("Where the dataset's files are, as in the app.", "DIR")] = "",
    num_clients: Annotated[int, _option("How many, where no file says it.", "K")] = 64,
    num_examples: Annotated[int, _option("Made-up labels.", "N")] = 50_000,
    num_classes: Annotated[int, _option("Of made-up labels.", "C")] = 10,
    split: Annotated[
        str, _option("How they are split among clients.", "|".join(SPLITS), click_type=click.Choice(list(SPLITS)))
    ] = "severe",
    classes_per_client: Annotated[int | None, _option("Instead of 5 (mild) or 2 (severe).", "C")] = None,
    alpha: Annotated[float | None, _option("Evenness of a class over its holders; 3 unless given.", "A")] = None,
    delays: Annotated[
        str,
        _option(
            f"How slow clients are: {_DELAYS}, with options. The default has a tenth of the clients take 10 s a step, "
            "the others 1 s.",
            "MODEL:OPTION=VALUE,...",
            panel="Speed",
        ),
    ] = "slow-fraction",
    batch_size: Annotated[int, _option("Examples a step, over all clients.", "B", panel="Schedules")] = 128,
    epochs: Annotated[int, _option("Epochs averaged over.", "N", panel="Schedules")] = 1,
    seeds: Annotated[int, _option("Splits, delays and schedules averaged over.", "N", panel="Schedules")] = 1,
    seed: Annotated[int, _option("The first seed; its first epoch is drawn.", "N", panel="Schedules")] = 0,
    bound: Annotated[
        bool, _option("The least time possible with a sampler's class targets.", "", panel="Schedules")
    ] = True,
    output: Annotated[Path, _option("The picture.", "FILE", panel="Output")] = Path("plan.png"),
    picture: Annotated[bool, _option("Whether to draw it.", "", panel="Output")] = True,
    as_json: Annotated[bool, _option("Print JSON, for scripts.", "", "--json", panel="Output")] = False,
) -> None:
    """Build the schedules that samplers would make for your clients, without training.

    Prints what an epoch under each would be like (simulated time, deviation of
    the batches, clients a step), and draws it. Samplers are ugs, lds, lb,
    aligned, fls and fpls, each with options or without. Unless some are named,
    it takes all of them, and aligned:targets=stratified,tilt=0.1.
    """
    options = SimpleNamespace(**locals())
    options.samplers = samplers or [*SAMPLERS, *_RECOMMENDED]
    _compare(options)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Read ``name`` or ``name:option=value,option=value``; values are Python literals or plain text.

    Raises
    ------
    ConfigError
        If an option has no value, or is given twice.

    Examples
    --------
    >>> parse_spec("lds:delta=0.5,order=natural")
    ('lds', {'delta': 0.5, 'order': 'natural'})
    """
    name, _, rest = spec.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, text = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key in options:
            raise ConfigError(f"options are written name:option=value,option=value, each once, got {spec!r}")
        try:
            options[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[key] = text.strip()
    return name.strip(), options


def _compare(options: SimpleNamespace) -> None:
    for name in ("num_clients", "num_examples", "num_classes", "batch_size", "epochs", "seeds"):
        check_int(getattr(options, name), f"--{name.replace('_', '-')}", least=1)
    if options.classes_per_client is not None:
        check_int(options.classes_per_client, "--classes-per-client", least=1)
    if options.alpha is not None:
        check_float(options.alpha, "--alpha", above=0)
    if options.sizes and not (options.classes_per_client is None and options.alpha is None):
        raise ConfigError("--classes-per-client and --alpha shape a split, --sizes says who holds what: leave one out")
    check_int(options.seed, "--seed", least=0)
    reference: list[float] = []  # UGS's epoch times
    runs: dict[str, list[Epoch]] = {}
    left_out: dict[str, None] = {}
    about = ""
    for seed in range(options.seed, options.seed + options.seeds):
        population = _population(options, seed)
        about = about or _describe(population, options)
        samplers = {spec: _sampler(spec, options, seed) for spec in options.samplers}
        for epoch in range(options.epochs):
            uniform = plan_epoch(_sampler(_REFERENCE, options, seed), population, epoch)
            reference.append(float(uniform.times.sum()))
            for spec, sampler in samplers.items():
                if sampler.needs_label_counts and population.label_counts is None:
                    left_out[spec] = None
                else:
                    bound = epoch == 0 and options.bound
                    runs.setdefault(spec, []).append(plan_epoch(sampler, population, epoch, bound=bound))
    if not runs:
        raise ConfigError("none of the samplers can plan without knowing the clients' classes: give counts a class")
    if options.picture:
        save_picture(options.output, [(spec, epochs[0]) for spec, epochs in runs.items()], reference[0])
    summaries = [summarize_epochs(spec, epochs, reference) for spec, epochs in runs.items()]
    notes = [f"{spec} is left out, it needs the clients' classes" for spec in left_out]
    warnings = _warnings(runs, options)
    if options.as_json:
        found = {"about": about, "samplers": list(map(asdict, summaries)), "notes": notes, "warnings": warnings}
        print(json.dumps(found | {"picture": str(options.output) if options.picture else None}, indent=2))
        return
    print(about, format_table(summaries), *(f"note: {note}" for note in notes), sep="\n")
    for line in [f"warning: {warning}" for warning in warnings]:
        print(line)
    if options.picture:
        print(f"picture: {options.output}")


def _sampler(spec: str, options: SimpleNamespace, seed: int) -> Sampler:
    name, sampler_options = parse_spec(spec)
    sampler = make_sampler(name, options.batch_size, **{"seed": seed, **sampler_options})
    if sampler.clients_draw:
        raise ConfigError(f"plans that use each example once an epoch are compared, {spec} does not: leave it out")
    return sampler


def _population(options: SimpleNamespace, seed: int) -> Population:
    """Return the clients with their delays; splits and seeded delays follow the seed."""
    sources = [f"--{name}" for name in ("sizes", "labels", "dataset") if getattr(options, name)]
    if len(sources) > 1:
        raise ConfigError(f"one source must say who holds what, got {' and '.join(sources)}: leave one out")
    if options.sizes:
        clients = read_population(options.sizes)
    else:
        clients = split_labels(
            _labels(options),
            options.num_clients,
            options.split,
            np.random.default_rng(np.random.SeedSequence(seed, spawn_key=_SPLIT_STREAM)),
            classes_per_client=options.classes_per_client,
            alpha=options.alpha,
        )
    name, delay_options = parse_spec(options.delays)
    if name == "measured":
        raise ConfigError("measured delays come from a run, there is none here: choose another model")
    if name in _SEEDED_DELAYS:
        delay_options = {"seed": seed, **delay_options}
    delays = delay_model(name, **delay_options).delays(clients.client_ids)
    return Population(clients.client_ids, clients.sizes, clients.label_counts, delays)


def _labels(options: SimpleNamespace) -> NDArray[Any]:
    if options.labels:
        return read_labels(options.labels)
    if options.dataset:
        from psl_flower.app.datasets import SPECS, load_arrays  # takes a second to import: only those who use it pay

        return load_arrays(check_choice(options.dataset, "--dataset", SPECS), "train", options.data_path)[1]
    return balanced_labels(options.num_examples, options.num_classes)


def _describe(population: Population, options: SimpleNamespace) -> str:
    sizes = population.sizes
    classes = "" if population.label_counts is None else f", {population.label_counts.shape[1]} classes"
    split = "" if options.sizes else f", {options.split} split"
    split += f" of {options.dataset}" if options.dataset else ""
    epochs = options.seeds * options.epochs
    return (
        f"{len(population)} clients with {sizes.min()}-{sizes.max()} of {population.num_examples} examples"
        f"{classes}{split}; delays {options.delays}; {epochs} epoch{'s' * (epochs > 1)}"
    )


def _warnings(runs: dict[str, list[Epoch]], options: SimpleNamespace) -> list[str]:
    """Return what speaks against samplers beside the numbers."""
    found = []
    for spec, epochs in runs.items():
        sampler = _sampler(spec, options, options.seed)
        starved = max((epoch.starved for epoch in epochs), key=len)
        if starved:
            worst = max(starved, key=lambda s: (s.longest, s.scarce))
            others = f", and so are {len(starved) - 1} more" if len(starved) > 1 else ""
            found.append(f"{spec}: {worst}{others}; a model may forget them: {_remedy(sampler)}")
        num_clients = len(epochs[0].plan.population)
        if isinstance(sampler, LatentDirichletSampler) and sampler.c * sampler.sample_size < num_clients:
            found.append(
                f"{spec}: c * sample_size is below the number of clients, {sampler.c * sampler.sample_size:g} for "
                f"{num_clients}: most clients are left out of most steps; raise sample_size"
            )
    return found


def _remedy(sampler: Sampler) -> str:
    """Return what helps a sampler whose schedule keeps classes away: one of its own options, or else another one."""
    remedies = ["lower its delta"] if isinstance(sampler, LatentDirichletSampler) and sampler.delta else []
    remedies += ["lower its tilt"] if isinstance(sampler, AlignedSampler) and sampler.tilt else []
    remedies += ["shuffle its steps, order=shuffled"] if getattr(sampler, "order", "") == "natural" else []
    return ", or ".join([*remedies, f"choose another sampler, such as {_REFERENCE}"])
