"""Settings of a resumed run: what has changed is named and used, what may not change is refused."""

import functools

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from psl_flower.errors import ConfigError
from psl_flower.samplers import LatentDirichletSampler, UniformGlobalSampler
from psl_flower.stragglers import DelayEstimator, SlowFractionDelays
from psl_flower.strategy import settings


def smoothed_loss(outputs, labels, smoothing=0.0):
    return torch.nn.functional.cross_entropy(outputs, labels, label_smoothing=smoothing)


# --- describing ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5),
        (torch.tensor(0.25), 0.25),
        ((1, [2.0, None]), [1, [2.0, None]]),
        (UniformGlobalSampler(8, seed=3), {"class": "UniformGlobalSampler", "batch_size": 8, "seed": 3}),
        (DelayEstimator(window=4), {"class": "DelayEstimator", "window": 4, "latency": 1.0, "per_sample": 0.0}),
        (torch.nn.functional.cross_entropy, "torch.nn.functional.cross_entropy"),
    ],
)
def test_descriptions_are_plain(value, expected):
    assert settings.describe(value) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LatentDirichletSampler(8, delta=1.0), LatentDirichletSampler(8, delta=2.0)),
        (SlowFractionDelays(fraction=0.1), SlowFractionDelays(fraction=0.2)),
        (torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(label_smoothing=0.1)),
        (torch.nn.CrossEntropyLoss(torch.ones(2)), torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]))),
        (functools.partial(smoothed_loss, smoothing=0.1), functools.partial(smoothed_loss, smoothing=0.2)),
        (smoothed_loss, torch.nn.functional.cross_entropy),
    ],
)
def test_different_settings_are_described_differently(one, other):
    assert settings.describe(one) != settings.describe(other)


def test_what_an_object_does_later_is_no_setting():
    estimator = DelayEstimator()
    before = settings.describe(estimator)
    estimator.observe(0, 4, 2.0)
    assert settings.describe(estimator) == before


def test_objects_that_hold_each_other_are_described():
    class Knot:
        def __init__(self, other):
            self.other = other

    knot = Knot(None)
    knot.other = knot
    assert settings.describe(knot)["class"] == "Knot"


# --- comparing -------------------------------------------------------------------------------------------------------
def described(optimizer=torch.optim.SGD, scheduler=None, sampler=None, groups=1, **options):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(groups)]
    made = optimizer([{"params": [w]} for w in weights], **{"lr": 0.1, **options})
    return {
        "sampler": settings.describe(sampler or UniformGlobalSampler(8)),
        "optimizer": settings.describe_optimizer(made),
        "scheduler": settings.describe_scheduler(scheduler and scheduler(made)),
        "strategy": {"num_rounds": 2, "resume_from": None},
    }


def test_equal_settings_have_not_changed():
    scheduler = functools.partial(lr_scheduler.MultiStepLR, milestones=[2, 3])
    assert settings.compare(described(scheduler=scheduler), described(scheduler=scheduler)) == []


def test_every_change_is_named_with_both_values():
    step = functools.partial(lr_scheduler.StepLR, step_size=1)
    then = described(scheduler=functools.partial(step, gamma=0.5), groups=2)
    now = described(scheduler=functools.partial(step, gamma=0.1), groups=2, lr=0.2, momentum=0.9)
    now["strategy"] = {"num_rounds": 3, "resume_from": "latest", "new": 1}
    assert {str(change) for change in settings.compare(then, now)} == {
        "optimizer: group 0: lr was 0.1, now 0.2",
        "optimizer: group 0: momentum was 0, now 0.9",
        "optimizer: group 1: lr was 0.1, now 0.2",
        "optimizer: group 1: momentum was 0, now 0.9",
        "scheduler: gamma was 0.5, now 0.1",
        "strategy: num_rounds was 2, now 3",
        "strategy: new was None, now 1",
    }


adam, rmsprop = torch.optim.Adam, torch.optim.RMSprop
step = functools.partial(lr_scheduler.StepLR, step_size=1)


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (
            {},
            {"sampler": UniformGlobalSampler(4)},
            "sampler: batch_size: the checkpoint has 8, this run 4: set it back",
        ),
        ({}, {"sampler": LatentDirichletSampler(8)}, "sampler: class: the checkpoint has 'UniformGlobalSampler', this"),
        ({}, {"optimizer": adam}, "optimizer: class: the checkpoint has 'SGD', this run 'Adam'"),
        ({}, {"groups": 2}, "optimizer: group 1: this run has .*, the checkpoint has none .*groups of parameters"),
        ({"groups": 2}, {}, "optimizer: group 1: the checkpoint has .*, this run has none .*groups of parameters"),
        (
            {"optimizer": adam},
            {"optimizer": adam, "amsgrad": True},
            "group 0: amsgrad: .* this run True .*only numbers",
        ),
        ({"optimizer": rmsprop}, {"optimizer": rmsprop, "momentum": 0.5}, "momentum: .* no momentum to go on with"),
        ({}, {"scheduler": step}, "scheduler: class: the checkpoint has None, this run 'StepLR'"),
        ({"scheduler": step}, {"scheduler": lr_scheduler.LinearLR}, "scheduler: class: the checkpoint has 'StepLR'"),
    ],
)
def test_what_a_checkpoint_depends_on_is_refused(then, now, message):
    with pytest.raises(ConfigError, match=rf"the checkpoint is not of this run: .*{message}.*") as error:
        settings.compare(described(**then), described(**now))
    assert str(error.value).endswith("set it back, or start anew without resume_from")


