"""What keeps a client's own from the server: sums that are masked, counts with noise. No torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from psl_flower.privacy.company import Company
from psl_flower.privacy.fixed_point import OutOfRangeError, decode, encode, places_for
from psl_flower.privacy.label_noise import LabelNoise
from psl_flower.privacy.options import SecureAggregation, secure_options
from psl_flower.privacy.party import Party, fingerprint

__all__ = [
    "Company",
    "LabelNoise",
    "OutOfRangeError",
    "Party",
    "SecureAggregation",
    "decode",
    "encode",
    "fingerprint",
    "places_for",
    "secure_options",
]


def __getattr__(name: str) -> Any:
    if name == "audit":  # it stands far above this package, and needs all of it
        return import_module("psl_flower.audit").audit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
