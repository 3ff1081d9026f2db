"""Image datasets in the parquet schema of the Hugging Face hub: encoded images and integer labels."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from psl_flower.app.array_cache import Arrays
from psl_flower.errors import ConfigError

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("fine_label", "label")  # CIFAR-100 has coarse labels too
_ROWS_AT_ONCE = 1000
_SECONDS_BETWEEN_LINES = 2.0

_log = logging.getLogger("flwr.psl_flower")


def read_parquet(paths: Sequence[Path], shape: tuple[int, int, int]) -> Arrays:
    """Decode every image of parquet files.

    Parameters
    ----------
    paths : sequence of Path
        Files with a column ``img`` or ``image`` (a struct whose field ``bytes`` is an encoded image, or such bytes
        themselves) and a column ``label`` or ``fine_label``; their rows follow one another.
    shape : (C, H, W)
        Of every image; 1 or 3 channels.

    Returns
    -------
    images : (N, C, H, W) uint8
    labels : (N,) int64

    Raises
    ------
    ConfigError
        If a file cannot be read, lacks a column, or holds something else than images of that shape.
    """
    total = sum(_open(path).metadata.num_rows for path in paths)
    images = np.empty((total, *shape), dtype=np.uint8)
    labels = np.empty(total, dtype=np.int64)
    done, started = 0, time.monotonic()
    reported = started
    for path in paths:
        file = _open(path)
        image_column = _find(file, path, _IMAGE_COLUMNS)
        label_column = _find(file, path, _LABEL_COLUMNS)
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[image_column, label_column]):
            encoded = batch.column(image_column)
            if pyarrow.types.is_struct(encoded.type):
                encoded = encoded.field("bytes")
            labels[done : done + len(batch)] = batch.column(label_column).to_numpy(zero_copy_only=False)
            for content in encoded.to_pylist():
                images[done] = _decode(content, shape, path, done)
                done += 1
            now = time.monotonic()
            if now - reported > _SECONDS_BETWEEN_LINES:
                left = (now - started) * (total - done) / done
                _log.info("decoding %s: %d of %d images, %.0f s left", path.name, done, total, left)
                reported = now
    return images, labels


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as exc:
        raise ConfigError(f"{path} cannot be read as parquet: {exc}") from exc


def _find(file: pq.ParquetFile, path: Path, names: tuple[str, ...]) -> str:
    columns = file.schema_arrow.names
    for name in names:
        if name in columns:
            return name
    raise ConfigError(f"{path} must have a column {' or '.join(map(repr, names))}, it has {columns}")


def _decode(content: bytes | None, shape: tuple[int, int, int], path: Path, row: int) -> np.ndarray[tuple[int, ...]]:
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(content or b"")) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, UnidentifiedImageError) as exc:
        raise ConfigError(f"image {row} of {path} cannot be decoded: {exc}") from exc
    if pixels.shape[:2] != (height, width):
        raise ConfigError(f"images must be {height} x {width} pixels, image {row} of {path} is {pixels.shape[:2]}")
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)
