"""Class counts that a client tells with noise, where labels stay with it; see ``psl_flower.privacy.LabelNoise``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from psl_flower.client.process import RunState
from psl_flower.errors import ConfigError
from psl_flower.methods.base import SplitMethod
from psl_flower.protocol import Description


def with_noise(method: SplitMethod, state: RunState, node: int, described: Description) -> Description:
    """Return a description whose class counts have noise, where the method leaves labels with the clients.

    Raises
    ------
    ConfigError
        If there is a class that the noise knows nothing of.
    """
    options = state.label_noise
    if options is None or described.labels is None or described.counts is None or method.sends_labels():
        return described
    if described.labels.size and described.labels[-1] >= options.classes:
        raise ConfigError(f"label_noise is for {options.classes} classes: there is a label beyond them")
    counts = np.zeros(options.classes, dtype=np.int64)
    counts[described.labels] = described.counts
    noise = options.draw(state.secret(node))
    return replace(described, labels=np.arange(options.classes), counts=options.add(counts, noise))
