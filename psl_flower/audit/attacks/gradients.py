"""Labels from gradients at a cut, row by row: how long they are, where they point, what a classifier makes of them."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from psl_flower.audit.attacks.base import SERVER
from psl_flower.audit.finding import Finding, Found
from psl_flower.audit.scene import BoolArray, Rows, Scene
from psl_flower.audit.statistics import interval, matched_accuracy, mean_auc, p_value
from psl_flower.typing import FloatArray, IntArray

NAME = "labels from gradients"
_PERMUTATIONS = 99
_ROWS = 1500  # of the attacker's, and of others, that are looked at
_FEATURES = 256  # that a classifier looks at, at most: the first principal directions


def read_gradients(scene: Scene) -> Found:
    """Infer labels from the gradients at each cut (norm and direction: Li et al., arXiv 2102.08504).

    Where labels stay with the clients, the server receives those at the body's outputs and computes those at the first
    cut. Where it has the labels anyway, this is what one learns who sees only what goes back to the clients. Directions
    are taken up to the sign where shadow data tells that a defence turns gradients round.
    """
    found, withheld = Found(), scene.rows("labels") is None
    for rows in scene.every("gradient"):
        party = SERVER if withheld else "who sees what goes back to the clients"
        found.findings += _inferred(rows, f"{NAME} ({rows.where})", party, scene)
    return found


def cluster_outputs(scene: Scene) -> Found:
    """Name clusters of what the server's body puts out, without knowing any label, where it sends that to a tail."""
    rows = scene.rows("outputs")
    if rows is None:
        return Found()
    some = scene.rng().permutation(np.flatnonzero(~rows.shadow))[:_ROWS]
    values = rows.seen(some).flatten(1).double().numpy()
    return Found([_clustered(values, rows.labels[some], "labels from outputs", SERVER, scene)])


def _inferred(rows: Rows, attack: str, party: str, scene: Scene) -> list[Finding]:
    some = rows.chosen(_ROWS, scene.rng())
    directions = rows.seen(some).flatten(1).double().numpy()
    norms = np.linalg.norm(directions, axis=1)
    directions /= np.maximum(norms, 1e-300)[:, None]
    logs = np.log(np.maximum(norms, 1e-300))[:, None]
    known, labels = rows.shadow[some], rows.labels[some]
    classes = range(scene.num_classes)
    signed, unsigned = _alike(directions, labels, known, scene.num_classes)
    sides = np.sign([_mean(logs[known & (labels == c)], 1)[0] - logs[known].mean() for c in classes])
    scores = {
        "norm AUC": logs[~known] * sides,
        "direction AUC": (unsigned if _turned(directions[known], labels[known], scene) else signed)[~known],
        "classifier AUC": _classified(directions, np.concatenate([logs, unsigned], axis=1), labels, known, scene),
    }
    findings = [_auc(name, each, labels[~known], attack, party, scene) for name, each in scores.items()]
    return [*findings, _clustered(directions[~known], labels[~known], attack, party, scene)]


def _alike(
    directions: FloatArray, labels: IntArray, known: BoolArray, num_classes: int
) -> tuple[FloatArray, FloatArray]:
    """Return how much each row points where known rows of each class do, and the same up to the sign, (n, C) each."""
    width = directions.shape[1]
    means, axes = np.zeros((num_classes, width)), np.zeros((num_classes, width))
    for c in range(num_classes):
        some = directions[known & (labels == c)]
        if len(some):
            means[c] = some.mean(axis=0)
            axes[c] = np.linalg.svd(some, full_matrices=False)[2][0]
    return directions @ means.T, np.abs(directions @ axes.T)


def _turned(directions: FloatArray, labels: IntArray, scene: Scene) -> bool:
    """Return whether a defence turns gradients round: half of the known rows tell, by what they make of the others."""
    half = np.arange(len(labels)) % 2 == 0
    signed, unsigned = _alike(directions, labels, half, scene.num_classes)
    return mean_auc(unsigned[~half], labels[~half]) > mean_auc(signed[~half], labels[~half])


def _mean(values: FloatArray, width: int) -> FloatArray:
    return values.mean(axis=0) if len(values) else np.zeros(width)


def _classified(
    directions: FloatArray, others: FloatArray, labels: IntArray, known: BoolArray, scene: Scene
) -> FloatArray:
    """Return the scores of a linear classifier that has learned from the shadow rows, (n, C)."""
    _, _, axes = np.linalg.svd(directions[known] - directions[known].mean(axis=0), full_matrices=False)
    features = np.concatenate([directions @ axes[:_FEATURES].T, others], axis=1)
    features = (features - features[known].mean(axis=0)) / np.maximum(features[known].std(axis=0), 1e-12)
    scores = np.zeros((int((~known).sum()), scene.num_classes))
    if len(np.unique(labels[known])) < 2:
        return scores
    classifier = LogisticRegression(C=0.1, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features[known], labels[known])
    scores[:, classifier.classes_] = classifier.predict_proba(features[~known])
    return scores


def _auc(measure: str, scores: FloatArray, labels: IntArray, attack: str, party: str, scene: Scene) -> Finding:
    low, high = interval(lambda some: mean_auc(scores[some], labels[some]), len(labels), scene.rng())
    return Finding(
        attack=attack,
        party=f"{party}, with shadow data",
        measure=measure,
        value=mean_auc(scores, labels),
        floor=0.5,
        low=low,
        high=high,
    )


def _clustered(values: FloatArray, labels: IntArray, attack: str, party: str, scene: Scene) -> Finding:
    rng = scene.rng()
    found = KMeans(scene.num_classes, n_init=4, random_state=scene.seed).fit_predict(values)
    by_chance = np.array(
        [matched_accuracy(found, rng.permutation(labels), scene.num_classes) for _ in range(_PERMUTATIONS)]
    )
    value = matched_accuracy(found, labels, scene.num_classes)
    return Finding(
        attack=attack,
        party=party,
        measure="k-means, share named right",
        value=value,
        floor=float(by_chance.mean()),
        p_value=p_value(value, by_chance),
    )