def test_an_option_that_another_version_of_torch_adds_is_no_change():
    then, now = described(), described()
    del then["optimizer"]["group 0"]["foreach"]
    assert settings.compare(then, now) == []


# --- applying --------------------------------------------------------------------------------------------------------
class Training:
    """One weight, its optimizer and its scheduler."""

    def __init__(self, optimizer, scheduler=None):
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.optimizer = optimizer([self.weight])
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.settings = {
            "optimizer": settings.describe_optimizer(self.optimizer),
            "scheduler": settings.describe_scheduler(self.scheduler),
        }

    def run(self, rounds):
        for _ in range(rounds):
            self.weight.grad = self.weight.detach().square()
            self.optimizer.step()
            if self.scheduler:
                self.scheduler.step()
        return self

    def resumed(self, other):
        """Go on where `other` is, with the own settings."""
        self.weight.data.copy_(other.weight)
        self.optimizer.load_state_dict(other.optimizer.state_dict())
        if self.scheduler:
            self.scheduler.load_state_dict(other.scheduler.state_dict())
        settings.compare(other.settings, self.settings)
        settings.apply(self.optimizer, self.scheduler, other.settings, self.settings)
        return self

    def rates(self):
        return [group["lr"] for group in self.optimizer.param_groups]


def sgd(**options):
    return functools.partial(torch.optim.SGD, **{"lr": 0.1, **options})


SCHEDULERS = {
    "none": None,
    "step": step,
    "cosine": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=9),
    "warmup": functools.partial(lr_scheduler.LinearLR, total_iters=5),
    "lambda": functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 1 / (1 + epoch)),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.StepLR(optimizer, 1)], [2]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=list(SCHEDULERS))
def test_without_a_change_it_is_the_same_run(scheduler):
    whole = Training(sgd(momentum=0.9), scheduler).run(6)
    resumed = Training(sgd(momentum=0.9), scheduler).resumed(Training(sgd(momentum=0.9), scheduler).run(3)).run(3)
    assert resumed.rates() == whole.rates()
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=list(SCHEDULERS))
def test_another_learning_rate_goes_the_way_of_its_schedule(scheduler):
    before = Training(sgd(), scheduler).run(3)
    resumed = Training(sgd(lr=0.02), scheduler).resumed(before)
    other = Training(sgd(lr=0.02), scheduler).run(3)
    for _ in range(3):
        assert resumed.rates() == pytest.approx(other.rates())
        resumed.run(1), other.run(1)
    assert resumed.rates() == pytest.approx(other.rates())


def test_without_a_scheduler_the_rate_is_exactly_the_new_one():
    assert Training(sgd(lr=0.001)).resumed(Training(sgd()).run(2)).rates() == [0.001]


def test_a_rate_that_somebody_else_changed_is_no_change_of_the_users():
    before = Training(sgd()).run(1)
    before.optimizer.param_groups[0]["lr"] = 0.05
    assert Training(sgd()).resumed(before).rates() == [0.05]


def test_changes_of_changes_are_applied():
    first = Training(sgd(), step).run(1)
    second = Training(sgd(lr=0.2), step).resumed(first).run(1)
    third = Training(sgd(lr=0.2), step).resumed(second)
    assert third.rates() == second.rates() == pytest.approx([0.2 * 0.1 * 0.1])
    assert Training(sgd(), step).resumed(third).rates() == pytest.approx([0.1 * 0.1 * 0.1])


def test_other_options_of_the_optimizer_are_used():
    def adamw(betas, **options):
        return functools.partial(torch.optim.AdamW, betas=betas, lr=torch.tensor(0.1), **options)

    resumed = Training(adamw((0.8, 0.99), weight_decay=0.5)).resumed(Training(adamw((0.9, 0.99))).run(2)).run(1)
    group = resumed.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.99), 0.5)
    assert isinstance(group["lr"], torch.Tensor)


def test_a_schedulers_options_are_used_and_its_progress_stays():
    def milestones(*at, gamma=0.1):
        return functools.partial(lr_scheduler.MultiStepLR, milestones=at, gamma=gamma)

    before = Training(sgd(), milestones(1, 9)).run(2)
    resumed = Training(sgd(), milestones(1, 4, gamma=0.5)).resumed(before)
    assert resumed.scheduler.last_epoch == 2
    assert resumed.rates() == before.rates() == pytest.approx([0.01])
    assert resumed.run(2).rates() == pytest.approx([0.005])


def test_a_plateaus_patience_may_change():
    def plateau(patience):
        return lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience)

    before, now = (Training(sgd(), plateau(patience)) for patience in (5, 1))
    before.scheduler.step(3.0)
    before.scheduler.step(4.0)
    now.resumed(before)
    assert (now.scheduler.patience, now.scheduler.best, now.scheduler.num_bad_epochs) == (1, 3.0, 1)
