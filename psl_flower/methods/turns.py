"""What methods with turns have in common: they put batches together themselves."""

from __future__ import annotations

from psl_flower.errors import ConfigError
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.turns import TurnsSampler
from psl_flower.samplers.uniform import UniformGlobalSampler


def turns_of(method: str, chosen: Sampler, turns: str) -> Sampler:
    """Return a method's own sampler, with the batch size and seed of the one that the user chose.

    Raises
    ------
    ConfigError
        If another sampler was chosen than the default: it would have no say.
    """
    if isinstance(chosen, TurnsSampler):
        return chosen
    if type(chosen) is not UniformGlobalSampler:
        raise ConfigError(
            f"method {method!r} makes each client's batches of its own examples, no sampler has a say in them, got "
            f"{chosen!r}: leave the default, UniformGlobalSampler(batch_size=...); its batch size is that "
            "of a client's batch"
        )
    return TurnsSampler(chosen.batch_size, seed=chosen.seed, turns=turns)
