"""Labels where the tail is on the clients: the server has its weights and each row's gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from psl_flower import tree
from psl_flower.audit.attacks.base import SERVER
from psl_flower.audit.finding import Finding, Found
from psl_flower.audit.recording import Exchange
from psl_flower.audit.scene import Scene, one_tensor, run, with_weights
from psl_flower.audit.statistics import interval
from psl_flower.privacy import decode
from psl_flower.typing import FloatArray, IntArray

MATCHING, COUNTS = "labels by trying each", "class counts from the tail"


def try_labels(scene: Scene) -> Found:
    """Try every label, and take the one that makes the gradient which came back.

    The server sends the outputs and the tail's weights, and receives the gradient of each row. It takes the loss to be
    the cross-entropy.
    """
    scores, labels, known = list[Tensor](), list[Tensor](), list[bool]()
    for exchange in _seen(scene):
        module = _tail_of(scene, exchange)
        outputs, gradient = exchange.sent["outputs"].value, one_tensor(exchange.received["gradient"].value).flatten(1)
        tried = [_gradient(module, outputs, label) for label in range(scene.num_classes)]
        scores.append(torch.stack([functional.cosine_similarity(each, gradient, dim=1) for each in tried], dim=1))
        labels.append(scene.recording.labels(exchange.order))
        known += [exchange.order.client in scene.shadow] * len(labels[-1])
    if not scores:
        return Found()
    alike, true, shadow = torch.cat(scores), torch.cat(labels), torch.tensor(known)
    # a defence may turn gradients round: whether to look at the sign, shadow clients' labels tell
    either = [(way.argmax(dim=1) == true).numpy() for way in (alike, alike.abs())]
    best = max(either, key=lambda right: right[shadow.numpy()].mean())
    right, true = best[~shadow.numpy()], true[~shadow]
    low, high = interval(lambda some: float(right[some].mean()), len(right), scene.rng())
    finding = Finding(
        attack=MATCHING,
        party=f"{SERVER}, with shadow data",
        measure="share that is right",
        value=float(right.mean()),
        floor=float(np.bincount(true.numpy()).max() / len(true)),
        low=low,
        high=high,
    )
    return Found([finding])


def count_classes(scene: Scene) -> Found:
    """Read from the gradient of the last bias how many examples of each class a client had in a step.

    It is the sum of (p - onehot(y)) over the client's examples, divided by those of the step; the server knows p, for
    it has outputs and weights. Of masked sums it knows what they come to over all clients: it can but take everybody
    to have the same share of each class.
    """
    bias = _last_bias(scene)
    if bias is None:
        return Found()
    steps: dict[tuple[int, int], list[Exchange]] = {}
    for exchange in _seen(scene):
        steps.setdefault((exchange.order.epoch, exchange.order.step), []).append(exchange)
    shares = np.bincount(_labels_of_shadow(scene), minlength=scene.num_classes)
    missed, by_chance = list[float](), list[float]()
    for exchanges in steps.values():
        for exchange, read in zip(exchanges, _read(scene, exchanges, bias), strict=True):
            if exchange.order.client not in scene.shadow:
                true = np.bincount(scene.recording.labels(exchange.order).numpy(), minlength=scene.num_classes)
                missed.append(_missed(read, true))
                by_chance.append(_missed(shares / shares.sum() * true.sum(), true))
    if not missed:
        return Found()
    errors = np.array(missed)
    low, high = interval(lambda some: float(errors[some].mean()), len(errors), scene.rng())
    finding = Finding(
        attack=COUNTS,
        party=SERVER,
        measure="share of a client's labels that is miscounted",
        value=float(errors.mean()),
        floor=float(np.mean(by_chance)),
        low=low,
        high=high,
        less=True,
    )
    return Found([finding])


def _read(scene: Scene, exchanges: list[Exchange], bias: str) -> list[FloatArray]:
    """Return what the server takes the class counts of each client of a step to be, (C,) each."""
    rows = [exchange.order.count for exchange in exchanges]
    expected = []
    for exchange in exchanges:
        with torch.no_grad():
            logits = run(_tail_of(scene, exchange), exchange.sent["outputs"].value)
        expected.append(logits.softmax(dim=1).sum(dim=0).double().numpy())
    sums = [exchange.received["tail"].value for exchange in exchanges]
    cohort = exchanges[0].cohort
    if cohort is None:
        return [e - sum(rows) * value[bias].double().numpy() for e, value in zip(expected, sums, strict=True)]
    total = decode(sum(value["values"][bias].numpy() for value in sums), cohort.places["tail"])
    together = sum(expected) - sum(rows) * total
    return [together * n / sum(rows) for n in rows]


def _seen(scene: Scene) -> list[Exchange]:
    """Return the exchanges in which a tail was run whose weights the server has."""
    if scene.tail is None:
        return []
    needed = {"outputs", "gradient"}
    return [
        each
        for each in scene.training
        if needed <= each.sent.keys() | each.received.keys() and each.received["gradient"].value is not None
    ]


def _gradient(tail: nn.Module, outputs: tree.Tree, label: int) -> Tensor:
    """Return the gradient of each row, had it this label, (n, F)."""
    received = tree.map_leaves(lambda leaf: leaf.detach().requires_grad_(), outputs)
    logits = run(tail, received)
    loss = functional.cross_entropy(logits, torch.full((len(logits),), label), reduction="sum")
    found = torch.autograd.grad(loss, tree.leaves(received))
    return torch.cat([each.flatten(1) for each in found], dim=1)


def _tail_of(scene: Scene, exchange: Exchange) -> nn.Module:
    assert scene.halves.tail is not None  # `_seen` has looked
    return with_weights(scene.halves.tail, exchange.weights["tail"])


def _last_bias(scene: Scene) -> str | None:
    named = (
        [] if scene.tail is None else [n for n, p in scene.tail.named_parameters() if p.shape == (scene.num_classes,)]
    )
    return named[-1] if named and named[-1].endswith("bias") else None


def _labels_of_shadow(scene: Scene) -> IntArray:
    known = [scene.recording.labels(e.order) for e in scene.training if e.order.client in scene.shadow]
    return torch.cat(known).numpy()


def _missed(read: FloatArray, true: IntArray) -> float:
    """Return the share of examples that counts are wrong about: half the L1 distance."""
    return float(np.abs(read - true).sum() / 2 / true.sum())
