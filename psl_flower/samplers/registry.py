"""Samplers by name, for configuration files and commands."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from psl_flower.checks import check_choice, check_options
from psl_flower.errors import ConfigError
from psl_flower.samplers.aligned import AlignedSampler
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.dirichlet import LatentDirichletSampler
from psl_flower.samplers.fixed import FixedLocalSampler, FixedProportionalSampler
from psl_flower.samplers.latency import LatencyBudgetedSampler
from psl_flower.samplers.poisson import PoissonGlobalSampler
from psl_flower.samplers.uniform import UniformGlobalSampler

# Those whose plans use each example exactly once an epoch.
SAMPLERS: dict[str, type[Sampler]] = {
    "fls": FixedLocalSampler,
    "fpls": FixedProportionalSampler,
    "ugs": UniformGlobalSampler,
    "lds": LatentDirichletSampler,
    "lb": LatencyBudgetedSampler,
    "aligned": AlignedSampler,
}

# Those whose plans use each example once on average only.
DRAWN: dict[str, type[Sampler]] = {"poisson": PoissonGlobalSampler}

NAMED = SAMPLERS | DRAWN
_LONG_NAMES = {
    "fixed-local": "fls",
    "fixed-proportional": "fpls",
    "uniform-global": "ugs",
    "latent-dirichlet": "lds",
    "latency-budgeted": "lb",
    "poisson-global": "poisson",
}


def make_sampler(name: str, batch_size: int, seed: int = 0, **options: Any) -> Sampler:
    """Make a sampler by name.

    Parameters
    ----------
    name : str
        "fls", "fpls", "ugs", "lds", "lb", "aligned", "poisson", or the long form: "fixed-local", "fixed-proportional",
        "uniform-global", "latent-dirichlet", "latency-budgeted", "poisson-global"; or a class of your own,
        "package.module:Class".
    batch_size : int
        Global batch size B.
    seed : int
        Not negative.
    **options
        Keyword arguments of the sampler's class, e.g. ``delta=0.5`` for "lds".

    Raises
    ------
    ConfigError
        If the name or an option is unknown, or a value is out of range.

    Examples
    --------
    >>> make_sampler("lb", 128, seed=1, method="flow")
    LatencyBudgetedSampler(batch_size=128, seed=1, method='flow', targets='random', order='shuffled')
    """
    sampler = _own_sampler(name) if ":" in str(name) else NAMED[_short_name(name)]
    check_options(options, sampler, f"sampler {name!r}", but=("batch_size", "seed"))
    return sampler(batch_size, seed=seed, **options)


def _short_name(name: str) -> str:
    check_choice(name, "sampler", [*NAMED, *_LONG_NAMES])
    return _LONG_NAMES.get(name, name)


def _own_sampler(name: str) -> type[Sampler]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(f"sampler {name!r} cannot be imported ({exc}): write package.module:Class") from exc
    if not isinstance(found, type) or not issubclass(found, Sampler):
        raise ConfigError(f"sampler {name!r} must be a subclass of psl_flower.samplers.Sampler, it is {found!r}")
    return found
