"""Where torch computes, and with which randomness.

Note [numpy's generator]: numpy takes 40 µs to tell the state of its global generator, and as much to set it: more than
all else that seeding takes. Its words are read and written in place instead. They are all of the state, unless a normal
number is held back, for numpy draws them in pairs; whether one is, only the slow way tells, which is taken if words are
not as they were when surely none was.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator

from psl_flower.errors import ConfigError


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch for a while, and put them back.

    Saving and putting back takes some 0.04 ms, longer than seeding: whoever works for many clients in a row opens one
    block, and calls `reseed` in it for each.

    Parameters
    ----------
    seed : int
        Not negative, below 2**64.
    device : torch.device
        Whose generator is seeded and put back beside that of the CPU.
    """
    python, numpy = random.getstate(), _numpy_back()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            reseed(seed, device)
            yield
        finally:
            random.setstate(python)
            numpy()


def generators() -> Callable[[], None]:
    """Return what puts the global generators of Python, numpy and torch (on the CPU) back to where they are now."""
    python, numpy, state = random.getstate(), _numpy_back(), torch.get_rng_state()

    def back() -> None:
        random.setstate(python)
        numpy()
        torch.set_rng_state(state)

    return back


def reseed(seed: int, device: torch.device) -> None:
    """Seed the global generators of Python, numpy and torch; only within a `seeded` block, which puts them back.

    Takes some 10 µs on the CPU. Equal seeds give equal numbers in any process, whatever was drawn before.
    """
    random.seed(seed)
    # numpy and torch both start a Mersenne twister from 32 bits: of the same ones, they would draw the same numbers
    _seed_numpy((seed ^ 0x9E3779B9) & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all GPUs too, for good
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


# --- numpy's global generator ----------------------------------------------------------------------------------------
_WORDS = 4 * 625  # bytes: those that it draws from, and how many of them are used up
_alone = b""  # its words when it surely held no normal number back


def numpy_words() -> bytes:
    """Return the words of numpy's global generator, only to compare them; see Note [numpy's generator]."""
    return ctypes.string_at(_numpy_address(), _WORDS)


def _numpy_address() -> int:
    found = get_bit_generator()
    if not isinstance(found, np.random.MT19937):
        raise ConfigError(
            "numpy's global generator must be one that np.random.seed can seed, the MT19937 that it is at first, got "
            f"{type(found).__name__}: leave np.random.set_bit_generator out, or make a generator of your own"
        )
    return int(found.ctypes.state_address)


def _seed_numpy(seed: int) -> None:
    global _alone
    np.random.seed(seed)  # noqa: NPY002 (the global one is what users draw from)
    _alone = numpy_words()


def _numpy_back() -> Callable[[], None]:
    """Return what puts numpy's global generator back to where it is now."""
    words = numpy_words()
    return partial(_put_numpy_back, words, None if words == _alone else np.random.get_state())  # noqa: NPY002


def _put_numpy_back(words: bytes, state: Any) -> None:
    global _alone
    if state is not None and state[3]:  # a number is held back
        np.random.set_state(state)  # noqa: NPY002
        return
    np.random.seed(0)  # noqa: NPY002 (holds none back)
    ctypes.memmove(_numpy_address(), words, _WORDS)
    _alone = words


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
