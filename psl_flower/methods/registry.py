"""Methods by name."""

from __future__ import annotations

from psl_flower.errors import ConfigError
from psl_flower.methods.base import SplitMethod
from psl_flower.methods.parallel import ParallelSplit
from psl_flower.methods.sequential import SequentialSplit
from psl_flower.methods.splitfed import SplitFedV1, SplitFedV2

METHODS: dict[str, type[SplitMethod]] = {
    method.name: method for method in (ParallelSplit, SequentialSplit, SplitFedV1, SplitFedV2)
}


def make_method(method: str | SplitMethod) -> SplitMethod:
    """Return the method of a name, or the one given.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    if isinstance(method, SplitMethod):
        return method
    if method in METHODS:
        return METHODS[method]()
    raise ConfigError(f"method must be a SplitMethod or one of {', '.join(METHODS)}, got {method!r:.80}")
