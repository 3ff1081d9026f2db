"""What the user's factories return is looked at before the first exchange: an optimizer, a learning-rate scheduler."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from psl_flower.checks import check_choice
from psl_flower.errors import ConfigError
from psl_flower.monitor import Monitor, expected_mode
from psl_flower.origin import where
from psl_flower.server.accumulation import Accumulated

log = logging.getLogger("flwr.psl_flower")

OptimizerFn = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFn = Callable[[torch.optim.Optimizer], Any]

_NEEDED = ("step", "zero_grad", "param_groups", "state_dict", "load_state_dict")
_LIGHTNINGS = ("frequency", "name", "strict", "reduce_on_plateau")  # that change nothing here
_SHOWN = 5


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the default optimizer."""
    return torch.optim.SGD(parameters, lr=0.01)


def make_optimizer(factory: Callable[[Any], Any], parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Let a user's function make the optimizer, and check what it returns.

    Parameters
    ----------
    factory : callable
        Takes the parameters, as a torch optimizer does, and returns a torch optimizer, or an object that has its
        methods. Where its argument is called ``named_parameters``, it is given (name, parameter) pairs.
    parameters : dict of str to Parameter
        Those to be trained, by their names in the whole model, in its order.

    Raises
    ------
    ConfigError
        If there is nothing to train, or what the function returns cannot train these parameters.
    """
    if not parameters:
        raise ConfigError("the model has no parameter to train: set requires_grad on some")
    check_optimizer_fn(factory)
    wants_names = next(iter(_parameters_of(factory)), None) == "named_parameters"
    try:
        optimizer = factory(list(parameters.items()) if wants_names else list(parameters.values()))
    except Exception as exc:
        raise ConfigError(
            f"optimizer failed: {where(exc)}; it is called with the list of parameters to train and nothing else, as "
            "in lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        ) from exc
    _check_kind(optimizer)
    _check_parameters(optimizer, parameters)
    if "closure" in _required(optimizer.step):
        raise ConfigError(
            f"{type(optimizer).__name__} computes a step's loss several times (its step needs a closure), and clients "
            "compute theirs once a step: take an optimizer that needs no closure, for example torch.optim.Adam"
        )
    if all(callable(getattr(_inner(optimizer), mode, None)) for mode in ("train", "eval")):
        raise ConfigError(
            f"{type(_inner(optimizer)).__name__} has other weights for evaluation than for training (train() and "
            "eval()), and a run evaluates, saves and returns those that it trains: take an optimizer without them; for "
            "averages see docs/transformers.md, Recipes"
        )
    return optimizer  # type: ignore[no-any-return]


def check_optimizer_fn(factory: Any) -> None:
    """Raise ConfigError unless it is a function that may make optimizers."""
    if isinstance(factory, torch.optim.Optimizer) or not callable(factory):
        raise ConfigError(
            "optimizer must be a function that takes parameters and returns an optimizer, got "
            f"{type(factory).__name__}: pass lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )


def _check_kind(optimizer: Any) -> None:
    rule = "optimizer must return one torch optimizer"
    if optimizer is None:
        raise ConfigError(f"{rule}, got None: is its return statement missing?")
    if isinstance(optimizer, list | tuple | dict):
        parts = optimizer.values() if isinstance(optimizer, dict) else optimizer
        names = ", ".join(type(p).__name__ for p in parts)
        raise ConfigError(
            f"{rule}, got a {type(optimizer).__name__} ({names}): one optimizer steps the whole model, so make several "
            "into its parameter groups; a scheduler goes into scheduler=..."
        )
    if isinstance(optimizer, type):
        raise ConfigError(f"{rule}, got the class {optimizer.__name__}: call it with the parameters")
    missing = [name for name in _NEEDED if not hasattr(optimizer, name)]
    if missing:
        raise ConfigError(f"{rule}, got {type(optimizer).__name__}, which has no {', '.join(missing)}")


def _check_parameters(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    given = {id(p) for p in parameters.values()}
    foreign = [tuple(p.shape) for p in held if id(p) not in given]
    if foreign:
        raise ConfigError(
            f"optimizer must be built over the parameters it is given, but {len(foreign)} of its {len(held)} are "
            f"others (shapes {_listed(map(str, foreign))}): it is built over another model's parameters, or a loss's, "
            "and those of the run, which are copies, would not train. Use the argument; if you choose by name, call it "
            "named_parameters: it is a list of (name, parameter) then"
        )
    ids = set(map(id, held))
    left_out = [name for name, p in parameters.items() if id(p) not in ids]
    if left_out:
        log.warning(
            "the optimizer leaves out %d of %d parameters, which will not train: %s "
            "(if that is meant, set requires_grad to False on them)",
            len(left_out),
            len(parameters),
            _listed(left_out),
        )


def keeps_averages_apart(optimizer: Any) -> bool:
    """Return whether an optimizer has hooks after its steps, which may keep averages, and none that save them."""
    made = _inner(optimizer)
    after, saving = (
        getattr(made, f"_optimizer_{name}_post_hooks", None)
        for name in ("step", "state_dict")  # of torch's optimizers
    )
    return bool(after) and not saving


class RatedOptimizer:
    """An optimizer of a copy of a part, whose learning rate follows that of the master's.

    Parameters
    ----------
    factory, parameters
        See `make_optimizer`.

    Raises
    ------
    ConfigError
        If it accumulates gradients.
    """

    def __init__(self, factory: Callable[[Any], Any], parameters: Mapping[str, nn.Parameter]) -> None:
        self.optimizer = make_optimizer(factory, parameters)
        if isinstance(self.optimizer, Accumulated):
            raise ConfigError(
                "accumulate counts steps over rounds, and what trains one copy of a part (of each client on the "
                "server, or a client's own) is made anew every round: leave it out, and take larger batches"
            )
        self._rates = [float(group.get("lr", 1.0)) for group in self.optimizer.param_groups]

    def step(self, rate: float) -> None:
        """Step, with the factory's learning rate times `rate`."""
        for group, own in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group.get("lr"), torch.Tensor):
                group["lr"].fill_(own * rate)
            elif "lr" in group:
                group["lr"] = own * rate
        self.optimizer.step()


