"""Whether an example that the server holds was among those that clients trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from psl_flower.audit.attacks.base import SERVER
from psl_flower.audit.attacks.decoder import learned_decoder
from psl_flower.audit.finding import Finding, Found
from psl_flower.audit.scene import Scene, crossing, one_tensor, run, with_weights
from psl_flower.audit.statistics import auc, interval
from psl_flower.typing import FloatArray

NAME = "membership"
_EACH = 200  # members, and as many others


def recognise_members(scene: Scene) -> Found:
    """Tell members from others, as many of each.

    By the loss: the final model is surer of what it was trained on (Yeom et al., arXiv 1709.01604). By a match: the
    server runs the head that it handed out on the example, and looks whether the same came back in some step. By a
    decoded match: it looks whether the example is among what a decoder makes of all that came, which has learned what
    clients do to their activations, too.
    """
    rows = scene.rows("activations")
    if rows is None:
        return Found()
    rng, test = scene.rng(), scene.test
    trained = np.flatnonzero(~rows.shadow)
    size = min(_EACH, len(trained), len(test[1]))
    member, other = (torch.from_numpy(rng.permutation(of)[:size]) for of in (trained, np.arange(len(test[1]))))
    inputs = torch.cat([rows.inputs[member], test[0][other]])
    labels = torch.cat([torch.from_numpy(rows.labels)[member], test[1][other]])
    decoded = learned_decoder(scene)(rows.seen(trained))
    scores = {
        "loss AUC": _loss(scene, inputs, labels),
        "match AUC": _match(scene, inputs),
        "decoded match AUC": _nearest(inputs, decoded).numpy(),
    }
    findings = []
    for measure, score in scores.items():
        if score is not None:
            findings.append(_auc(measure, score, size, scene))
    return Found(findings)


def _auc(measure: str, score: FloatArray, size: int, scene: Scene) -> Finding:
    members = np.arange(2 * size) < size
    low, high = interval(lambda some: auc(score[some], members[some]), 2 * size, scene.rng())
    value = auc(score, members)
    return Finding(attack=NAME, party=SERVER, measure=measure, value=value, floor=0.5, low=low, high=high)


def _loss(scene: Scene, inputs: Tensor, labels: Tensor) -> FloatArray | None:
    """Return minus the final model's loss of each example, (n,)."""
    if len(scene.halves.parts) == 3 and scene.tail is None:
        return None
    with torch.no_grad():
        values = scene.halves.client.eval()(inputs)
        if len(scene.halves.parts) == 3:
            values = values[0]
        for part in scene.halves.parts[1:]:
            values = run(part.eval(), values)
        loss = functional.cross_entropy(values, labels, reduction="none")
    return -loss.double().numpy()


def _match(scene: Scene, inputs: Tensor) -> FloatArray:
    """Return minus the least distance of each example's activations to what others sent in any step, (n,)."""
    received: dict[str, tuple[torch.nn.Module, list[Tensor]]] = {}
    for exchange in scene.training:
        if "activations" in exchange.received and exchange.order.client not in scene.shadow:
            weights = exchange.head
            if weights.version not in received:
                received[weights.version] = (with_weights(scene.halves.client, weights), [])
            received[weights.version][1].append(one_tensor(exchange.received["activations"].value).flatten(1))
    nearest = []
    with torch.no_grad():
        for head, sent in received.values():
            mine, theirs = crossing(head, inputs).flatten(1), torch.cat(sent)
            scale = theirs.square().sum(dim=1).mean().sqrt().clamp_min(1e-12)
            nearest.append(_nearest(mine, theirs) / scale)
    return torch.stack(nearest).max(dim=0).values.numpy()


def _nearest(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return minus the distance of each row, (n,), to the nearest of others."""
    exact = "donot_use_mm_for_euclid_dist"  # the other way is not, near 0
    apart = torch.cdist(mine.flatten(1).double(), theirs.flatten(1).double(), compute_mode=exact)
    return -apart.min(dim=1).values
