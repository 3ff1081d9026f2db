"""``python -m psl_flower.plan``: compare samplers on your clients before running anything."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psl_flower.checks import check_choice, check_int
from psl_flower.errors import ConfigError
from psl_flower.plan.measure import Epoch, plan_epoch, summarize_epochs
from psl_flower.plan.picture import save_picture
from psl_flower.plan.population import SPLITS, balanced_labels, read_labels, read_population, split_labels
from psl_flower.plan.table import format_table
from psl_flower.population import Population
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.dirichlet import LatentDirichletSampler
from psl_flower.samplers.registry import SAMPLERS, make_sampler
from psl_flower.stragglers.delays import DELAY_MODELS, delay_model

# the default app's stream for the split of training data (psl_flower.app.task): same seed, same split
_SPLIT_STREAM = (3, 0)
_REFERENCE = "ugs"
_RECOMMENDED = ("aligned:targets=stratified,tilt=0.1",)
_SEEDED_DELAYS = ("slow-fraction", "lognormal")

_DESCRIPTION = """\
Build the schedules that samplers would make for your clients, without training: print what an epoch under each would
be like (simulated time, deviation of the batches, clients a step) and draw it.
"""
_EXAMPLES = """\
examples:
  python -m psl_flower.plan --num-clients 64 --split severe
  python -m psl_flower.plan --dataset digits --num-clients 16 --split mild --batch-size 64
  python -m psl_flower.plan --delays lognormal:latency_sigma=0.5 --samplers ugs lds:delta=0.25 lds:delta=1
  python -m psl_flower.plan --sizes clients.csv --delays csv:path=delays.csv --batch-size 256
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 where an argument is refused."""
    options = _parser().parse_args(arguments)
    try:
        _compare(options)
    except ConfigError as exc:
        print(f"psl_flower.plan: {exc}", file=sys.stderr)
        return 2
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m psl_flower.plan",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("clients and data")
    data.add_argument(
        "--sizes", type=Path, metavar="CSV", help="client_id,size a line, or client_id and a column a class"
    )
    data.add_argument("--labels", type=Path, metavar="FILE", help=".npy, or text with a label a line; split as below")
    data.add_argument("--dataset", metavar="NAME", help="the default app's: digits, fashion-mnist, cifar10, cifar100")
    data.add_argument("--data-path", default="", metavar="DIR", help="where the dataset's files are, as in the app")
    data.add_argument("--num-clients", type=int, default=64, metavar="K", help="(default: 64)")
    data.add_argument("--num-examples", type=int, default=50_000, metavar="N", help="made-up labels (default: 50000)")
    data.add_argument("--num-classes", type=int, default=10, metavar="C", help="made-up labels (default: 10)")
    data.add_argument("--split", default="severe", choices=SPLITS, help="(default: severe)")
    data.add_argument("--classes-per-client", type=int, metavar="C", help="instead of 5 (mild) or 2 (severe)")
    data.add_argument("--alpha", type=float, help="evenness of a class over its holders (default: 3)")
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--delays",
        default="slow-fraction",
        metavar="MODEL[:OPTION=VALUE,...]",
        help=f"{', '.join(name for name in DELAY_MODELS if name != 'measured')} "
        "(default: slow-fraction, a tenth of the clients with 10 s a step instead of 1 s)",
    )
    plans = parser.add_argument_group("schedules")
    plans.add_argument(
        "--samplers",
        nargs="+",
        default=[*SAMPLERS, *_RECOMMENDED],
        metavar="NAME[:OPTION=VALUE,...]",
        help=f"{', '.join(SAMPLERS)} (default: all, and {', '.join(_RECOMMENDED)})",
    )
    plans.add_argument("--batch-size", type=int, default=128, metavar="B", help="(default: 128)")
    plans.add_argument("--epochs", type=int, default=1, help="epochs averaged over (default: 1)")
    plans.add_argument("--seeds", type=int, default=1, help="splits, delays and schedules averaged over (default: 1)")
    plans.add_argument("--seed", type=int, default=0, help="the first seed; its first epoch is drawn (default: 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("plan.png"), metavar="FILE", help="picture (default: plan.png)"
    )
    parser.add_argument(
        "--no-bound", action="store_true", help="skip the least time possible with a sampler's class targets"
    )
    parser.add_argument("--no-picture", action="store_true", help="print the table only")
    return parser


def _compare(options: argparse.Namespace) -> None:
    for name in ("epochs", "seeds"):
        check_int(getattr(options, name), f"--{name}", least=1)
    check_int(options.seed, "--seed", least=0)
    reference: list[float] = []  # UGS's epoch times
    runs: dict[str, list[Epoch]] = {}
    left_out: dict[str, None] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        population = _population(options, seed)
        if seed == options.seed:
            print(_describe(population, options))
        samplers = {spec: _sampler(spec, options, seed) for spec in options.samplers}
        for epoch in range(options.epochs):
            uniform = plan_epoch(_sampler(_REFERENCE, options, seed), population, epoch)
            reference.append(float(uniform.times.sum()))
            for spec, sampler in samplers.items():
                if sampler.needs_label_counts and population.label_counts is None:
                    left_out[spec] = None
                else:
                    bound = epoch == 0 and not options.no_bound
                    runs.setdefault(spec, []).append(plan_epoch(sampler, population, epoch, bound=bound))
    if not runs:
        raise ConfigError("none of the samplers can plan without knowing the clients' classes: give counts a class")
    print(format_table([summarize_epochs(spec, epochs, reference) for spec, epochs in runs.items()]))
    for spec in left_out:
        print(f"note: {spec} is left out, it needs the clients' classes")
    for warning in _warnings(runs, options):
        print(f"warning: {warning}")
    if not options.no_picture:
        save_picture(options.output, [(spec, epochs[0]) for spec, epochs in runs.items()], reference[0])
        print(f"picture: {options.output}")


def _sampler(spec: str, options: argparse.Namespace, seed: int) -> Sampler:
    name, sampler_options = parse_spec(spec)
    return make_sampler(name, options.batch_size, **{"seed": seed, **sampler_options})


def _population(options: argparse.Namespace, seed: int) -> Population:
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


def _labels(options: argparse.Namespace) -> NDArray[Any]:
    if options.labels:
        return read_labels(options.labels)
    if options.dataset:
        from psl_flower.app.datasets import SPECS, load_arrays  # takes a second to import: only those who use it pay

        return load_arrays(check_choice(options.dataset, "--dataset", SPECS), "train", options.data_path)[1]
    return balanced_labels(options.num_examples, options.num_classes)


def _describe(population: Population, options: argparse.Namespace) -> str:
    sizes = population.sizes
    classes = "" if population.label_counts is None else f", {population.label_counts.shape[1]} classes"
    split = "" if options.sizes else f", {options.split} split"
    split += f" of {options.dataset}" if options.dataset else ""
    return (
        f"{len(population)} clients with {sizes.min()}-{sizes.max()} of {population.num_examples} examples"
        f"{classes}{split}; delays {options.delays}; {options.seeds * options.epochs} epoch(s)"
    )


def _warnings(runs: dict[str, list[Epoch]], options: argparse.Namespace) -> list[str]:
    """Return what speaks against samplers beside the numbers."""
    found = []
    for spec, epochs in runs.items():
        starved = max((epoch.starved for epoch in epochs), key=len)
        if starved:
            worst = max(starved, key=lambda s: (s.longest, s.scarce))
            others = f", and so are {len(starved) - 1} more" if len(starved) > 1 else ""
            found.append(
                f"{spec}: {worst}{others}; a model may forget them: lower delta or tilt, shuffle the steps, or choose "
                f"another sampler"
            )
        sampler = _sampler(spec, options, options.seed)
        num_clients = len(epochs[0].plan.population)
        if isinstance(sampler, LatentDirichletSampler) and sampler.c * sampler.sample_size < num_clients:
            found.append(
                f"{spec}: c * sample_size is below the number of clients, {sampler.c * sampler.sample_size:g} for "
                f"{num_clients}: most clients are left out of most steps; raise sample_size"
            )
    return found
