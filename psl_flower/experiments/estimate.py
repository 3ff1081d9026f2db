"""How long a sweep will take on this machine, told before it starts: some steps of each kind of training are tried."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from itertools import islice

import torch

from psl_flower.app.task import make_model
from psl_flower.experiments.data import load_data
from psl_flower.experiments.setting import Setting
from psl_flower.experiments.sweep import Experiment
from psl_flower.experiments.training import Training
from psl_flower.records import StepRecord

_STEPS, _WARM = 24, 8  # steps tried, and how many of them come before it is as fast as it gets
_TEST = 1 / 3  # what testing an example takes of training on one: forward without backward


def estimate(experiments: Iterable[Experiment]) -> float:
    """Return the seconds that trainings take one after the other, about.

    What planning takes is not in it, which is little but for LDS and Aligned with many clients.

    Parameters
    ----------
    experiments : iterable of Experiment
        Those of other engines than "vectorised" are left out.
    """
    known, seconds = dict[object, tuple[float, int]](), 0.0
    for experiment in experiments:
        if experiment.engine != "vectorised":
            continue
        setting, config = experiment.setting, experiment.setting.config
        machine = (config.device, config.threads, config.precision, setting.double, setting.channels_last)
        kind = (config.dataset, config.model, config.batch_size, setting.algorithm, setting.examples, *machine)
        if kind not in known:
            known[kind] = (0.0, 0)
            with suppress(Exception):  # its training will fail likewise, and say so without stopping the others
                known[kind] = _try(setting)
        an_example, examples = known[kind]
        seconds += config.num_server_rounds * setting.local_epochs * an_example * examples
    return seconds


def _try(setting: Setting) -> tuple[float, int]:
    """Return the seconds an example takes, and how many there are in a round, tests counted for what they take."""
    torch.set_num_threads(setting.config.threads or 1)  # as the training itself will
    data = load_data(setting)
    records = islice(Training(setting, data, make_model(setting.config)).records(), _STEPS)
    steps = [record for record in records if isinstance(record, StepRecord)]
    steps = steps[_WARM:] or steps
    an_example = sum(step.seconds_real for step in steps) / sum(step.batch_size for step in steps)
    return an_example, sum(map(len, data.shares)) + round(_TEST * len(data.test))
