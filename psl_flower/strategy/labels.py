"""Where labels stay with the clients, the server needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from psl_flower.errors import ConfigError
from psl_flower.methods import SplitMethod
from psl_flower.samplers.base import Sampler
from psl_flower.server import Loss

LabelCounts = str | Mapping[int, Sequence[int]] | None


def check_labels_stay(
    method: SplitMethod,
    sampler: Sampler,
    loss: Loss,
    classification: bool,
    metrics: Mapping[str, Any],
    label_counts: LabelCounts = None,
) -> None:
    """Refuse what needs labels on the server where the method leaves them with the clients.

    Raises
    ------
    ConfigError
        Naming what, and where it belongs.
    """
    if label_counts is not None and label_counts != "noisy" and not isinstance(label_counts, Mapping):
        raise ConfigError(
            f"label_counts must be 'noisy', or the counts of each class by client, got {label_counts!r:.80}"
        )
    if method.sends_labels():
        if label_counts is not None:
            raise ConfigError(f"with method {method.name!r} clients send their labels: leave label_counts out")
        return
    stay = f"with method {method.name!r} labels and loss stay with the clients"
    if loss is not nn.functional.cross_entropy or not classification:
        raise ConfigError(f"{stay}: give loss and classification to split_client_app instead")
    if metrics:
        raise ConfigError(f"{stay}: the server cannot compute metrics of outputs and labels, leave metrics out")
    if sampler.needs_label_counts and label_counts is None:
        raise ConfigError(
            f"{stay}, but {type(sampler).__name__} plans by class: use a sampler that needs no label counts. Or pass "
            "label_counts='noisy', which tells the server how many examples of each class every client has, up to "
            "noise that the clients add (LabelNoise); or label_counts={client: counts}, where you know them"
        )
