"""What simulating all clients of a step in one pass costs, against plain centralised training on the same batches.

An epoch of `psl_flower.experiments` (planning, drawing, training, bookkeeping; without the test) is timed against a
bare training loop that is handed the same batches, rows and augmentation already on the device, and, where asked,
against an epoch of the split run on an InProcessGrid. All in turns, several times; the medians are compared.

    python tests/bench/bench_vectorised.py                                  # digits, CPU
    python tests/bench/bench_vectorised.py --dataset cifar10 --data-path FOLDER --model resnet18 --device cuda
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from psl_flower.app.experiment import train_in_process
from psl_flower.app.images import Shifts, draw_shifts
from psl_flower.app.task import make_model, make_optimizer
from psl_flower.config import DATASETS, MODELS, RunConfig
from psl_flower.experiments import Setting, Training
from psl_flower.experiments.algorithms.pooled import ParallelSplit
from psl_flower.experiments.data import Data, load_data
from psl_flower.records import RoundRecord


def vectorised(setting: Setting, data: Data) -> tuple[float, RoundRecord]:
    """Return the seconds of an epoch, and its record."""
    training = Training(setting, data, make_model(setting.config))
    training.evaluate = dict  # type: ignore[method-assign]
    begin = now(data.train.device)
    *_, record = training.records()
    return now(data.train.device) - begin, record


def plain(setting: Setting, data: Data) -> float:
    """Return the seconds of a bare loop over the same batches."""
    device, model = data.train.device, make_model(setting.config).to(data.train.device)
    schedule = ParallelSplit(setting, data, model).schedule(0)
    rows = torch.from_numpy(schedule.rows).to(device).split(schedule.plan.batch_sizes().tolist())
    shifts = [Shifts(*(t.to(device) for t in draw_shifts(len(r)))) if data.augmented else None for r in rows]
    optimizer = make_optimizer(setting.config, model.parameters())
    model.train()
    begin = now(device)
    for some, how in zip(rows, shifts, strict=True):
        inputs, targets = data.train.batch(some, how)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return now(device) - begin


def split(setting: Setting) -> float:
    """Return the seconds of an epoch in the split run, connecting and the central test included."""
    device = torch.device(setting.config.device)
    with TemporaryDirectory() as folder:
        config = replace(setting.config, output_dir=folder, keep_checkpoints=0, evaluate_every=0)
        begin = now(device)
        train_in_process(config, setting.num_clients)
        return now(device) - begin


def now(device: torch.device) -> float:
    """Return the time: on the CPU this process's own, as on an idle machine; on a GPU, when its work is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", choices=DATASETS)
    parser.add_argument("--data-path", default="")
    parser.add_argument("--model", default="cnn", choices=MODELS)
    parser.add_argument("--augment", default="crop-flip")
    parser.add_argument("--examples", type=int, default=0)
    parser.add_argument("--partition", default="severe")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--samplers", nargs="*", default=["ugs", "fls"])
    parser.add_argument("--clients", type=int, nargs="*", default=[16, 128, 1000])
    parser.add_argument("--split-up-to", type=int, default=0, help="clients of the largest split run to time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    print(f"{options.dataset}, {options.model}, {options.device}, torch {torch.__version__}")
    print("sampler  clients  steps    plan vectorised   plain  ratio    split")
    for num_clients in options.clients:
        for sampler in options.samplers:
            setting = make_setting(options, sampler, num_clients)
            data, records = load_data(setting), list[RoundRecord]()

            def ours(setting: Setting = setting, data: Data = data, records: list[RoundRecord] = records) -> float:
                seconds, record = vectorised(setting, data)
                records.append(record)
                return seconds

            runs: list[Callable[[], float]] = [ours, lambda s=setting, d=data: plain(s, d)]
            if num_clients <= options.split_up_to:
                runs.append(lambda s=setting: split(s))
            for run in runs[:2]:
                run()  # warm up
            times = list(zip(*([run() for run in runs] for _ in range(options.repeats)), strict=True))
            seconds = [statistics.median(t) for t in times]
            split_text = f"{seconds[2]:7.2f}s" if len(seconds) > 2 else "-"
            print(
                f"{sampler:8} {num_clients:7d} {records[-1].num_steps:6d} {records[-1].seconds_plan:6.2f}s "
                f"{seconds[0]:9.2f}s {seconds[1]:6.2f}s {seconds[0] / seconds[1]:6.2f} {split_text:>8}",
                flush=True,
            )


def make_setting(options: argparse.Namespace, sampler: str, num_clients: int) -> Setting:
    config = RunConfig(
        num_server_rounds=1,
        dataset=options.dataset,
        data_path=options.data_path and str(Path(options.data_path).expanduser().resolve()),
        model=options.model,
        augment=options.augment,
        partition=options.partition,
        sampler=sampler,
        batch_size=options.batch_size,
        device=options.device,
    )
    return Setting(config=config, num_clients=num_clients, examples=options.examples)


if __name__ == "__main__":
    main()
