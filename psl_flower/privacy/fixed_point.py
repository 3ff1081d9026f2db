"""Fixed point modulo 2^64: what is masked must be whole numbers, which add up without rounding.

Note [Fixed point]: a value x becomes round(x 2^f), f the binary places, in two's complement. Each rounds by at most
2^-(f+1), so a sum of A clients is exact up to A 2^-(f+1), and to the rounding of the floating-point number that it
becomes. A sum must stay within 63 bits: each client sees to it that its own values are below 2^62 / A.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BITS = 62
_MOST_PLACES = 200  # values below 2^-138 count as zero then


class OutOfRangeError(Exception):
    """A value is too large for the places."""


def places_for(exponent: int, clients: int) -> int:
    """Return the most places with which values up to ``2 ** exponent`` of so many clients add up within 63 bits."""
    return min(_BITS - _bits(clients) - exponent, _MOST_PLACES)


def encode(values: NDArray[Any], places: int, clients: int, *, clip: bool = False) -> NDArray[np.int64]:
    """Return values as whole numbers.

    Parameters
    ----------
    values : array
        Finite floats; or integers, which stay what they are.
    places : int
        f.
    clients : int
        How many are added up.
    clip : bool
        Whether values that are too large become the largest that there is room for.

    Raises
    ------
    OutOfRangeError
        If one is too large.
    """
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    scaled = np.rint(np.ldexp(values.astype(np.float64), places))
    largest = 2.0 ** (_BITS - _bits(clients))
    if clip:
        scaled = scaled.clip(-largest, largest)
    if scaled.size and np.abs(scaled).max() > largest:
        raise OutOfRangeError(f"{np.abs(values).max():.3g} is too large for {places} binary places")
    return scaled.astype(np.int64)


def decode(total: NDArray[np.int64], places: int) -> NDArray[np.float64]:
    """Return a sum as the numbers that it is of."""
    return np.asarray(np.ldexp(total.astype(np.float64), -places))


def _bits(clients: int) -> int:
    return max(clients - 1, 0).bit_length()
