"""Which methods go with differential privacy of the model: what server and clients both check."""

from __future__ import annotations

from psl_flower.errors import ConfigError
from psl_flower.methods.base import SplitMethod
from psl_flower.privacy import DPSGD, SecureAggregation


def check_options(private: DPSGD, method: SplitMethod, secure: SecureAggregation | None) -> None:
    """Refuse options that are none, or that do not go with a method or with secure aggregation.

    Raises
    ------
    ConfigError
        Naming why.
    """
    if not isinstance(private, DPSGD):
        raise ConfigError(f"private must be a psl_flower.privacy.DPSGD, got {private!r:.80}")
    if method.trains_on_clients():
        raise ConfigError(f"with method {method.name!r} clients step parts of their own, without noise: use another")
    if secure is not None and secure.least <= private.colluding:
        raise ConfigError(
            f"clients add the noise themselves, and up to {private.colluding} may take theirs away again: sums must be "
            f"of more, SecureAggregation(least={private.colluding + 2}), got least={secure.least}"
        )
