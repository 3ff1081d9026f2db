"""Train with several samplers on the same skewed clients, and centralised on all data, and compare.

Everything runs in this process. See README.md for what to expect and for larger runs.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from psl_flower.app.experiment import OnEpoch, Progress, Training, train_in_process
from psl_flower.app.table import format_table, save_table
from psl_flower.app.task import central_test, load_images, make_model, make_optimizer
from psl_flower.config import DATASETS, MODELS, PARTITIONS, RunConfig
from psl_flower.errors import PSLError
from psl_flower.metrics import batch_deviation

CENTRALISED = "centralised"
# columns of the table, with digits
COLUMNS = {
    "accuracy %": 1,
    "last 3 epochs %": 1,
    "steps an epoch": 0,
    "smallest batch": 0,
    "deviation": 2,
    "deviation p95": 2,
}
# Okabe and Ito's colours, which differ for colour-blind eyes too
STYLES = {
    CENTRALISED: {"color": "#000000", "marker": "o", "linestyle": "--"},
    "ugs": {"color": "#0072B2", "marker": "s"},
    "fpls": {"color": "#E69F00", "marker": "^"},
    "fls": {"color": "#D55E00", "marker": "v"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = [*options.samplers, CENTRALISED]
    progress = Progress(len(names) * options.seeds * options.epochs)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        trainings: dict[str, list[Training]] = {name: [] for name in names}
        for seed in range(options.seeds):
            for name in names:
                on_epoch = progress.of(f"{name}, seed {seed}")
                trainings[name].append(train(name, seed, options, on_epoch))
    except PSLError as error:
        print(error, file=sys.stderr)
        return 2
    results = {name: [summary(training) for training in seeds] for name, seeds in trainings.items()}
    save_table(options.output, results, COLUMNS)
    save_picture(options.output / "comparison.png", trainings, options)
    print(f"{options.num_clients} clients, {options.partition} split of {options.dataset}, {options.seeds} seed(s)\n")
    print(format_table(results, COLUMNS))
    print(f"\nTable, picture and every run's metrics are in {options.output.resolve()}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--samplers", nargs="+", default=["fls", "fpls", "ugs"], choices=["fls", "fpls", "ugs"])
    result.add_argument("--dataset", default="digits", choices=DATASETS)
    result.add_argument(
        "--data-path", default="", help="folder with the dataset's files, if it shall not be downloaded"
    )
    result.add_argument("--partition", default="severe", choices=PARTITIONS, help="severe: two classes a client")
    result.add_argument("--num-clients", type=int, default=32)
    result.add_argument("--batch-size", type=int, default=64, help="examples in a step, over all clients")
    result.add_argument("--epochs", type=int, default=6)
    result.add_argument("--seeds", type=int, default=1, help="repetitions; with 2 or more, mean and standard deviation")
    result.add_argument("--model", default="cnn", choices=MODELS)
    result.add_argument("--learning-rate", type=float, default=0.02)
    result.add_argument("--momentum", type=float, default=0.9)
    result.add_argument("--threads", type=int, default=1, help="of torch")
    result.add_argument("--output", type=Path, default=Path("outputs/compare_samplers"), help="folder for the results")
    return result


def train(name: str, seed: int, options: argparse.Namespace, on_epoch: OnEpoch) -> Training:
    """Train once: split learning with a sampler, or centralised; all else is the same."""
    config = RunConfig(
        sampler="ugs" if name == CENTRALISED else name,
        seed=seed,
        batch_size=options.batch_size,
        num_server_rounds=options.epochs,
        evaluate_every=0,  # the whole model is tested on the server
        dataset=options.dataset,
        data_path=str(Path(options.data_path).expanduser().resolve()) if options.data_path else "",
        partition=options.partition,
        model=options.model,
        learning_rate=options.learning_rate,
        momentum=options.momentum,
        output_dir=str(options.output / "runs" / f"{name}-{seed}"),
    )
    if name == CENTRALISED:
        return train_centralised(config, on_epoch)
    return train_in_process(config, options.num_clients, on_epoch)


def train_centralised(config: RunConfig, on_epoch: OnEpoch) -> Training:
    """Train the uncut model on shuffled batches of everybody's data: plain PyTorch."""
    data, model, test = load_images(config, "train"), make_model(config), central_test(config)
    optimizer = make_optimizer(config, model.parameters())
    rng = np.random.default_rng(config.seed)
    pooled = np.bincount(data.targets)
    accuracy, steps = [], list[dict[str, Any]]()
    for epoch in range(config.num_server_rounds + 1):
        if epoch:
            for batch in np.array_split(rng.permutation(len(data)), -(-len(data) // config.batch_size)):
                images, labels = data.get_batch(batch)
                model.train()
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()
                deviation = batch_deviation([np.bincount(labels, minlength=len(pooled))], pooled)
                steps.append({"round": epoch, "batch_size": len(batch), "deviation": float(deviation[0])})
        accuracy.append(float(test(epoch, ArrayRecord(model.state_dict()))["accuracy"]))
        on_epoch(epoch, accuracy[-1])
    return Training(np.array(accuracy), [], steps)


def summary(training: Training) -> dict[str, float]:
    """Return a training's line of the table."""
    deviation = np.array([step["deviation"] for step in training.steps])
    return {
        "accuracy %": 100 * training.accuracy[-1],
        "last 3 epochs %": 100 * training.accuracy[1:][-3:].mean(),
        "steps an epoch": len(training.steps) / training.steps[-1]["round"],
        "smallest batch": min(step["batch_size"] for step in training.steps),
        "deviation": deviation.mean(),
        "deviation p95": np.percentile(deviation, 95),
    }


def save_picture(path: Path, trainings: Mapping[str, Sequence[Training]], options: argparse.Namespace) -> None:
    """Draw test accuracy after every epoch, and what the steps of one epoch are like."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    accuracy, deviation, size = figure.subplots(1, 3)
    for name, seeds in trainings.items():
        curves = 100 * np.array([training.accuracy for training in seeds])
        epochs, mean = np.arange(curves.shape[1]), curves.mean(axis=0)
        accuracy.plot(epochs, mean, label=label(name), ms=5, **STYLES[name])
        if len(seeds) > 1:
            spread = curves.std(axis=0, ddof=1)
            accuracy.fill_between(epochs, mean - spread, mean + spread, color=STYLES[name]["color"], alpha=0.15, lw=0)
        last = seeds[0].steps[-1]["round"]
        steps = [step for step in seeds[0].steps if step["round"] == last]
        for axes, key in ((deviation, "deviation"), (size, "batch_size")):
            along_epoch(axes, np.array([step[key] for step in steps]), STYLES[name])
    accuracy.set(title="Test accuracy after each epoch", xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102))
    deviation.set(title="Batch deviation along an epoch", xlabel="step", ylabel="L1 distance to the pooled classes")
    size.set(title="Batch size along an epoch", xlabel="step", ylabel="examples")
    for axes in (deviation, size):
        axes.set_ylim(0, None)
    for axes in (accuracy, deviation, size):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    setting = f"{options.num_clients} clients, {options.partition} split of {options.dataset}"
    figure.suptitle(f"{setting}, batches of {options.batch_size}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=len(trainings), frameon=False)
    figure.savefig(path, dpi=140)


def along_epoch(axes: Any, values: np.ndarray, style: Mapping[str, Any]) -> None:
    """Plot each step's value faintly, and the running mean over a twentieth of the epoch or so."""
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, ".", ms=3, color=style["color"], alpha=0.3)
    ones = np.ones(2 * (len(values) // 40) + 1)
    mean = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    axes.plot(steps, mean, lw=1.6, color=style["color"], linestyle=style.get("linestyle", "-"))


def label(name: str) -> str:
    """Return a name as it is usually written."""
    return name if name == CENTRALISED else name.upper()


if __name__ == "__main__":
    sys.exit(main())
