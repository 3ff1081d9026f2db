"""What results were made with: the command, this machine, and versions."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from psl_flower.machine import machine


def provenance(words: Sequence[str], workers: int) -> dict[str, Any]:
    """Return the command with its words, how many processes it used at once, and what they ran on."""
    return {"command": shlex.join(["psl-flower", *words]), "workers": workers, **machine()}
