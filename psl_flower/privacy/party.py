"""A client's end of secure aggregation: its key, its masks, and what it remembers having given."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from psl_flower.errors import ProtocolError
from psl_flower.failures import Kind
from psl_flower.privacy.cohort import Cohort
from psl_flower.privacy.options import SecureAggregation
from psl_flower.typing import IntArray

_PURPOSE = b"psl_flower secure aggregation"
_CHUNK = 2**15  # numbers of a mask at a time: they stay in the processor's cache
_ZEROS = bytes(8 * _CHUNK)


def fingerprint(key: bytes) -> str:
    """Return what people compare keys by: ``1a2b-3c4d-5e6f-7081``."""
    text = hashlib.sha256(key).hexdigest()
    return "-".join(text[i : i + 4] for i in range(0, 16, 4))


class Party:
    """One client in one run: a pair of keys, and what it has given.

    Note [Given once]: with two sums over the same examples at the same weights, of cohorts that differ by one client,
    the server could take one from the other. So at one state of the weights a client gives each example in one attempt
    only, and in an attempt each stage only once, in one cohort. Then all sums at these weights are of different
    unknowns, each a row of at least `least` ones: nothing about a single one follows from them, whoever is lost when.

    Parameters
    ----------
    session : str
        Names the run.
    private : bytes, optional
        Its private key; made anew by default.
    """

    def __init__(self, session: str, private: bytes | None = None) -> None:
        self.session = session
        self._private = X25519PrivateKey.generate() if private is None else X25519PrivateKey.from_private_bytes(private)
        self.private, self.key = self._private.private_bytes_raw(), self._private.public_key().public_bytes_raw()
        self._pairs: dict[bytes, bytes] = {}
        self._attempt, self._digest = -1, b""
        self._stages: set[str] = set()  # given in this attempt
        self._version = ""  # of the weights
        self._rows: dict[str, IntArray] = {}  # examples given at this version, by kind of data

    # --- what it agrees to -------------------------------------------------------------------------------------------
    def agree(
        self,
        cohort: Cohort,
        options: SecureAggregation,
        client: int,
        stage: str,
        version: str,
        rows: IntArray,
        data: str,
    ) -> None:
        """Take note that the client gives a sum; see Note [Given once].

        Parameters
        ----------
        cohort : Cohort
        options : SecureAggregation
            The client's own.
        client : int
            Its id.
        stage : str
            What the sum is of.
        version : str
            Names the weights.
        rows : (n,) int64
            Its examples, as indices of its data.
        data : str
            Which data: "train" or "test".

        Raises
        ------
        ProtocolError
            If it does not give it.
        """
        at = np.flatnonzero(cohort.clients == client)
        if cohort.session != self.session or len(at) != 1 or cohort.key(int(at[0])) != self.key:
            raise ProtocolError(
                "the request must name this client's key in this run: it is to describe itself anew", Kind.KEY
            )
        if len(cohort) < options.least:
            raise ProtocolError(
                f"{len(cohort)} clients take part, this client gives sums of at least {options.least} only: "
                "give the server the same secure_aggregation, and batches of more clients"
            )
        if cohort.degree != options.degree(len(cohort)):
            raise ProtocolError(
                f"the server wants masks with {cohort.degree} neighbours, this client with "
                f"{options.degree(len(cohort))}: give both the same secure_aggregation"
            )
        if not cohort.is_sound:
            raise ProtocolError("clients that give a sum together must be named once each, with a key of their own")
        digest, once = cohort.digest, "a client gives each example once at the same weights"
        if cohort.attempt < self._attempt:
            raise ProtocolError(f"attempt {cohort.attempt} comes after attempt {self._attempt}: {once}")
        same = cohort.attempt == self._attempt
        if same and (digest != self._digest or stage in self._stages):
            raise ProtocolError(f"stage {stage!r} of attempt {cohort.attempt} was answered: {once}, in one cohort")
        if not same:
            given = self._rows.get(data) if version == self._version else None
            if given is not None and np.isin(rows, given).any():
                raise ProtocolError(f"examples of an earlier attempt are asked for again: {once}")
            if version != self._version:
                self._version, self._rows = version, {}
            before = self._rows.get(data, np.zeros(0, dtype=np.int64))
            self._rows[data] = np.concatenate((before, rows))
            self._attempt, self._digest, self._stages = cohort.attempt, digest, set()
        self._stages.add(stage)

    # --- masks -------------------------------------------------------------------------------------------------------
    def add_masks(self, total: NDArray[np.int64], cohort: Cohort, stage: str, at: int, others: Sequence[int]) -> None:
        """Add to whole numbers, modulo 2^64, the masks that a client shares with some of the others.

        Parameters
        ----------
        total : (n,) int64
            Changed in place.
        stage : str
            Every stage of an attempt has masks of its own.
        at : int
            The client's position.
        others : sequence of int
            Positions.
        """
        terms = cohort.terms(stage)
        numbers = total.view(np.uint64)
        for other in others:
            key = hmac.digest(self._secret(cohort.key(other)), terms, "sha256")
            stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
            combine = np.add if other > at else np.subtract
            for begin in range(0, len(numbers), _CHUNK):
                part = numbers[begin : begin + _CHUNK]
                mask = np.frombuffer(stream.update(_ZEROS[: 8 * len(part)]), dtype="<u8")
                combine(part, mask, out=part)

    def _secret(self, other: bytes) -> bytes:
        """Return what only this client and another know: the same for both."""
        if other not in self._pairs:
            try:
                shared = self._private.exchange(X25519PublicKey.from_public_bytes(other))
            except ValueError as exc:
                raise ProtocolError(f"a key that no mask can be made with: {fingerprint(other)}") from exc
            both = b"".join(sorted((self.key, other)))
            kdf = HKDF(algorithm=SHA256(), length=32, salt=self.session.encode(), info=_PURPOSE + both)
            self._pairs[other] = kdf.derive(shared)
        return self._pairs[other]

    # --- for processes that end with each message --------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return everything; it holds the private key, and stays with the client."""
        return {
            "session": self.session,
            "private": self.private,
            "attempt": self._attempt,
            "digest": self._digest,
            "stages": sorted(self._stages),
            "version": self._version,
            **{f"rows-{data}": rows.tobytes() for data, rows in self._rows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` returned, of the same key."""
        self._attempt, self._digest, self._version = state["attempt"], state["digest"], state["version"]
        self._stages = set(state["stages"])
        self._rows = {
            name.removeprefix("rows-"): np.frombuffer(rows, dtype=np.int64)
            for name, rows in state.items()
            if name.startswith("rows-")
        }
