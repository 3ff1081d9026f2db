"""Train under stragglers with samplers that know about them and one that does not, and compare by simulated time.

A virtual clock says how long every step would have taken; nobody waits. Everything runs in this process. See README.md
for what to expect and for larger runs.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from psl_flower.app.datasets import load_arrays
from psl_flower.app.experiment import Progress, Training, train_in_process
from psl_flower.app.table import format_table, save_table
from psl_flower.app.task import split_indices
from psl_flower.config import DATASETS, MODELS, RunConfig
from psl_flower.errors import PSLError

REFERENCE = "UGS"
# what to train with, as keys of the default app's configuration
RUNS: dict[str, dict[str, Any]] = {
    REFERENCE: {"sampler": "ugs"},
    "LDS": {"sampler": "lds"},
    "LB": {"sampler": "lb"},
    "Aligned": {"sampler": "aligned"},
    "Aligned, tilt 0.1": {"sampler": "aligned", "sampler_targets": "stratified", "sampler_tilt": 0.1},
}
# Okabe and Ito's colours, which differ for colour-blind eyes too
STYLES = {
    REFERENCE: {"color": "#0072B2", "marker": "s"},
    "LDS": {"color": "#D55E00", "marker": "v"},
    "LB": {"color": "#E69F00", "marker": "^", "linestyle": "--", "zorder": 3},  # often on top of Aligned
    "Aligned": {"color": "#009E73", "marker": "o"},
    "Aligned, tilt 0.1": {"color": "#CC79A7", "marker": "D"},
}
# columns of the table, with digits
COLUMNS = {
    "accuracy %": 1,
    "epoch (min)": 2,
    "vs UGS": 2,
    "deviation": 2,
    "deviation p95": 2,
    "target (min)": 1,
    "target vs UGS": 2,
}
BELOW_REFERENCE = 0.5  # points: the target is UGS's accuracy over the last epochs, minus this
LAST_EPOCHS = 3
SLOW_CLASSES = (0, 1)  # in the worst case, the stragglers are all who hold one of these


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = [REFERENCE, *(name for name in RUNS if name in options.samplers and name != REFERENCE)]
    progress = Progress(len(names) * options.seeds * options.epochs)
    options.output.mkdir(parents=True, exist_ok=True)
    trainings: dict[str, list[Training]] = {name: [] for name in names}
    try:
        for seed in range(options.seeds):
            for name in names:
                config = configuration(name, seed, options)
                on_epoch = progress.of(f"{name}, seed {seed}")
                trainings[name].append(train_in_process(config, options.num_clients, on_epoch))
    except PSLError as error:
        print(error, file=sys.stderr)
        return 2
    results = summaries(trainings)
    save_table(options.output, results, COLUMNS)
    save_picture(options.output / "stragglers.png", trainings, results, options)
    print(f"{setting(options)}, {options.seeds} seed(s)\n")
    print(format_table(results, COLUMNS))
    print(f"\nTable, picture and every run's metrics are in {options.output.resolve()}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--samplers", nargs="+", default=list(RUNS), choices=list(RUNS), help="beside UGS")
    result.add_argument("--fraction", type=float, default=0.1, help="share of slow clients")
    result.add_argument("--factor", type=float, default=10.0, help="how many times as long a slow client takes")
    result.add_argument(
        "--worst-case", action="store_true", help="the slow clients are all who hold two of the classes"
    )
    result.add_argument("--dataset", default="digits", choices=DATASETS)
    result.add_argument(
        "--data-path", default="", help="folder with the dataset's files, if it shall not be downloaded"
    )
    result.add_argument("--num-clients", type=int, default=32)
    result.add_argument("--batch-size", type=int, default=64, help="examples in a step, over all clients")
    result.add_argument("--epochs", type=int, default=8)
    result.add_argument("--seeds", type=int, default=1, help="repetitions; with 2 or more, mean and standard deviation")
    result.add_argument("--model", default="cnn", choices=MODELS)
    result.add_argument("--learning-rate", type=float, default=0.003, help="low, for digits are learned too soon")
    result.add_argument("--momentum", type=float, default=0.9)
    result.add_argument("--threads", type=int, default=1, help="of torch")
    result.add_argument("--output", type=Path, default=Path("outputs/stragglers"), help="folder for the results")
    return result


def configuration(name: str, seed: int, options: argparse.Namespace) -> RunConfig:
    """Return the configuration of one training: two classes a client, and a second a step for a fast client."""
    common: dict[str, Any] = {
        "seed": seed,
        "batch_size": options.batch_size,
        "num_server_rounds": options.epochs,
        "evaluate_every": 0,  # the whole model is tested on the server
        "dataset": options.dataset,
        "data_path": str(Path(options.data_path).expanduser().resolve()) if options.data_path else "",
        "partition": "severe",
        "model": options.model,
        "learning_rate": options.learning_rate,
        "momentum": options.momentum,
        "output_dir": str(options.output / "runs" / f"{name}-{seed}"),
    }
    if options.worst_case:
        path = options.output / f"delays-{seed}.csv"
        write_worst_case(path, RunConfig(**common), options)
        delays = {"delays": "csv", "delays_path": str(path.resolve())}
    else:
        delays = {
            "delays": "slow-fraction",
            "delays_fraction": options.fraction,
            "delays_latency_factor": options.factor,
        }
    return RunConfig(**common, **delays, **RUNS[name])


def write_worst_case(path: Path, config: RunConfig, options: argparse.Namespace) -> None:
    """Write delays with which all holders of some classes are slow, so that these classes only come slowly."""
    _, labels = load_arrays(config.dataset, "train", config.data_path)
    holdings = split_indices(config, "train", options.num_clients)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["client_id", "latency", "per_sample"])
        for client, indices in enumerate(holdings):
            slow = np.isin(labels[indices], SLOW_CLASSES).any()
            writer.writerow([client, options.factor if slow else 1.0, 0.0])


def summaries(trainings: Mapping[str, Sequence[Training]]) -> dict[str, list[dict[str, float]]]:
    """Return the lines of the table: times in simulated minutes, and compared with UGS on the same clients."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in trainings}
    for seed, reference in enumerate(trainings[REFERENCE]):
        goal = target(reference)
        reference_to_goal = time_to(goal, reference)
        for name, seeds in trainings.items():
            training = seeds[seed]
            minutes, to_goal = minutes_of(training), time_to(goal, training)
            results[name].append(
                {
                    "accuracy %": 100 * last_epochs(training),
                    "epoch (min)": minutes[-1] / (len(minutes) - 1),
                    "vs UGS": minutes[-1] / minutes_of(reference)[-1],
                    "deviation": np.mean([record["deviation_mean"] for record in training.rounds]),
                    "deviation p95": np.mean([record["deviation_p95"] for record in training.rounds]),
                    "target (min)": to_goal,
                    "target vs UGS": to_goal / reference_to_goal,
                }
            )
    return results


