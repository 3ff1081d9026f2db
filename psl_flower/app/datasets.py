"""The datasets the default app knows, and where it finds them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from psl_flower.app.array_cache import Arrays, cache_dir, cached_arrays, exclusive
from psl_flower.app.idx import read_idx
from psl_flower.errors import ConfigError
from psl_flower.extras import check_extra, extra

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What is known of a dataset before any of it is read."""

    shape: tuple[int, int, int]  # (C, H, W) of every image
    num_classes: int
    num_examples: int  # for training
    mean: tuple[float, ...]  # of each channel's training pixels, on a scale of 0 to 1
    std: tuple[float, ...]
    mirrored: bool = False  # whether mirror images look natural, so that crop_flip helps


SPECS = {
    "digits": DatasetSpec(shape=(1, 8, 8), num_classes=10, num_examples=1437, mean=(0.3054,), std=(0.3760,)),
    "fashion-mnist": DatasetSpec(shape=(1, 28, 28), num_classes=10, num_examples=60_000, mean=(0.2860,), std=(0.3530,)),
    "cifar10": DatasetSpec(
        shape=(3, 32, 32),
        num_classes=10,
        num_examples=50_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        mirrored=True,
    ),
    "cifar100": DatasetSpec(
        shape=(3, 32, 32),
        num_classes=100,
        num_examples=50_000,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        mirrored=True,
    ),
}

_DIGITS_TEST_SIZE = 360  # a fifth of the 1,797
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_TORCHVISION_CLASS = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def check_dataset(name: str, data_path: str = "") -> None:
    """Refuse a dataset that `load_arrays` could not read here, without reading it.

    Raises
    ------
    ConfigError
        If it is not in the folder, or the package that reads it is not installed.
    """
    if name == "digits":
        _check_no_path(data_path)
        check_extra("sklearn", "vision", "the dataset 'digits'")
    elif not data_path:
        check_extra("torchvision", "vision", f"the download of {name}")
    elif any(_files_of(split, Path(data_path).expanduser())[1] for split in ("train", "test")):
        check_extra("pyarrow", "vision", "a dataset in parquet files")


@lru_cache(maxsize=4)
def load_arrays(name: str, split: Split, data_path: str = "") -> Arrays:
    """Load one split of a dataset; what it returns is kept for as long as the process lives.

    Parameters
    ----------
    name : str
        A key of `SPECS`.
    split : "train" or "test"
        The dataset's own; for digits, which has none, a stratified four fifths and the rest.
    data_path : str
        Folder with idx files (``train-images-idx3-ubyte``, ``t10k-...``, plain or ``.gz``) or with parquet files
        (``train*.parquet``, ``test*.parquet``). Empty: scikit-learn's copy of digits, torchvision's download of the
        others.

    Returns
    -------
    images : (N, C, H, W) uint8
    labels : (N,) int64

    Raises
    ------
    ConfigError
        If the data cannot be found, read or downloaded, or is not what `name` promises.
    """
    if name == "digits":
        _check_no_path(data_path)
        return _load_digits(split)
    images, labels = _load_files(name, split, Path(data_path).expanduser()) if data_path else _download(name, split)
    spec = SPECS[name]
    source = data_path or "torchvision"
    if images.shape[1:] != spec.shape:
        raise ConfigError(f"images of {name} have shape {spec.shape}, those of {source} {images.shape[1:]}")
    if len(images) != len(labels) or not len(images):
        raise ConfigError(f"{name} needs one label an image, {source} has {len(images)} images, {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= spec.num_classes:
        raise ConfigError(
            f"labels of {name} are 0 to {spec.num_classes - 1}, those of {source} {labels.min()} to {labels.max()}"
        )
    return images, labels


def _check_no_path(data_path: str) -> None:
    if data_path:
        raise ConfigError(f"dataset 'digits' comes with scikit-learn and takes no data-path, got {data_path!r}")


def _load_digits(split: Split) -> Arrays:
    with extra("vision", "the dataset 'digits'"):
        from sklearn.datasets import load_digits  # takes a second to import: only those who use it pay
        from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # 17 grey levels over the whole byte
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=_DIGITS_TEST_SIZE, stratify=labels, random_state=0)
    rows = train if split == "train" else test
    return images[rows], labels[rows]


def _load_files(name: str, split: Split, folder: Path) -> Arrays:
    idx, parquet = _files_of(split, folder)
    if idx:
        images, labels = map(read_idx, idx)
        return images[:, None], labels.astype(np.int64)
    with extra("vision", "a dataset in parquet files"):
        from psl_flower.app.parquet import read_parquet
    return cached_arrays(parquet, lambda: read_parquet(parquet, SPECS[name].shape))


def _files_of(split: Split, folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the idx files of images and labels, or the parquet files that there are in their place."""
    idx = [_idx_file(folder, f"{_IDX_PREFIX[split]}-{what}-ubyte") for what in ("images-idx3", "labels-idx1")]
    found = [path for path in idx if path is not None]
    if len(found) == len(idx):
        return found, []
    if parquet := sorted(folder.glob(f"{split}*.parquet")):
        return [], parquet
    raise ConfigError(
        f"data-path must be a folder with {_IDX_PREFIX[split]}-images-idx3-ubyte[.gz] and "
        f"{_IDX_PREFIX[split]}-labels-idx1-ubyte[.gz], or with {split}*.parquet; {folder} "
        + ("holds neither" if folder.is_dir() else "is not a folder")
    )


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _download(name: str, split: Split) -> Arrays:
    with extra("vision", f"the download of {name}"):
        from psl_flower.torchvision_compat import import_torchvision  # takes a second: only those who use it pay

        datasets = import_torchvision().datasets
    root = cache_dir() / "torchvision"
    try:
        with exclusive("torchvision"):  # one download, however many processes need it
            dataset: Any = getattr(datasets, _TORCHVISION_CLASS[name])(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as exc:
        raise ConfigError(
            f"{name} cannot be downloaded through torchvision ({exc}): set data-path to a folder that holds it"
        ) from exc
    images = np.asarray(dataset.data)
    images = images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images, np.asarray(dataset.targets, dtype=np.int64)
