"""What the forward of a model keeps for its next call, other than in parameters and buffers: it is not recorded."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from psl_flower.errors import CutError
from psl_flower.split.changing import CHANGING
from psl_flower.split.refused import BY_HAND

# What names begin with that recordings add to a model: ours, and those of torch.fx.
RECORDED = "_psl_"
_ADDED = (RECORDED, "_tensor_constant", "_param_constant")

_MOST = 1000  # entries of one container that are looked at
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Refuse code that is recorded within if it changes what modules keep; they are as before then.

    Raises
    ------
    CutError
        If an attribute, what is in a list or a dictionary, an attribute of a class, or a buffer is another one
        afterwards.
    """
    # those of torch.jit are called whole, and cannot be put back
    modules = [each for each in root.modules() if not isinstance(each, torch.jit.ScriptModule)]
    before, held = _kept(root), [(each, dict(vars(each)), dict(each._buffers)) for each in modules]

    def restore() -> None:
        for module, attributes, buffers in held:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)

    try:
        yield
    except BaseException:
        restore()
        raise
    _take_back(root, ((module, buffers) for module, _, buffers in held))
    after = _kept(root)
    names = [name for name in {**before, **after} if not name.rpartition(".")[2].startswith(_ADDED)]
    changed = next((name for name in names if before.get(name) != after.get(name)), None)
    if changed is None:
        return
    restore()
    if changed in dict(root.named_buffers()):
        raise CutError(
            f"the model's forward puts another tensor in the place of its buffer {changed!r}, and that would "
            f"not be recorded: change it in place (self.{changed}.add_(1), copy_), move it into a submodule of "
            f"its own, or {BY_HAND}."
        )
    raise CutError(
        f"the model's forward changes {changed!r}, which is neither parameter nor buffer, and that would not be "
        f"recorded: register it as a buffer, have it in a variable of forward if only that reads it, move it into a "
        f"submodule of its own, or {BY_HAND}."
    )


def _take_back(root: nn.Module, held: Iterable[tuple[nn.Module, Mapping[str, torch.Tensor | None]]]) -> None:
    """Put buffers back in the place of what ``self.level += 1`` sets, which is the buffer itself."""
    names = {module: name for name, module in root.named_modules()}
    for module, buffers in held:
        for key, buffer in buffers.items():
            found: Any = module._buffers.get(key)
            node: Any = found.node if isinstance(found, fx.Proxy) else None
            while node is not None and node.target in CHANGING:
                node = node.args[0]
            if node is not None and node.op == "get_attr" and node.target == f"{names[module]}.{key}".lstrip("."):
                module._buffers[key] = buffer


class _Same:
    """Something that is equal to itself alone, and lives as long as it is compared."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _kept(root: nn.Module) -> dict[str, Any]:
    """Return by name what tells whether what modules and their classes keep was set, or changed in place."""
    named = [each for each in root.named_modules() if not isinstance(each[1], torch.jit.ScriptModule)]
    kinds = {kind for _, module in named for kind in type(module).__mro__ if not _is_torchs(kind)}
    found: dict[str, Any] = {}
    for kind in kinds:
        found |= {f"{kind.__qualname__}.{key}": content_of(value) for key, value in vars(kind).items()}
    for name, module in named:
        own = {key: content_of(value) for key, value in vars(module).items() if key != "_buffers"}
        held = {key: _Same(value) for key, value in module._buffers.items()}  # which may change in place
        found |= {f"{name}.{key}".lstrip("."): value for key, value in {**own, **held}.items()}
    return found


def _is_torchs(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(("torch.", "builtins."))


def content_of(value: Any, depth: int = 3) -> Any:
    """Return what is equal as long as a value is the same, and holds the same."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, torch.Tensor):
        return _Same(value), value._version if not value.is_inference() else 0
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes() if value.size <= _MOST else _Same(value)
    if isinstance(value, Mapping) and depth:
        entries = itertools.islice(value.items(), _MOST)
        return type(value), len(value), [(content_of(k, 0), content_of(v, depth - 1)) for k, v in entries]
    if isinstance(value, list | tuple | deque) and depth:
        return type(value), len(value), [content_of(each, depth - 1) for each in itertools.islice(value, _MOST)]
    if isinstance(value, set | frozenset):
        return type(value), len(value)
    return _Same(value)
