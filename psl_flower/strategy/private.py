"""Differential privacy of the model: what does not go with it, and what a round has cost."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from psl_flower.errors import ConfigError, StepError
from psl_flower.exchange.streams import StreamOptions
from psl_flower.failures import Failure, Kind
from psl_flower.faults import FaultPolicy
from psl_flower.methods import SplitMethod, check_options
from psl_flower.privacy import DPSGD, SecureAggregation
from psl_flower.records import RoundRecord
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.poisson import PoissonGlobalSampler
from psl_flower.split import batch_statistics_layers, most_positions

log = logging.getLogger("flwr.psl_flower")


def check_private(
    private: DPSGD | None,
    method: SplitMethod,
    parts: Mapping[str, nn.Module],
    sampler: Sampler,
    policy: FaultPolicy,
    resume_from: str | Path | None,
    secure: SecureAggregation | None,
    streams: StreamOptions,
) -> DPSGD | None:
    """Return the options that people give; refuse what would break the promise.

    Raises
    ------
    ConfigError
        Naming what, and why.
    """
    if private is None:
        return None
    check_options(private, method, secure)
    if private.batch_size != sampler.batch_size:
        raise ConfigError(
            f"private must have the sampler's batch size, {sampler.batch_size}, got {private.batch_size}: its noise is "
            "that of a step's mean"
        )
    _check_drawing(private, sampler, parts)
    if sampler.needs_label_counts:
        raise ConfigError(f"{type(sampler).__name__} plans with labels, which private would not cover: use another")
    for name, part in parts.items():
        if layers := batch_statistics_layers(part):
            raise ConfigError(
                f"with private an example's gradient must be its own, but {layers[0]!r} of the {name} normalises over "
                "the batch: replace_batch_norm(model)"
            )
    if policy.max_gradient_norm is not None or policy.outlier_bound is not None:
        raise ConfigError(
            "with private the weight of a client's gradients must not depend on the others' or on their size: "
            "FaultPolicy(max_gradient_norm=None, outlier_bound=None)"
        )
    if streams.wire_dtype in ("float16", "int8"):  # see Note [Wire dtypes]
        raise ConfigError(
            f"with private examples must not be scaled together, as {streams.wire_dtype} on the wire does: "
            "StreamOptions(wire_dtype='bfloat16'), or float32"
        )
    if policy.mistakes not in (None, "stop"):
        raise ConfigError(
            f"with private one example must not decide on others, but with mistakes={policy.mistakes!r} one that "
            "cannot be used takes all examples of its client out: FaultPolicy(mistakes='stop', outlier_bound=None)"
        )
    if policy.non_finite_loss != "stop":
        raise ConfigError(
            "with private no example may stop a step and its noise: one whose gradient is not finite counts as zero. "
            f"Leave out non_finite_loss={policy.non_finite_loss!r}"
        )
    if resume_from is not None:
        raise ConfigError(
            "with private a run cannot be resumed: steps since the checkpoint would be made again, with other noise, "
            "and nobody knows how often. Leave resume_from out"
        )
    return private


def _check_drawing(private: DPSGD, sampler: Sampler, parts: Mapping[str, nn.Module]) -> None:
    """Refuse to count steps in another way than they are drawn."""
    kind, its = type(sampler), PoissonGlobalSampler
    name = kind.__name__
    if sampler.clients_draw and not (issubclass(kind, its) and kind.plan is its.plan and kind._plan is its._plan):
        raise ConfigError(
            f"epsilon is counted for steps as PoissonGlobalSampler plans them, but {name} makes plans of its own: with "
            "private use PoissonGlobalSampler itself, or a sampler that has each example once a round"
        )
    if sampler.clients_draw and private.examples is None:
        raise ConfigError(
            f"{name} has an example in any number of steps, but private counts each once a round: give it the number "
            "of examples of all clients together, DPSGD(..., examples=N)"
        )
    if private.examples is None:
        return
    if not sampler.clients_draw:
        raise ConfigError(
            f"DPSGD(examples={private.examples}) counts on each example being drawn for a step by chance, which "
            f"{name} does not do: use PoissonGlobalSampler, or leave examples out"
        )
    if getattr(sampler, "repeatable", False):
        raise ConfigError(
            "clients know the seed, and would know how many examples of others are in a step: with private, "
            "PoissonGlobalSampler(repeatable=False)"
        )
    if most_positions(parts.values()):
        raise ConfigError(
            "what goes back to clients is as long as the longest text of a step, which tells who is in it: with "
            "DPSGD(examples=...) all rows must be of one length"
        )


def check_usable(bound: float | None, failures: Mapping[int, Failure]) -> None:
    """Refuse to go on without examples that clients cannot read, where one must not decide on others.

    Parameters
    ----------
    bound : float or None
        Largest norm of one example's gradient; None without differential privacy.
    failures : dict of int to Failure

    Raises
    ------
    StepError
        If there are such examples.
    """
    unreadable = {client: f for client, f in failures.items() if f.kind is Kind.UNREADABLE}
    if bound is not None and unreadable:
        raise StepError(
            "with private an example that cannot be read may not change the steps of the others, as leaving it out "
            "would: take it out of the client's data, and start again",
            unreadable,
        )


def default_mistakes(private: DPSGD | None, deployment: bool) -> str:
    """Return what a run does about mistakes of clients, unless people say."""
    return "exclude" if deployment and private is None else "stop"


class Spending:
    """What the rounds of a strategy have given away so far, in all its runs: each may be of the same data.

    Parameters
    ----------
    private : DPSGD or None
    """

    def __init__(self, private: DPSGD | None) -> None:
        self._private = private
        self._rounds = 0 if private is None else private.spent_rounds
        drawn = private is not None and private.examples is not None
        self._steps = Counter(private.steps(self._rounds) if private is not None and drawn else {})  # by their rate

    def begin(self, examples: int, steps: int) -> None:
        """Count a round that begins, whether or not it comes to its end.

        Parameters
        ----------
        examples : int
            In all.
        steps : int
            That are planned.

        Raises
        ------
        ConfigError
            If delta promises nothing: to tell one of the examples to everybody has a chance of one over their number.
            If so many rounds would give away more than `private` was made for, as the clients hold fewer examples.
        """
        if self._private is None:
            return
        if self._private.noise and self._private.delta * examples >= 1:
            raise ConfigError(
                f"delta must be well below one over the number of examples, which is {examples}, got "
                f"{self._private.delta:g}: DPSGD(delta={_tenth(examples):g}), say"
            )
        self._rounds += 1
        if (expected := self._private.examples) is not None:
            self._steps[self._private.batch_size / examples] += steps
            if expected != examples:
                found, most = self._private.epsilon_of_steps(self._steps), self._private.epsilon(self._rounds)
                if found > most:
                    raise ConfigError(
                        f"private was made for {expected} examples, the clients hold {examples}: {self._rounds} rounds "
                        f"would give away an epsilon of {found:.3g} instead of {most:.3g}. Make it, on both sides, for "
                        f"the number that is always there: examples={examples} (dp-examples in the default app)"
                    )
                text = "private was made for %d examples, the clients hold %d: epsilon is told for these"
                log.warning(text, expected, examples)

    def told(self, record: RoundRecord) -> RoundRecord:
        """Return a round's record with the epsilon of all rounds so far, and tell it."""
        if self._private is None:
            return record
        drawn, text = self._private.examples is not None, "round %d  differential privacy of the model: "
        epsilon = self._private.epsilon_of_steps(self._steps) if drawn else self._private.epsilon(self._rounds)
        if not math.isfinite(epsilon):
            log.warning(text + "none, there is too little noise", record.round)
            return record
        earlier = f", with {self._rounds - record.round} rounds before this run" * (self._rounds > record.round)
        log.info(text + "epsilon %.3f, delta %g%s", record.round, epsilon, self._private.delta, earlier)
        return replace(record, metrics_of_user={**record.metrics_of_user, "epsilon": epsilon})


def _tenth(examples: int) -> float:
    """Return a power of ten below a tenth of one over a number."""
    return 10.0 ** -math.ceil(math.log10(10 * examples))