def minutes_of(training: Training) -> np.ndarray:
    """Return the simulated minutes before training and after every epoch, (epochs + 1,)."""
    return np.cumsum([0.0, *(record["seconds_simulated"] for record in training.rounds)]) / 60


def target(reference: Training) -> float:
    """Return the accuracy that everybody should reach."""
    return last_epochs(reference) - BELOW_REFERENCE / 100


def last_epochs(training: Training) -> float:
    """Return the mean accuracy after each of the last epochs."""
    return float(training.accuracy[1:][-LAST_EPOCHS:].mean())


def time_to(goal: float, training: Training) -> float:
    """Return the simulated minutes until the accuracy first reaches the goal, between epochs on a line; or NaN."""
    reached = np.flatnonzero(training.accuracy >= goal)
    if not len(reached) or not reached[0]:
        return float("nan")
    span = slice(reached[0] - 1, reached[0] + 1)
    return float(np.interp(goal, training.accuracy[span], minutes_of(training)[span]))


def setting(options: argparse.Namespace) -> str:
    """Return what was trained on, in words."""
    slow = "all holders of two classes" if options.worst_case else f"{options.fraction:.0%} of the clients"
    return f"{options.num_clients} clients, severe split of {options.dataset}; {slow} {options.factor:g} times slower"


def save_picture(
    path: Path,
    trainings: Mapping[str, Sequence[Training]],
    results: Mapping[str, Sequence[Mapping[str, float]]],
    options: argparse.Namespace,
) -> None:
    """Draw accuracy against simulated time and against epochs, and what an epoch costs against how its batches are."""
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    by_time, by_epoch, trade_off = figure.subplots(1, 3)
    goal = 100 * np.mean([target(training) for training in trainings[REFERENCE]])
    for name, seeds in trainings.items():
        curves = 100 * np.array([training.accuracy for training in seeds])
        mean, color = curves.mean(axis=0), STYLES[name]["color"]
        minutes = np.mean([minutes_of(training) for training in seeds], axis=0)
        for axes, x in ((by_time, minutes), (by_epoch, np.arange(len(mean)))):
            axes.plot(x, mean, ms=5, label=name, **STYLES[name])
            if len(seeds) > 1:
                spread = curves.std(axis=0, ddof=1)
                axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
        point = [np.mean([line[column] for line in results[name]]) for column in ("vs UGS", "deviation")]
        trade_off.plot(*point, ms=10, mfc="none", mew=2.2, **STYLES[name] | {"linestyle": ""})
    for axes in (by_time, by_epoch):
        axes.axhline(goal, color="#444444", lw=1, ls=":")
        axes.set(ylim=(max(0, goal - 20), 100), ylabel="test accuracy (%)")
        axes.yaxis.set_major_locator(MultipleLocator(5))
    by_time.annotate(
        f"UGS \N{MINUS SIGN} {BELOW_REFERENCE}",
        (1, goal),
        (0, -3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color="#444444",
    )
    by_time.set(title="Accuracy against simulated time", xlabel="simulated time (min)", xlim=(0, None))
    by_epoch.set(title="Accuracy against epochs", xlabel="epoch", xlim=(0, None))
    trade_off.set(
        title="Cost and quality of an epoch",
        xlabel="epoch time (UGS = 1)",
        ylabel="mean batch deviation (L1)",
        xlim=(0, 1.08),
        ylim=(0, None),
    )
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    for axes in (by_time, by_epoch, trade_off):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(setting(options), fontsize=11)
    figure.legend(*by_time.get_legend_handles_labels(), loc="outside lower center", ncols=len(trainings), frameon=False)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    sys.exit(main())
