"""Training in one process, all clients of a step in one pass: the engine under every algorithm of an experiment."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from psl_flower.app.images import Shifts
from psl_flower.app.task import make_model
from psl_flower.errors import DivergenceError
from psl_flower.experiments.algorithms import ALGORITHM_CLASSES
from psl_flower.experiments.data import Data, load_data
from psl_flower.experiments.draws import draw_all
from psl_flower.experiments.schedule import Schedule
from psl_flower.experiments.setting import Setting
from psl_flower.precision import computing
from psl_flower.records import RoundRecord, StepRecord
from psl_flower.server import run_on_batch
from psl_flower.strategy.epoch import Epoch
from psl_flower.strategy.recorder import RunRecorder
from psl_flower.typing import FloatArray, IntArray

# Steps between two looks at what the device has computed: a look at a GPU waits for it, on the CPU it costs nothing.
_STEPS_A_LOOK, _STEPS_A_LOOK_CPU = 50, 8
_TEST_BATCH = 1000  # examples in one forward pass of the test, as in the default app's


def open_training(setting: Setting) -> Training:
    """Load a setting's data and model, ready to train.

    Raises
    ------
    ConfigError
        If the data cannot be had, is less than a batch or cannot be split, or the model cannot be cut there.
    """
    return Training(setting, load_data(setting), make_model(setting.config))


class Training:
    """Trains a model and says how it goes, as `ParallelSplitLearning` does but without clients and messages.

    Parameters
    ----------
    setting : Setting
    data : Data
        On the device to train on.
    model : nn.Module
        With its first weights; changed in place, and moved to that device. It must draw no random numbers: no dropout.

    Attributes
    ----------
    model : nn.Module
        The whole model.
    """

    def __init__(self, setting: Setting, data: Data, model: nn.Module) -> None:
        if setting.double:
            model = model.double()
        memory_format = torch.channels_last if setting.channels_last else torch.preserve_format
        self.model: nn.Module = model.to(data.train.device, memory_format=memory_format)  # type: ignore[call-overload]
        self._setting, self._data, self._device = setting, data, data.train.device
        self._algorithm = ALGORITHM_CLASSES[setting.algorithm](setting, data, self.model)
        self._records = (r for e in range(setting.config.num_server_rounds) for r in self._train_round(e))

    # --- training ----------------------------------------------------------------------------------------------------
    def records(self) -> Iterator[StepRecord | RoundRecord]:
        """Train for the configured number of rounds while being read; a second reader goes on where the first stopped.

        Returns
        -------
        iterator of StepRecord and RoundRecord
            Every step, some dozens at a time: looking at each would make a GPU wait. `seconds_real` is their mean. What
            a step is, the docstring of the algorithm's class says. Nothing is sent, so there are no bytes. A round's
            record comes after its last step's, with `evaluate` as its `evaluate_serverapp`.

        Raises
        ------
        DivergenceError
            If the loss of a step is not finite.
        """
        return self._records

    def _train_round(self, epoch: int) -> Iterator[StepRecord | RoundRecord]:
        begin = time.perf_counter()
        schedule = self._algorithm.schedule(epoch)
        seconds, round_seconds = self._algorithm.seconds(schedule)
        notes = _Notes(self._data, schedule, epoch, seconds)
        batches, num_steps = _Batches(self._data, schedule, self._setting.config.seed, epoch), len(schedule.plan)
        a_look = _STEPS_A_LOOK_CPU if self._device.type == "cpu" else _STEPS_A_LOOK
        self.model.train()
        notes.book.seconds_plan, begin = time.perf_counter() - begin, time.perf_counter()
        ahead: tuple[range, Tensor] | None = None  # what the device is at work on
        for first in [*range(0, num_steps, a_look), num_steps]:
            chunk = range(first, min(first + a_look, num_steps))
            loaded = batches.load(chunk)  # meanwhile
            seen = None if ahead is None else (ahead[0], ahead[1].tolist())  # waits for the device
            now = time.perf_counter()
            ahead = (chunk, self._train_steps(chunk, loaded)) if chunk else None
            if seen is not None:
                yield from notes.steps(*seen, now - begin)
                begin = now
        self._algorithm.end_round()
        yield replace(notes.book.summary(), seconds_simulated=round_seconds, evaluate_serverapp=self.evaluate())

    def _train_steps(self, chunk: range, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Set the device to work on these steps; return their losses and right predictions, (2, steps), on it."""
        model, algorithm = self.model, self._algorithm
        losses, correct = [], []
        for step, (inputs, targets) in zip(chunk, batches, strict=True):
            algorithm.before(step)
            for optimizer in algorithm.optimizers:
                optimizer.zero_grad()
            with computing(self._setting.config.precision, self._device):
                outputs = run_on_batch(model, [inputs], len(targets))
                loss = functional.cross_entropy(outputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in algorithm.optimizers:
                optimizer.step()
            algorithm.after(step)
            losses.append(loss.detach())
            correct.append((outputs.argmax(dim=1) == targets).sum())
        return torch.stack([torch.stack(losses).double(), torch.stack(correct).double()])

    # --- testing -----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Return the loss and accuracy on the dataset's own test split."""
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        for outputs, targets in self._tested():
            loss += functional.cross_entropy(outputs, targets, reduction="sum")
            correct += (outputs.argmax(dim=1) == targets).sum()
        count = len(self._data.test)
        return {"loss": loss.item() / count, "accuracy": correct.item() / count}

    @torch.inference_mode()
    def confusion(self) -> IntArray:
        """Return how often each class (rows) is taken for which (columns) on the test split, (C, C) int64."""
        classes = self._data.num_classes
        cells = torch.cat([targets * classes + outputs.argmax(dim=1) for outputs, targets in self._tested()])
        table: IntArray = torch.bincount(cells, minlength=classes**2).view(classes, classes).cpu().numpy()
        return table

    def _tested(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the model's outputs and the true classes, batch by batch."""
        training = self.model.training
        self.model.eval()
        for inputs, targets in self._data.test.batches(_TEST_BATCH):
            with computing(self._setting.config.precision, self._device):
                outputs = self.model(inputs)
            yield outputs.to(torch.promote_types(outputs.dtype, torch.float32)), targets
        self.model.train(training)


class _Batches:
    """A schedule's batches on the device; what the host decides goes there for many steps at once."""

    def __init__(self, data: Data, schedule: Schedule, seed: int, epoch: int) -> None:
        self._data, self._plan, self._seed, self._epoch = data, schedule.plan, seed, epoch
        self._bounds = schedule.bounds().tolist()
        self._rows = self._there(torch.from_numpy(schedule.rows))

    def load(self, chunk: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw these steps' augmentation at once, and return an iterator that makes their batches."""
        return self._make(chunk, self._draw(chunk) if self._data.augmented and chunk else None)

    def _make(self, chunk: range, shifts: Shifts | None) -> Iterator[tuple[Tensor, Tensor]]:
        begin = self._bounds[chunk.start]
        for step in chunk:
            first, last = self._bounds[step : step + 2]
            some = None if shifts is None else Shifts(*(t[first - begin : last - begin] for t in shifts))
            yield self._data.train.batch(self._rows[first:last], some)

    def _draw(self, chunk: range) -> Shifts:
        plan = self._plan
        entries = slice(int(plan.offsets[chunk.start]), int(plan.offsets[chunk.stop]))
        steps = np.repeat(np.asarray(chunk), plan.active_clients()[chunk.start : chunk.stop])
        drawn = draw_all(self._seed, self._epoch, steps, plan.clients[entries], plan.quotas[entries])
        return Shifts(*map(self._there, drawn))

    def _there(self, tensor: Tensor) -> Tensor:
        device = self._data.train.device
        if device.type == "cuda":  # from pinned memory the copy waits for nothing
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)


class _Notes:
    """Turns what was seen of a round's steps into records, and keeps the round's `book`."""

    def __init__(self, data: Data, schedule: Schedule, epoch: int, seconds: FloatArray | None) -> None:
        self._plan, self._seconds, self._round = schedule.plan, seconds, epoch + 1
        self._class_counts = schedule.class_counts(data.train.targets, data.num_classes)
        self._recorder = RunRecorder(None, {})
        pooled = np.bincount(data.train.targets[np.concatenate(data.shares)], minlength=data.num_classes)
        self.book = Epoch(self._recorder, self._round, self._plan.population, pooled=pooled)

    def steps(self, chunk: range, seen: list[list[float]], seconds_real: float) -> Iterator[StepRecord]:
        """Count steps in and yield their records."""
        for step, loss, correct in zip(chunk, *seen, strict=True):
            if not math.isfinite(loss):
                where = f"round {self._round}, step {step}"
                raise DivergenceError(f"{where}: the loss is {loss}: training diverges, lower the learning rate")
            entry = self._plan[step]
            record = StepRecord(
                round=self._round,
                step=step,
                loss=loss,
                accuracy=correct / entry.batch_size,
                batch_size=entry.batch_size,
                clients=len(entry.clients),
                bytes_sent=None,
                bytes_received=None,
                seconds_real=seconds_real / len(chunk),
                seconds_simulated=None if self._seconds is None else float(self._seconds[step]),
            )
            self.book.add(record, entry, self._class_counts[step])
            yield self._recorder.steps[-1]
