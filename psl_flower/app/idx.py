"""The idx file format of MNIST and Fashion-MNIST: a big-endian header, then raw bytes."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from psl_flower.errors import ConfigError

_UNSIGNED_BYTE = 8  # the only element type these datasets use


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzip-compressed if its name ends in ``.gz``.

    Returns
    -------
    uint8 array
        Of the shape the header names.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not an idx file of unsigned bytes, or its length is not what its header says.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc
    # two zero bytes, the element type, the number of dimensions, then every dimension as a 32-bit integer
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTE)):
        raise ConfigError(f"{path} is not an idx file of unsigned bytes: it starts with {content[:4].hex(' ')!r}")
    start = 4 + 4 * content[3]
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], dtype=">u4"))
    if len(shape) != content[3] or len(content) - start != math.prod(shape):
        raise ConfigError(
            f"{path} is damaged: its header names {shape}, {math.prod(shape)} bytes, but {len(content) - start} follow"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
