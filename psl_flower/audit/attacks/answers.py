"""Labels without any trick: those that are sent, and those that the model itself gives."""

from __future__ import annotations

import numpy as np
import torch

from psl_flower.audit.attacks.base import SERVER
from psl_flower.audit.finding import Finding, Found
from psl_flower.audit.scene import BoolArray, Scene, run
from psl_flower.audit.statistics import interval
from psl_flower.typing import IntArray

NAME = "labels"


def read_labels(scene: Scene) -> Found:
    """Compare with the true labels what was sent as labels, and what the final model says of the activations."""
    found, seen = Found(), scene.rows("activations")
    sent = scene.rows("labels")
    if sent is not None:
        found.findings.append(_share(sent.values.long().numpy(), sent.labels, ~sent.shadow, "as they are sent", scene))
    outputs = scene.rows("outputs")
    last, behind = (seen, scene.halves.server) if outputs is None else (outputs, scene.tail)
    if last is not None and behind is not None:
        behind.eval()
        with torch.no_grad():
            said = run(behind, last.crossed).argmax(dim=1).numpy()
        found.findings.append(_share(said, last.labels, ~last.shadow, "the model's own answers", scene))
    return found


def _share(said: IntArray, labels: IntArray, others: BoolArray, measure: str, scene: Scene) -> Finding:
    right = (said == labels)[others]
    low, high = interval(lambda some: float(right[some].mean()), len(right), scene.rng())
    return Finding(
        attack=NAME,
        party=SERVER,
        measure=f"{measure}, share that is right",
        value=float(right.mean()),
        floor=float(np.bincount(labels[others]).max() / others.sum()),
        low=low,
        high=high,
    )
