"""What only one client knows in one run: noise that nobody else can draw, and take off again.

It is no seed of the run's, for the server knows those. The same question has the same answer: what is asked for again
shows nothing new.
"""

from __future__ import annotations

import hmac
import secrets
from functools import cached_property

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from psl_flower.typing import FloatArray, IntArray


class Secret:
    """A client's secret in a run.

    Parameters
    ----------
    value : bytes, optional
        32 of them; drawn anew by default.
    """

    def __init__(self, value: bytes | None = None) -> None:
        self.value = secrets.token_bytes(32) if value is None else value

    def key(self, purpose: bytes) -> bytes:
        """Return 32 bytes for one purpose, HMAC-SHA256 of it: they tell nothing of those for another."""
        return hmac.digest(self.value, purpose, "sha256")

    @cached_property
    def tag_keys(self) -> tuple[bytes, bytes]:
        """Keys for the tags of batches, made in every step: one to tell which secret it is, one for the batch."""
        return self.key(b"batch tag: which secret"), self.key(b"batch tag")

    def uniform(self, purpose: bytes, examples: IntArray, width: int) -> FloatArray:
        """Return random numbers for each of some examples.

        Parameters
        ----------
        purpose : bytes
        examples : (n,) int64
            Not negative.
        width : int
            Numbers an example.

        Returns
        -------
        (n, width) float64
            Uniform above 0 and below 1, AES in counter mode; an example's do not depend on the others.
        """
        cipher, zeros = algorithms.AES(self.key(purpose)), bytes(8 * width)
        drawn = np.empty((len(examples), width), dtype="<u8")
        for row, example in zip(drawn, examples.tolist(), strict=True):
            start = modes.CTR(example.to_bytes(8, "big") + bytes(8))
            row[:] = np.frombuffer(Cipher(cipher, start).encryptor().update(zeros), dtype="<u8")
        # 52 bits and a half: neither 0 nor 1, which would be infinite as normal numbers
        return np.asarray(((drawn >> np.uint64(12)) + 0.5) * 2.0**-52)
