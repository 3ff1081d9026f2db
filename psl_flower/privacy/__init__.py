"""Secure aggregation: a server sees sums of clients, and no client's own part. Numpy and cryptography, no torch."""

from psl_flower.privacy.company import Company
from psl_flower.privacy.fixed_point import OutOfRangeError, decode, encode, places_for
from psl_flower.privacy.options import SecureAggregation, secure_options
from psl_flower.privacy.party import Party, fingerprint

__all__ = [
    "Company",
    "OutOfRangeError",
    "Party",
    "SecureAggregation",
    "decode",
    "encode",
    "fingerprint",
    "places_for",
    "secure_options",
]
