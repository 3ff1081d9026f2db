"""Whether what a client makes of an example is the same each time, so that it may be kept on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from psl_flower.client.part import ClientPart
from psl_flower.data import Seeds
from psl_flower.devices import reseed
from psl_flower.errors import ConfigError
from psl_flower.split.compare import Dice

_RULE = "the server keeps activations by example (cache_activations), which must be the same each time"


class Watch:
    """Sees whether random numbers are drawn from the global generators, where all that is random comes from.

    Parameters
    ----------
    device : torch.device
        Whose generator is watched beside that of the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._dice, self._device = Dice(device), device
        self._drawn, self._before = False, self._dice.state()

    def reseed(self, seed: int) -> None:
        """Seed the generators, see `psl_flower.devices.reseed`."""
        self._look()
        reseed(seed, self._device)
        self._before = self._dice.state()

    def note(self) -> None:
        """Note that numbers were drawn."""
        self._drawn = True

    def check(self, what: str) -> None:
        """Raise ConfigError if numbers were drawn since it was asked last; `what` says by what, and the remedy."""
        self._look()
        if self._drawn:
            raise ConfigError(f"{_RULE}, but {what}, or leave cache_activations out")

    def _look(self) -> None:
        now = self._dice.state()
        self._drawn |= now != self._before
        self._before = now


class WatchedSeeds(Seeds):
    """`Seeds` under a watch.

    Parameters
    ----------
    values, device
        As of `Seeds`.
    watch : Watch
    """

    def __init__(self, values: Sequence[int], device: torch.device, watch: Watch) -> None:
        super().__init__(values, device)
        self._watch = watch

    def __call__(self, i: int) -> None:
        """Seed the global generators for the client of that position."""
        self._watch.reseed(self._values[i])

    def generator(self, i: int) -> torch.Generator:
        """Return a generator for that client, which whoever asks for it draws from."""
        self._watch.note()
        return super().generator(i)


def check_frozen(used: Mapping[str, ClientPart]) -> None:
    """Raise ConfigError if a part that was run has parameters that train."""
    for part in used.values():
        if part.parameters:
            raise ConfigError(f"{_RULE}, but {next(iter(part.parameters))!r} of {part.called} trains: freeze it")
