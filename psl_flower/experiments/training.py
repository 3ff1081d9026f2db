"""Training in one process, all clients of a step in one pass: the engine under every algorithm of an experiment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from psl_flower.app.images import Shifts
from psl_flower.app.task import make_model
from psl_flower.errors import DivergenceError
from psl_flower.experiments.algorithms import ALGORITHM_CLASSES, Task
from psl_flower.experiments.data import Data, load_data
from psl_flower.experiments.draws import draw_all
from psl_flower.experiments.schedule import Schedule
from psl_flower.experiments.setting import Setting
from psl_flower.samplers.base import FloatArray, IntArray
from psl_flower.strategy.epoch import Epoch
from psl_flower.strategy.result import RoundRecord, RunRecorder, StepRecord

# Steps between two looks at what the device has computed: a look waits for it.
_STEPS_A_LOOK = 50
_TEST_BATCH = 1000  # examples in one forward pass of the test, as in the default app's


def open_training(setting: Setting) -> Training:
    """Load a setting's data and model, ready to train.

    Raises
    ------
    ConfigError
        If the data cannot be had, the sampler cannot plan with these clients, or the model cannot be cut there.
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
        if setting.precision == "float64":
            model = model.double()
        memory_format = torch.channels_last if setting.channels_last else torch.preserve_format
        self.model: nn.Module = model.to(data.train.device, memory_format=memory_format)  # type: ignore[call-overload]
        self._setting, self._data, self._device = setting, data, data.train.device
        self._task = Task(setting, data, self.model)
        self._algorithm = ALGORITHM_CLASSES[setting.algorithm](self._task)
        self._records = (r for e in range(setting.config.num_server_rounds) for r in self._train_round(e))
        used = np.concatenate(data.shares)
        self._pooled = np.bincount(data.train.targets[used], minlength=data.num_classes)

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
        seconds_plan = time.perf_counter() - begin
        recorder = RunRecorder(None, {})
        book = Epoch(recorder, epoch + 1, schedule.plan.population, pooled=self._pooled)
        book.seconds_plan = seconds_plan
        seconds, round_seconds = self._algorithm.seconds(schedule)
        notes = _Notes(
            epoch, schedule, schedule.class_counts(self._data.train.targets, self._data.num_classes), seconds
        )
        loader, total = _Loader(self._data, schedule, self._setting.config.seed, epoch), len(schedule.plan)
        self.model.train()
        looks: list[_Look] = []
        begin = time.perf_counter()
        for first in range(0, total, _STEPS_A_LOOK):
            chunk = range(first, min(first + _STEPS_A_LOOK, total))
            batches = loader.load(chunk)  # while the device is still at work on the last chunk
            seen = looks.pop().read() if looks else None
            looks.append(self._train_steps(chunk, batches))
            if seen is not None:
                now = time.perf_counter()
                yield from notes.write(book, recorder, seen, now - begin)
                begin = now
        seen = looks.pop().read()
        yield from notes.write(book, recorder, seen, time.perf_counter() - begin)
        self._algorithm.end_round()
        record = replace(book.summary(), seconds_simulated=round_seconds)
        yield replace(record, evaluate_serverapp=self.evaluate())

    def _train_steps(self, chunk: range, batches: Iterator[tuple[Tensor, Tensor]]) -> _Look:
        """Set the device to work on these steps."""
        model, algorithm = self.model, self._algorithm
        losses, correct = [], []
        for step, (inputs, targets) in zip(chunk, batches, strict=True):
            algorithm.before(step)
            for optimizer in algorithm.optimizers:
                optimizer.zero_grad()
            with self._autocast():
                outputs = model(inputs)
                loss = functional.cross_entropy(outputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in algorithm.optimizers:
                optimizer.step()
            algorithm.after(step)
            losses.append(loss.detach())
            correct.append((outputs.argmax(dim=1) == targets).sum())
        return _Look(chunk, torch.stack(losses), torch.stack(correct))

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._setting.precision == "bfloat16")

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
            with self._autocast():
                yield self.model(inputs), targets
        self.model.train(training)


@dataclass(frozen=True, eq=False)
class _Look:
    """What some steps have come to, still on the device."""

    chunk: range
    losses: Tensor
    correct: Tensor

    def read(self) -> tuple[range, list[float], list[int]]:
        """Wait for the device."""
        return self.chunk, self.losses.tolist(), self.correct.tolist()


class _Loader:
    """Makes a schedule's batches on the device; what the host decides goes there for many steps at once."""

    def __init__(self, data: Data, schedule: Schedule, seed: int, epoch: int) -> None:
        self._data, self._plan, self._seed, self._epoch = data, schedule.plan, seed, epoch
        self._bounds = schedule.bounds().tolist()
        self._rows = self._there(torch.from_numpy(schedule.rows))

    def load(self, chunk: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw these steps' augmentation at once, and return an iterator that makes their batches."""
        return self._batches(chunk, self._draw(chunk) if self._data.augmented else None)

    def _batches(self, chunk: range, shifts: Shifts | None) -> Iterator[tuple[Tensor, Tensor]]:
        begin = self._bounds[chunk.start]
        for step in chunk:
            first, last = self._bounds[step : step + 2]
            some = None if shifts is None else Shifts(*(t[first - begin : last - begin] for t in shifts))
            yield self._data.train.batch(self._rows[first:last], some)

    def _draw(self, chunk: range) -> Shifts:
        plan = self._plan
        entries = slice(int(plan.offsets[chunk.start]), int(plan.offsets[chunk.stop]))
        steps = np.repeat(np.arange(chunk.start, chunk.stop), plan.active_clients()[chunk.start : chunk.stop])
        drawn = draw_all(self._seed, self._epoch, steps, plan.clients[entries], plan.quotas[entries])
        return Shifts(*map(self._there, drawn))

    def _there(self, tensor: Tensor) -> Tensor:
        device = self._data.train.device
        if device.type == "cuda":  # from pinned memory the copy waits for nothing
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)


@dataclass(frozen=True, eq=False)
class _Notes:
    """Turns what was seen of steps into their records."""

    epoch: int
    schedule: Schedule
    class_counts: IntArray
    seconds: FloatArray | None

    def write(
        self, book: Epoch, recorder: RunRecorder, seen: tuple[range, list[float], list[int]], seconds_real: float
    ) -> Iterator[StepRecord]:
        """Count steps in and yield their records."""
        chunk, losses, correct = seen
        for step, loss, right in zip(chunk, losses, correct, strict=True):
            if not np.isfinite(loss):
                raise DivergenceError(
                    f"round {self.epoch + 1}, step {step}: the loss is {loss}: training diverges, lower the learning "
                    "rate"
                )
            entry = self.schedule.plan[step]
            record = StepRecord(
                round=self.epoch + 1,
                step=step,
                loss=loss,
                accuracy=right / entry.batch_size,
                batch_size=entry.batch_size,
                clients=len(entry.clients),
                bytes_sent=None,
                bytes_received=None,
                seconds_real=seconds_real / len(chunk),
                seconds_simulated=None if self.seconds is None else float(self.seconds[step]),
            )
            book.add(record, entry, self.class_counts[step])
            yield recorder.steps[-1]
