"""What keeps a client's own from the server: sums that are masked, counts with noise. No torch."""

from psl_flower.privacy.company import FACTOR, Company
from psl_flower.privacy.fixed_point import OutOfRangeError, decode, encode, places_for
from psl_flower.privacy.label_noise import LabelNoise
from psl_flower.privacy.options import SecureAggregation, secure_options
from psl_flower.privacy.party import Party, fingerprint

__all__ = [
    "FACTOR",
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
