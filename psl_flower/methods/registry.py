"""Methods by name."""

from __future__ import annotations

from psl_flower.errors import ConfigError
from psl_flower.methods.base import SplitMethod
from psl_flower.methods.parallel import ParallelSplit
from psl_flower.methods.sequential import SequentialSplit
from psl_flower.methods.splitfed import SplitFedV1, SplitFedV2
from psl_flower.methods.u_shaped import UShapedSplit

METHODS: dict[str, type[SplitMethod]] = {
    method.name: method for method in (ParallelSplit, SequentialSplit, SplitFedV1, SplitFedV2, UShapedSplit)
}


def make_method(method: str | SplitMethod | None, tail: str | None = None) -> SplitMethod:
    """Return the method of a name, or the one given; None means the plain one, or with a tail the U shape.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    if isinstance(method, SplitMethod):
        return method
    if method is None:
        return ParallelSplit() if tail is None else UShapedSplit()
    if method in METHODS:
        return METHODS[method]()
    raise ConfigError(f"method must be a SplitMethod or one of {', '.join(METHODS)}, got {method!r:.80}")
