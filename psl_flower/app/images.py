"""An in-memory image dataset that serves whole batches, and the augmentation of the paper's set-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from psl_flower.data import Seeds
from psl_flower.errors import ConfigError

Augment = Callable[[Tensor], Tensor]


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images held as bytes, normalised (and augmented) when they are fetched.

    A batch is fetched in one go: `get_batch` is what SplitClient calls, ``__getitems__`` what torch's DataLoader does.

    Parameters
    ----------
    images : (M, C, H, W) uint8
        Shared, never copied or written to; a memory-mapped array stays on disk.
    labels : (M,) int64
        The label of every image.
    mean, std : (C,) float
        Of each channel, on a scale where 255 is 1.
    indices : (N,) int, optional
        The images that belong to this set, in its order. All of them, if not given.
    augment : callable, optional
        Maps a batch of images, (b, C, H, W) uint8, to one of the same shape. Random numbers come from torch's global
        generator, which SplitClient seeds for every step, so that a repeated fetch gives the same pixels.

    Attributes
    ----------
    targets : (N,) int64
        The labels of this set, known without loading an image.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        indices: NDArray[np.intp] | None = None,
        augment: Augment | None = None,
    ) -> None:
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ConfigError(f"images must be (M, C, H, W) uint8, got {images.shape} {images.dtype}")
        if labels.shape != images.shape[:1]:
            raise ConfigError(f"labels must have shape {images.shape[:1]}, one an image, got {labels.shape}")
        self._images = images
        self._indices = np.arange(len(images)) if indices is None else indices
        self._mean = 255 * torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = 255 * torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self._scale = (tuple(mean), tuple(std))
        self._augment = augment
        self.targets: NDArray[np.int64] = labels[self._indices].astype(np.int64, copy=False)

    def __len__(self) -> int:
        return len(self._indices)

    def get_batch(self, indices: ArrayLike) -> tuple[Tensor, Tensor]:
        """Return the images and labels at `indices`: (b, C, H, W) float32 and (b,) int64."""
        rows = np.asarray(indices, dtype=np.int64)
        # advanced indexing copies, so a read-only memory map is never handed to torch
        pixels = torch.from_numpy(np.asarray(self._images[self._indices[rows]]))
        if self._augment is not None:
            pixels = self._augment(pixels)
        return self._normalised(pixels), torch.from_numpy(self.targets[rows])

    @staticmethod
    def get_batches(
        sets: Sequence[ImageSet], indices: Sequence[NDArray[np.int64]], seed: Seeds
    ) -> tuple[Tensor, Tensor] | None:
        """Return what joining the sets' batches would give, in one go; see `psl_flower.data.read_together`."""
        first = sets[0]
        if first._augment not in (None, crop_flip) or not all(first._differs_in_examples(each) for each in sets):
            return None
        rows = np.concatenate([each._indices[some] for each, some in zip(sets, indices, strict=True)])
        pixels = torch.from_numpy(np.asarray(first._images[rows]))
        if first._augment is crop_flip:
            pixels = shifted(pixels, draw_each(seed, [len(some) for some in indices]))
        targets = np.concatenate([each.targets[some] for each, some in zip(sets, indices, strict=True)])
        return first._normalised(pixels), torch.from_numpy(targets)

    def _differs_in_examples(self, other: ImageSet) -> bool:
        """Return whether another set is of the same images, and makes the same of them."""
        same = self._images is other._images and self._augment is other._augment
        return same and self._scale == other._scale

    def _normalised(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).sub_(self._mean).div_(self._std)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.get_batch([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*self.get_batch(indices), strict=True))


class Shifts(NamedTuple):
    """How each image of a batch is augmented by `crop_flip`: its crop and its mirroring, (b,) each."""

    top: Tensor  # int64, 0 to twice the padding
    left: Tensor
    mirrored: Tensor  # bool


def crop_flip(images: Tensor, padding: int = 1) -> Tensor:
    """Shift each image by up to `padding` pixels (zeros move in) and mirror every other one, at random.

    Parameters
    ----------
    images : (b, C, H, W)
        Any dtype.
    padding : int
        Pixels added at every side before the crop (docs/method.md, 6: 1).

    Returns
    -------
    (b, C, H, W) Tensor
        A copy; each image has a crop and a mirroring of its own.
    """
    return shifted(images, draw_shifts(len(images), padding), padding)


def draw_shifts(count: int, padding: int = 1) -> Shifts:
    """Draw the augmentation of `count` images on the CPU, from torch's global generator."""
    crops, chances = _draw(count, padding)
    return Shifts(crops[0], crops[1], chances < 0.5)


def draw_each(seeds: Seeds, counts: Sequence[int], padding: int = 1) -> Shifts:
    """Draw the augmentation of the images of several clients, as each by itself does: so many of each, on the CPU."""
    drawn = [_draw(count, padding, seeds.generator(i)) for i, count in enumerate(counts)]
    top, left = torch.cat([crops for crops, _ in drawn], dim=1)
    return Shifts(top, left, torch.cat([chances for _, chances in drawn]) < 0.5)


def _draw(count: int, padding: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    crops = torch.randint(2 * padding + 1, (2, count), generator=generator)
    return crops, torch.rand(count, generator=generator)


def shifted(images: Tensor, shifts: Shifts, padding: int = 1) -> Tensor:
    """Return the images as `shifts` say, which must be on their device; see `crop_flip`."""
    count, channels, height, width = images.shape
    arange = partial(torch.arange, device=images.device)
    padded = functional.pad(images, (padding,) * 4)
    rows = shifts.top[:, None] + arange(height)  # (b, H)
    there = arange(width)
    columns = shifts.left[:, None] + torch.where(shifts.mirrored[:, None], there.flip(0), there)  # (b, W)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (b, H, W)
    # several times as fast as indexing by image, channel, row and column
    found = padded.flatten(2).gather(2, pixels.view(count, 1, height * width).expand(-1, channels, -1))
    return found.view(images.shape)
