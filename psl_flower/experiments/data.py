"""The data of an experiment: images as bytes on the device, and which of them each client holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psl_flower.app.datasets import SPECS, Split, load_arrays
from psl_flower.app.images import Shifts, shifted
from psl_flower.app.task import augmentation, split_indices, split_labels
from psl_flower.devices import pick_device
from psl_flower.errors import ConfigError
from psl_flower.experiments.setting import Setting
from psl_flower.partition.split import Rows
from psl_flower.population import Population
from psl_flower.typing import IntArray

# keeps the choice of a subset apart from every other use of the seed, see Note [Sampler streams] in samplers/base.py
_SUBSET_STREAM = 4


class DeviceImages:
    """Labelled images that never leave their device; the numbers are those of `psl_flower.app.images.ImageSet`.

    Parameters
    ----------
    images : (N, C, H, W) uint8
    labels : (N,) int64
    mean, std : (C,) float
        Of each channel, on a scale where 255 is 1.
    device : torch.device
    dtype : torch.dtype
        Of the batches.
    memory_format : torch.memory_format
        Of the batches.

    Attributes
    ----------
    labels : (N,) int64 Tensor
        On the device.
    targets : (N,) int64 array
        The same on the host.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: IntArray,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.device = device
        self.targets = np.array(labels, dtype=np.int64)
        self.labels = torch.from_numpy(self.targets).to(device)
        self._pixels = torch.from_numpy(np.array(images)).to(device)  # a copy: never a read-only memory map
        self._mean, self._std = (
            255 * torch.tensor(of, dtype=torch.float32, device=device).view(-1, 1, 1) for of in (mean, std)
        )
        self._dtype, self._memory_format = dtype, memory_format

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, rows: Tensor, shifts: Shifts | None = None) -> tuple[Tensor, Tensor]:
        """Return the images at `rows`, augmented as `shifts` say, and their labels.

        Parameters
        ----------
        rows : (b,) int64
            On the device, as all of `shifts`.
        """
        pixels = self._pixels[rows]
        if shifts is not None:
            pixels = shifted(pixels, shifts)
        # normalised in float32 whatever the dtype: ImageSet's numbers, to the bit
        inputs = pixels.to(torch.float32).sub_(self._mean).div_(self._std)
        return inputs.to(self._dtype, memory_format=self._memory_format), self.labels[rows]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in order, in batches of up to `size`."""
        for rows in torch.split(torch.arange(len(self), device=self.device), size):
            yield self.batch(rows)


@dataclass(frozen=True, eq=False)
class Data:
    """What an experiment trains and tests on.

    Parameters
    ----------
    train, test : DeviceImages
        The dataset's own splits.
    shares : list of (n_k,) int arrays
        The rows of `train` that each client holds.
    num_classes : int
    augmented : bool
        Whether training images are shifted and mirrored.
    """

    train: DeviceImages
    test: DeviceImages
    shares: list[Rows]
    num_classes: int
    augmented: bool = False

    def population(self) -> Population:
        """Return what the server knows of the clients: how many examples they hold, of which classes."""
        width = int(self.train.targets[np.concatenate(self.shares)].max()) + 1  # as the clients' descriptions give it
        counts = np.stack([np.bincount(self.train.targets[rows], minlength=width) for rows in self.shares])
        return Population(np.arange(len(self.shares)), counts.sum(axis=1), counts)


def load_data(setting: Setting) -> Data:
    """Load a setting's data, split among its clients as the default app does.

    Raises
    ------
    ConfigError
        If the data is refused, is less than a batch, or cannot be split among so many clients.
    """
    config, spec = setting.config, SPECS[setting.config.dataset]

    def load(split: Split) -> DeviceImages:
        return DeviceImages(
            *load_arrays(config.dataset, split, config.data_path),
            mean=spec.mean,
            std=spec.std,
            device=pick_device(config.device),
            dtype=torch.float64 if setting.double else torch.float32,
            memory_format=torch.channels_last if setting.channels_last else torch.preserve_format,
        )

    train = load("train")
    shares = split_of(setting, train.targets)
    return Data(train, load("test"), shares, spec.num_classes, augmentation(config) == "crop-flip")


def split_of(setting: Setting, labels: NDArray[np.int64]) -> list[Rows]:
    """Return the rows of the training set, whose labels these are, that each client holds.

    Raises
    ------
    ConfigError
        If the data is less than a batch, or cannot be split among so many clients.
    """
    config = setting.config
    if setting.examples > len(labels):
        raise ConfigError(f"examples must be at most {len(labels)}, those of the training set, got {setting.examples}")
    trained_on = setting.examples or len(labels)
    if config.batch_size > trained_on:
        raise ConfigError(
            f"batch-size must be at most {trained_on}, the examples trained on, got {config.batch_size}: lower it"
        )
    if not setting.examples:
        return split_indices(config, "train", setting.num_clients)
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(_SUBSET_STREAM,)))
    subset = np.sort(rng.choice(len(labels), setting.examples, replace=False))
    return [subset[rows] for rows in split_labels(config, labels[subset], "train", setting.num_clients)]


def check_data(setting: Setting) -> None:
    """Refuse what `load_data` would, without a device.

    Raises
    ------
    ConfigError
        If the data is refused, is less than a batch, or cannot be split among so many clients.
    """
    config = setting.config
    load_arrays(config.dataset, "test", config.data_path)
    split_of(setting, load_arrays(config.dataset, "train", config.data_path)[1])
