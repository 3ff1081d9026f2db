"""What keeps a client's own with it: masked sums, noisy counts, defences of what leaves, training with DP-SGD."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from psl_flower.privacy.cohort import FACTOR, Cohort
from psl_flower.privacy.defences import (
    ClipCutGradient,
    Defence,
    DistanceCorrelation,
    GaussianNoise,
    GradientScrutiny,
    LaplaceNoise,
    Quantize,
    RandomizedResponse,
    TopK,
    parse_defences,
)
from psl_flower.privacy.distance_correlation import corrected_distance_correlation, distance_correlation
from psl_flower.privacy.dp_sgd import DPSGD
from psl_flower.privacy.fixed_point import OutOfRangeError, decode, encode, places_for
from psl_flower.privacy.label_noise import LabelNoise
from psl_flower.privacy.options import SecureAggregation, secure_options
from psl_flower.privacy.party import Party, fingerprint
from psl_flower.privacy.secret import Secret

__all__ = [
    "DPSGD",
    "FACTOR",
    "ClipCutGradient",
    "Cohort",
    "Defence",
    "DistanceCorrelation",
    "GaussianNoise",
    "GradientScrutiny",
    "LabelNoise",
    "LaplaceNoise",
    "OutOfRangeError",
    "Party",
    "Quantize",
    "RandomizedResponse",
    "Secret",
    "SecureAggregation",
    "TopK",
    "corrected_distance_correlation",
    "decode",
    "distance_correlation",
    "encode",
    "fingerprint",
    "parse_defences",
    "places_for",
    "secure_options",
]


def __getattr__(name: str) -> Any:
    if name == "audit":  # it stands far above this package, and needs all of it
        return import_module("psl_flower.audit").audit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "audit"})  # not in `__all__`: it needs an extra, and `import *` shall not
