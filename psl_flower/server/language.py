"""The loss of a language model: every position predicts the token after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from psl_flower.errors import ConfigError
from psl_flower.server.metrics import logits_of


def causal_lm_loss(outputs: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token, over the positions whose next token counts.

    Pass ``classification=False`` with it: its labels are tokens, not classes of examples.

    Parameters
    ----------
    outputs : Tensor or ModelOutput
        Logits, (rows, length, tokens), or an object that has them as ``logits``.
    labels : (rows, length) int64 Tensor
        The tokens themselves, for they are shifted here; -100 where one does not count.
    """
    logits = logits_of(outputs)
    if logits is None or logits.ndim != 3 or tuple(labels.shape) != tuple(logits.shape[:2]):
        shown = type(outputs).__name__ if logits is None else tuple(logits.shape)
        raise ConfigError(
            f"causal_lm_loss needs logits (rows, length, tokens) and labels (rows, length), got {shown} and "
            f"{tuple(labels.shape)}: label every position of a text, with -100 where it does not count"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # as transformers' own losses do
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
