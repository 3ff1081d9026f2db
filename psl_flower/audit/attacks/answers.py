"""Labels without any trick: those that are sent, and those that the model itself gives."""

from __future__ import annotations

import numpy as np

from psl_flower.audit.attacks.base import SERVER
from psl_flower.audit.finding import Finding, Found
from psl_flower.audit.scene import Rows, Scene
from psl_flower.audit.statistics import interval
from psl_flower.typing import IntArray

NAME = "labels"


def read_labels(scene: Scene) -> Found:
    """Compare with the true labels what was sent as labels, and what the final model says of the activations."""
    found, sent, said = Found(), scene.rows("labels"), scene.answers(test=False)
    if sent is not None:
        found.findings.append(_share(sent.seen(np.arange(len(sent))).long().numpy(), sent, "as they are sent", scene))
    if said is not None:
        found.findings.append(_share(*said, "the model's own answers", scene))
    return found


def _share(said: IntArray, rows: Rows, measure: str, scene: Scene) -> Finding:
    labels = rows.labels[~rows.shadow]
    right = said[~rows.shadow] == labels
    low, high = interval(lambda some: float(right[some].mean()), len(right), scene.rng())
    return Finding(
        attack=NAME,
        party=SERVER,
        measure=f"{measure}, share that is right",
        value=float(right.mean()),
        floor=float(np.bincount(labels).max() / len(labels)),
        low=low,
        high=high,
    )
