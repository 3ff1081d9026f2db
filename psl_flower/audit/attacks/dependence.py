"""Distance correlation: whether what crosses has anything to do with the inputs, in whatever way."""

from __future__ import annotations

import numpy as np
import torch

from psl_flower.audit.attacks.base import SERVER
from psl_flower.audit.finding import Finding, Found
from psl_flower.audit.scene import Scene
from psl_flower.audit.statistics import p_value
from psl_flower.privacy import corrected_distance_correlation

NAME = "distance correlation"
_ROWS, _PERMUTATIONS = 600, 199


def measure_dependence(scene: Scene) -> Found:
    """Measure the dependence of activations on inputs, with a permutation test.

    No attack by itself: it says how much there is to be found, not how. The estimate is the bias-corrected one, which
    is about 0 for what is independent, however many dimensions there are; the plain one tends to 1 then (Szekely and
    Rizzo 2013, doi:10.1016/j.jmva.2013.02.012; NoPeek, arXiv 2008.09161, has the plain one).
    """
    rows = scene.rows("activations")
    if rows is None:
        return Found()
    rng = scene.rng()
    chosen = rng.permutation(np.flatnonzero(~rows.shadow))[:_ROWS]
    value, by_chance = corrected_distance_correlation(
        rows.inputs[torch.from_numpy(chosen)].flatten(1), rows.seen(chosen).flatten(1), rng, _PERMUTATIONS
    )
    finding = Finding(
        attack=NAME,
        party=SERVER,
        measure="bias-corrected dCor",
        value=value,
        floor=float(by_chance.mean()),
        p_value=p_value(value, by_chance),
    )
    return Found([finding])
