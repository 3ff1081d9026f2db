"""Where the planner's clients come from: a file of sizes, a file of labels, or made-up labels, split as for a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psl_flower.checks import check_choice, check_int
from psl_flower.errors import ConfigError
from psl_flower.partition.split import extended_dirichlet_split, iid_split
from psl_flower.population import Population
from psl_flower.typing import IntArray

# (classes a client, Dirichlet alpha) of the label-skewed splits, docs/method.md, 5
SPLITS: dict[str, tuple[int, float] | None] = {"iid": None, "mild": (5, 3.0), "severe": (2, 3.0)}


def split_labels(
    labels: NDArray[Any],
    num_clients: int,
    split: str,
    rng: np.random.Generator,
    *,
    classes_per_client: int | None = None,
    alpha: float | None = None,
) -> Population:
    """Split labelled examples among clients and return who holds how much of which class.

    Parameters
    ----------
    labels : (N,) array
        Any values that can be compared.
    num_clients : int
        K.
    split : {"iid", "mild", "severe"}
        Mild gives each client 5 classes, severe 2, both with alpha = 3.
    rng : np.random.Generator
        Splits.
    classes_per_client, alpha
        Instead of the split's own, where it has any.

    Raises
    ------
    ConfigError
        If the split is unknown or impossible.
    """
    skew = SPLITS[check_choice(split, "split", SPLITS)]
    if skew is None:
        if classes_per_client is not None or alpha is not None:
            raise ConfigError("classes per client and alpha shape the splits 'mild' and 'severe', got split 'iid'")
        parts = iid_split(len(labels), num_clients, rng)
    else:
        classes = skew[0] if classes_per_client is None else classes_per_client
        concentration = skew[1] if alpha is None else alpha
        parts = extended_dirichlet_split(labels, num_clients, classes, concentration, rng)
    codes = np.unique(labels, return_inverse=True)[1]
    num_classes = int(codes.max()) + 1
    counts = np.stack([np.bincount(codes[part], minlength=num_classes) for part in parts])
    return Population(np.arange(num_clients), counts.sum(axis=1), counts)


def balanced_labels(num_examples: int, num_classes: int) -> IntArray:
    """Return labels of classes whose sizes differ by at most 1, (N,) int64.

    Raises
    ------
    ConfigError
        If there are fewer examples than classes.
    """
    check_int(num_examples, "num_examples", least=1)
    check_int(num_classes, "num_classes", least=1)
    if num_examples < num_classes:
        raise ConfigError(f"every class needs an example, got {num_examples} examples of {num_classes} classes")
    return np.arange(num_examples, dtype=np.int64) % num_classes


def read_labels(path: Path) -> NDArray[Any]:
    """Read labels from an .npy file, or from a text or CSV file with one label a line.

    Raises
    ------
    ConfigError
        If the file cannot be read, or does not hold one label an example.
    """
    try:
        if path.suffix == ".npy":
            labels: NDArray[Any] = np.load(path, allow_pickle=False)
        else:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            if lines and lines[0].lower() in ("label", "labels"):
                del lines[0]
            labels = np.array(lines)
    except (OSError, ValueError, EOFError) as exc:
        raise ConfigError(f"the labels in {path} cannot be read: {exc}") from exc
    if labels.ndim != 1 or not len(labels):
        raise ConfigError(f"{path} must hold one label an example, got shape {labels.shape}")
    return labels


def read_population(path: Path) -> Population:
    """Read who holds how much from a CSV file.

    Its first column is ``client_id``; either the second is ``size``, or all others are classes and hold the number of
    examples of each (then samplers that go by class can be planned, too).

    Raises
    ------
    ConfigError
        If the file cannot be read, or its content does not make a population.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in row] for row in csv.reader(file) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"the sizes in {path} cannot be read: {exc}") from exc
    if len(lines) < 2:
        raise ConfigError(f"{path} needs two lines at least, a header and one a client, got {len(lines)}")
    header, rows = lines[0], lines[1:]
    if header[0] != "client_id" or len(header) < 2:
        raise ConfigError(f"{path} must have the columns client_id and size, or client_id and classes, got {header}")
    try:
        table = np.array([[int(cell) for cell in row] for row in rows], dtype=np.int64)
    except (ValueError, OverflowError) as exc:
        raise ConfigError(f"{path} must hold {len(header)} whole numbers a line: {exc}") from exc
    if table.shape[1] != len(header):
        raise ConfigError(f"{path} must hold {len(header)} whole numbers a line, got {table.shape[1]}")
    ids, counts = table[:, 0], table[:, 1:]
    if header[1:] == ["size"]:
        return Population(ids, counts[:, 0])
    return Population(ids, counts.sum(axis=1), counts)