class Scheduler:
    """A learning-rate scheduler that steps when it should; without one it does nothing.

    Parameters
    ----------
    scheduler : torch learning-rate scheduler, optional
    interval : str
        "round": it steps after every round; "step": after every step.
    monitor : Monitor, optional
        The metric it is given with each step.
    optimizer : Optimizer, optional
        Where it accumulates gradients, it says whether it has stepped.
    """

    def __init__(
        self, scheduler: Any = None, interval: str = "round", monitor: Monitor | None = None, optimizer: Any = None
    ) -> None:
        self._scheduler, self._interval, self._monitor = scheduler, interval, monitor
        self._optimizer = optimizer

    @property
    def wrapped(self) -> Any:
        """The torch scheduler, or None."""
        return self._scheduler

    def on_step(self) -> None:
        """Hear that a step was committed."""
        if self._interval == "step" and getattr(self._optimizer, "stepped", True):
            self._step()

    def on_round(self, values: Mapping[str, float], *, evaluated: bool = True) -> None:
        """Hear that a round is over.

        Parameters
        ----------
        values : dict of str to float
            What is known of the round, as `psl_flower.monitor.round_values` names it.
        evaluated : bool
            Whether clients were to be evaluated in this round; where they were not, a scheduler that waits for a metric
            of theirs does not step.

        Raises
        ------
        ConfigError
            If the metric it waits for is not there.
        """
        if self._interval != "round":
            return
        if self._monitor is None:
            self._step()
            return
        value = self._monitor.read(values, evaluated=evaluated)
        if value is not None:
            self._step(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs; the learning rate itself is in the optimizer's."""
        return {} if self._scheduler is None else dict(self._scheduler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(dict(state))

    def _step(self, *metric: float) -> None:
        if self._scheduler is None:
            return
        with warnings.catch_warnings():  # of a round that is resumed at its end: the optimizer had no step here
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            try:
                self._scheduler.step(*metric)
            except Exception as exc:
                name = type(self._scheduler).__name__
                raise ConfigError(
                    f"the {self._interval}'s step of the scheduler, {name}, failed: {where(exc)}"
                ) from exc


def make_scheduler(
    factory: SchedulerFn | None, optimizer: torch.optim.Optimizer, *, evaluate_every: int = 1
) -> Scheduler:
    """Let a user's function make the learning-rate scheduler, and check what it returns.

    Parameters
    ----------
    factory : callable, optional
        Takes the optimizer and returns a torch scheduler, which steps after every round; or, as in Lightning, a dict
        ``{"scheduler": ..., "interval": "round" or "step", "monitor": "loss"}``. A round is an epoch, so "epoch" says
        the same as "round". `monitor` is the metric of a ``ReduceLROnPlateau``, by default the training loss. What
        else Lightning has there may stay; its `frequency` must be 1.
    optimizer : Optimizer
    evaluate_every : int
        Rounds between two evaluations on the clients' test data, whose metrics may be waited for; 0 for none.

    Raises
    ------
    ConfigError
        If what it returns is no scheduler of this optimizer, or cannot be stepped as it says.
    """
    if factory is None:
        return Scheduler()
    if not callable(factory):
        raise ConfigError(
            "scheduler must be a function that takes the optimizer and returns a scheduler, got "
            f"{type(factory).__name__}: pass lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10)"
        )
    try:
        made = factory(optimizer)
    except Exception as exc:
        raise ConfigError(
            f"scheduler failed: {where(exc)}; it is called with the optimizer and nothing else, as in lambda "
            "optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10)"
        ) from exc
    options = made if isinstance(made, dict) else {"scheduler": made}
    for key in options:
        check_choice(
            key, "a key of the dict that scheduler returns", ("scheduler", "interval", "monitor", *_LIGHTNINGS)
        )
    if (frequency := options.get("frequency", 1)) != 1:
        raise ConfigError(
            f"scheduler: frequency must be 1, got {frequency!r:.80}: a scheduler steps at each interval, so give its "
            "own options (step_size, T_max, patience) so many times as much"
        )
    scheduler = options.get("scheduler")
    _check_scheduler(scheduler, optimizer)
    interval = check_choice(options.get("interval", "round"), "scheduler: interval", ("round", "step", "epoch"))
    interval = "round" if interval == "epoch" else interval
    monitor = _monitor_of(scheduler, options.get("monitor"))
    if monitor and interval == "step":
        raise ConfigError(
            f"{type(scheduler).__name__} needs a metric, known after a round only: pass interval='round', got 'step'"
        )
    if monitor:
        monitor.check(evaluate_every)
    return Scheduler(scheduler, interval, monitor, optimizer)


def _check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    rule = "scheduler must return one torch learning-rate scheduler, or a dict with it under 'scheduler'"
    if scheduler is None:
        raise ConfigError(f"{rule}, got None: is its return statement missing?")
    if isinstance(scheduler, list | tuple):
        raise ConfigError(
            f"{rule}, got a {type(scheduler).__name__} of {len(scheduler)}: join several with "
            "torch.optim.lr_scheduler.ChainedScheduler or SequentialLR"
        )
    if isinstance(scheduler, type):
        raise ConfigError(f"{rule}, got the class {scheduler.__name__}: call it with the optimizer")
    missing = [name for name in ("step", "state_dict", "load_state_dict") if not hasattr(scheduler, name)]
    if missing or isinstance(scheduler, torch.optim.Optimizer):
        what = f", which has no {', '.join(missing)}" if missing else ""
        raise ConfigError(f"{rule}, got {type(scheduler).__name__}{what}")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError(
            "scheduler must be built over the optimizer it is given, but is built over another, whose learning rate "
            "nobody uses: use the argument"
        )


def _monitor_of(scheduler: Any, name: Any) -> Monitor | None:
    """Return the metric that a scheduler's step is to be given, if it is to be given one."""
    kind, needed = type(scheduler).__name__, _required(scheduler.step)
    if not needed:
        if name is not None:
            raise ConfigError(f"{kind} steps without a metric: leave monitor={name!r} out")
        return None
    if len(needed) > 1 or (name is None and "metric" not in needed[0]):
        raise ConfigError(
            f"scheduler: {kind}.step must need nothing, or one metric, but it needs {', '.join(needed)}: wrap it in a "
            "class whose step does not"
        )
    name = "loss" if name is None else name
    monitor, mode = Monitor(name, "scheduler"), expected_mode(str(name))
    if mode and getattr(scheduler, "mode", mode) != mode:
        log.warning("%s has mode=%r, but monitors %r: is mode=%r meant?", kind, scheduler.mode, name, mode)
    return monitor


def _inner(optimizer: Any) -> Any:
    """Return the optimizer that the user's function has made."""
    return optimizer.inner if isinstance(optimizer, Accumulated) else optimizer


def _parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C
        return {}


def _required(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that must be given."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, p in _parameters_of(function).items()
        if p.default is inspect.Parameter.empty and p.kind not in kinds
    ]


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
