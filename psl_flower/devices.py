"""Where torch computes, and with which randomness."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from psl_flower.errors import ConfigError


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch for a while, and put them back.

    Saving and putting back takes some 0.3 ms, far longer than seeding: whoever works for many clients in a row opens
    one block, and calls `reseed` in it for each.

    Parameters
    ----------
    seed : int
        Not negative, below 2**64.
    device : torch.device
        Whose generator is seeded and put back beside that of the CPU.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one is what users draw from)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            reseed(seed, device)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def generators() -> Callable[[], None]:
    """Return what puts the global generators of Python, numpy and torch (on the CPU) back to where they are now."""
    python, legacy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    def back() -> None:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(state)

    return back


def reseed(seed: int, device: torch.device) -> None:
    """Seed the global generators of Python, numpy and torch; only within a `seeded` block, which puts them back.

    Takes some 10 µs on the CPU. Equal seeds give equal numbers in any process, whatever was drawn before.
    """
    random.seed(seed)
    # numpy and torch both start a Mersenne twister from 32 bits: of the same ones, they would draw the same numbers
    np.random.seed((seed ^ 0x9E3779B9) & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all GPUs too, for good
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


@contextmanager
def own_modes() -> Iterator[None]:
    """Take gradients within, whatever mode torch is in outside.

    Raises
    ------
    ConfigError
        Under autocast, which clients elsewhere would know nothing of.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ConfigError(
            "a run must not be under torch.autocast, which the clients' processes know nothing of: leave it out, and "
            "pass precision='bf16' to ParallelSplitLearning, for server and clients alike"
        )
    with torch.inference_mode(False), torch.enable_grad():
        yield


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device named; "auto" is the first GPU if there is one, else the CPU.

    Raises
    ------
    ConfigError
        If torch does not know the device, or it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        rule = "device must be 'auto' or one that torch has here, such as 'cpu' or 'cuda:0'"
        raise ConfigError(f"{rule}, got {str(device)!r}: {str(exc).splitlines()[0]:.120}") from exc
    return torch.device(device)
