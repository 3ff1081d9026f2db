"""What code asks of the stand-ins that torch.fx has for tensors: whether it is one, how many there are, what is so.

A stand-in would tell of itself, or raise what the code may catch. Here some answers are known; some are what a tensor
would say, and a step of the recording looks whether they were right; all else is refused.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.proxy import TraceError

from psl_flower.errors import CutError
from psl_flower.split.bytecode import compared_at, compares_within, running, step_of
from psl_flower.split.nodes import is_fact
from psl_flower.split.refused import BY_HAND, kept
from psl_flower.split.texts import only_shown

# Python's own, in place of which others are put below
_isinstance, _hasattr, _callable = builtins.isinstance, builtins.hasattr, builtins.callable
_id, _len = builtins.id, builtins.len

OURS = ("torch.", "psl_flower.")  # who asks to record, not to decide

_FACTS = {"shape": torch.Size, "dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "ndim": int}
_COUNTS = {"dim", "ndimension", "numel", "nelement", "element_size", "get_device"}
_PARTS = {"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk"}  # what returns several tensors

_NUMBER = "a number that is known only when the model runs is needed here"
_TYPE, _ASK = "the type of what is computed is known only when the model runs", "ask with isinstance()"
AT_ONCE = "do it for all at once in place of a loop, or in a number of steps that __init__ knows"


def refusal(what: str, remedy: str = "") -> TraceError:
    """Return what is raised where code asks for something that is not known while it is recorded."""
    return kept(TraceError(f"{what}{remedy and ': '}{remedy}"))


@dataclass(frozen=True, eq=False)  # torch.fx writes code with a name for each, or, before 2.10, for equal ones
class Taken:
    """A step that looks whether what code was told while it was recorded holds of a value.

    Parameters
    ----------
    question : {"isinstance", "hasattr", "is None", "entries"}
    about : object
        A class or several, the name of an attribute, or a number.
    answer : bool
        What the code was told.
    at : str, optional
        The line that asked.
    """

    question: str
    about: Any
    answer: bool
    at: str | None

    @property
    def __name__(self) -> str:
        return "taken"

    def __call__(self, value: Any) -> None:
        """Raise a CutError if it does not."""
        asked: dict[str, Callable[[Any, Any], bool]] = {
            "isinstance": isinstance,
            "hasattr": hasattr,
            "is None": operator.is_,
            "entries": lambda some, number: len(some) == number,
        }
        if asked[self.question](value, self.about) is not self.answer:
            about = "" if self.about is None else f", {getattr(self.about, '__name__', self.about)}"
            raise CutError(
                f"{self.at or 'the code around the cut'} asks ({self.question}{about}) about what is now a "
                f"{type(value).__name__}, and was recorded with the other answer, {self.answer}: give the cut an "
                f"example batch, Cut(name, example=...), move this code into a submodule of its own, or {BY_HAND}."
            )


def attribute(value: Any, name: str, *default: Any) -> Any:
    """Do what ``getattr`` does; of a stand-in, give the default where what it stands for has no such attribute."""
    if default and _isinstance(value, fx.Proxy) and not _attribute_of(value, name):
        return default[0]
    return getattr(value, name, *default)


class _AskingType(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and _isinstance(args[0], fx.Proxy):
            raise refusal(_TYPE, _ASK)
        if len(args) == 1 and _isinstance(args[0], FakeTensor):
            return nn.Parameter if _isinstance(args[0], nn.Parameter) else torch.Tensor
        return type(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return _isinstance(value, type)


class Type(type, metaclass=_AskingType):
    """Does what ``type`` does, but for stand-ins; those of torch.export are tensors."""


@contextmanager
def asking() -> Iterator[None]:
    """Have stand-ins answer as tensors would, or refuse to, where code that is recorded asks."""
    own: dict[str, Any] = {name: vars(fx.Proxy).get(name) for name in _METHODS}
    # in place of Python's own, for all code may call them, from whatever module it is
    try:
        for name, method in _METHODS.items():
            setattr(fx.Proxy, name, method)
        vars(builtins).update(_BUILTINS)
        vars(torch).update(is_tensor=_is_tensor)
        yield
    finally:
        vars(builtins).update(_PYTHONS)
        vars(torch).update(is_tensor=_TENSOR)
        for name, method in own.items():
            if method is None:
                delattr(fx.Proxy, name)
            else:
                setattr(fx.Proxy, name, method)


def count(node: fx.Node) -> int | None:
    """Return how many entries there are in what a step gives, where its arguments tell; None if not."""
    name = _name(node)
    given: Any = node.kwargs.get("chunks", node.kwargs.get("split_size_or_sections", [*node.args[1:2], None][0]))
    if name in _PARTS and _isinstance(given, list | tuple):
        return len(given) + (name == "tensor_split")
    if name in ("chunk", "unsafe_chunk", "tensor_split") and _isinstance(given, int):
        return int(given)
    cut: Any = node.args[1] if node.target is operator.getitem else None
    if not _isinstance(cut, slice) or cut.step is not None or _kind(node)[0] is not torch.Size:
        return None
    if _isinstance(cut.stop, int) and _isinstance(cut.start or 0, int) and 0 <= (cut.start or 0) <= cut.stop:
        return int(cut.stop - (cut.start or 0))
    return int(-cut.start) if cut.stop is None and _isinstance(cut.start, int) and cut.start < 0 else None


def are_sizes(node: fx.Node) -> bool:
    """Return whether a step gives sizes of a tensor, all or some."""
    return _kind(node) == (torch.Size, True)


def _name(node: fx.Node) -> str:
    return str(node.target if _isinstance(node.target, str) else getattr(node.target, "__name__", ""))


def _tracer(proxy: fx.Proxy) -> Any:
    return proxy.tracer


def _asks(frame: FrameType) -> bool:
    """Whether code asks that is recorded, and not what records it."""
    return not f"{frame.f_globals.get('__name__', '')}.".startswith(OURS)


def asking_frame() -> FrameType:
    """Return where the code is that asks."""
    frame: Any = sys._getframe(1)
    while not _asks(frame):
        frame = frame.f_back
    return frame  # type: ignore[no-any-return]


def _kind(node: fx.Node) -> tuple[type, bool]:
    """Return of what class a value will be, and whether that is certain."""
    if node.target is getattr and len(node.args) == 2:
        kind = _FACTS.get(str(node.args[1]))
        return (torch.Tensor, False) if kind is None else (kind, True)
    name, source = _name(node), node.all_input_nodes[0] if node.all_input_nodes else None
    if name == "size" and node.op == "call_method":
        return (int if len(node.args) + len(node.kwargs) > 1 else torch.Size), True
    if name in _COUNTS or node.target is _len:
        return int, True
    if node.target is operator.getitem and source is not None and _kind(source)[0] is torch.Size:
        return (int if _isinstance(node.args[1], int) else torch.Size), True
    if is_fact(name):
        return int, False
    numbers = [_kind(source)[0] is int for source in node.all_input_nodes]
    return (int if node.op == "call_function" and numbers and all(numbers) else torch.Tensor), False


def _is_instance(value: Any, kinds: Any) -> bool:
    if not _isinstance(value, fx.Proxy) or _isinstance(value, kinds) or not _asks(sys._getframe(1)):
        return _isinstance(value, kinds)
    return _of_kind(value, kinds)


def _of_kind(value: fx.Proxy, kinds: Any) -> bool:
    return _told(value, "isinstance", kinds, _isinstance, issubclass(_kind(value.node)[0], kinds))


def _is_tensor(value: Any) -> bool:
    asked = _isinstance(value, fx.Proxy) and _asks(sys._getframe(1))
    return _of_kind(value, torch.Tensor) if asked else _TENSOR(value)


def _is_callable(value: Any) -> bool:
    asked = _isinstance(value, fx.Proxy) and _asks(sys._getframe(1))
    return _of_kind(value, Callable) if asked else _callable(value)


def _has_attribute(value: Any, name: str) -> bool:
    if not _isinstance(value, fx.Proxy) or not _asks(sys._getframe(1)):
        return _hasattr(value, name)
    return _attribute_of(value, name)


def _length(value: Any) -> Any:
    if not _isinstance(value, fx.Proxy) or not _asks(sys._getframe(1)):
        return _len(value)
    return value.tracer.create_proxy("call_function", _len, (value,), {})


def _identity(value: Any) -> int:
    if _isinstance(value, fx.Proxy) and _asks(sys._getframe(1)):
        raise refusal("whether what is computed is a certain object is known only when the model runs")
    return _id(value)


def _attribute_of(value: fx.Proxy, name: str) -> bool:
    """Return whether there is an attribute; what modules of one's own return is taken to have what is asked for."""
    node = value.node
    theirs = node.op == "call_module" and not type(
        _tracer(value).root.get_submodule(str(node.target))
    ).__module__.startswith("torch.")
    return _told(value, "hasattr", name, _hasattr, theirs or _hasattr(_kind(node)[0], name))


def _told(proxy: fx.Proxy, question: str, about: Any, ask: Callable[[Any, Any], bool], answer: bool) -> bool:
    """Return an answer, and record a step that looks whether it holds, unless it is certain."""
    node, tracer = proxy.node, _tracer(proxy)
    if node.op == "get_attr":
        # not by its name: while torch.fx records, modules give stand-ins
        at, _, name = str(node.target).rpartition(".")
        owner = vars(dict(tracer.root.named_modules())[at])
        held = next((owner[key][name] for key in ("_parameters", "_buffers") if name in owner[key]), owner.get(name))
        return ask(held, about)
    if not _kind(node)[1]:
        look_at(tracer, node, question, about, answer)
    return answer


def look_at(tracer: Any, node: fx.Node, question: str, about: Any, answer: bool) -> None:
    """Record a step that looks whether an answer holds, where the value is made: then it need not cross a cut."""
    inputs = [each for each in tracer.graph.nodes if each.op == "placeholder"]
    with tracer.graph.inserting_after(inputs[-1] if node in inputs else node):
        tracer.create_node("call_function", Taken(question, about, answer, tracer.line()), (node,), {})


def _attribute(self: fx.Proxy, name: str) -> Any:
    frame = sys._getframe(1)
    compared = compared_at(frame) if _asks(frame) else None
    if compared == "is":
        raise refusal(
            f"whether .{name} of what is computed is a certain object is known only when the model runs",
            "in place of `is` write ==, and give the cut an example batch",
        )
    if compared == "match":
        raise refusal(f"by which case .{name} of what is computed is matched is known only when the model runs")
    if compared is not None or name == "prod":
        own = self.node
        if are_sizes(own) and not _hasattr(torch.Size, name):
            raise refusal(f"sizes have no {name}", "in place of np.prod(h.shape) take math.prod(h.shape)")
    made = _GETATTR(self, name)
    if compared == "is None" and name not in _FACTS:
        look_at(_tracer(self), made.node, compared, None, False)
    return made


def look_whether_none(proxy: fx.Proxy) -> fx.Proxy:
    """Record a step that looks whether what a module returns, or an entry of it, is None, where the code asks that."""
    node, tracer = proxy.node, _tracer(proxy)
    if not _may_be_none(tracer, node):
        return proxy
    frame = asking_frame()
    entry: Any = node.args[1] if node.target is operator.getitem else None
    compared = compared_at(frame, entry if _isinstance(entry, int) else None)
    if compared == "is None" or compares_within(frame.f_code):
        look_at(tracer, node, "is None", None, False)
    return proxy


def _may_be_none(tracer: Any, node: fx.Node) -> bool:
    if node.op == "call_module":
        kind = type(tracer.root.get_submodule(str(node.target)))
        return kind is nn.MultiheadAttention or not kind.__module__.startswith("torch.")
    entry = node.target in (getattr, operator.getitem) or _name(node) in ("get", "pop", "detached")
    return entry and any(_may_be_none(tracer, source) for source in node.all_input_nodes[:1])


def _contains(self: fx.Proxy, value: Any) -> bool:
    raise refusal("what is in a value is known only when the model runs")


def _number(self: fx.Proxy, *args: Any) -> int:
    raise refusal(_NUMBER, "in place of int(), round() and divmod() take math.trunc, math.floor, math.isqrt, // and %")


def _get(self: fx.Proxy, name: str) -> Any:
    """Give an attribute, but not the class to code that tells values apart by it: torch asks for it, too."""
    if name == "__class__" and _asks(frame := sys._getframe(1)):
        step = step_of(frame)
        if step is not None and (step.opname == "MATCH_CLASS" or step.argval == "__class__"):
            raise refusal(_TYPE, _ASK)
    return object.__getattribute__(self, name)


def _entries(self: fx.Proxy) -> int:
    error = TypeError(f"{_NUMBER}, for len()")
    # a list that is made asks, too, and goes on without
    raise kept(error) if running(sys._getframe(1)).startswith("len(") else error


def _index(self: fx.Proxy) -> int:
    error = TraceError(f"{_NUMBER}, for range() or an index: {AT_ONCE}; what tensor is indexed, make a buffer")
    # torch asks, too, and goes on without
    raise kept(error) if running(sys._getframe(1)).startswith(("range(", "BINARY_")) else error


def _text(self: fx.Proxy, *form: str) -> str:
    if _asks(frame := sys._getframe(1)) and not only_shown(frame):
        raise refusal(
            "a text is made here of what is computed, which is known only when the model runs",
            "compare that itself, h.dtype == torch.float32, and give the cut an example batch",
        )
    return f"Proxy({self.node.name})"


def _iterate(self: fx.Proxy) -> Iterator[fx.Proxy]:
    """Give entries; where the code may go on without, as in a ``try``, record a step that looks how many there are."""
    frame, node = sys._getframe(1), self.node
    step = step_of(frame)
    if step is None or step.opname != "UNPACK_SEQUENCE":
        entries: Iterator[fx.Proxy] = _tracer(self).iter(self)
        return entries
    if frame.f_code.co_exceptiontable and count(node) is None:
        look_at(_tracer(self), node, "entries", step.argval, True)
    value: Any = self
    return (value[i] for i in range(step.argval))


def _hash(self: fx.Proxy) -> int:
    if _asks(sys._getframe(1)):
        raise refusal(
            "what is computed is looked up here, or kept in a set or a cache", "that is known only when the model runs"
        )
    return object.__hash__(self)


_TENSOR = torch.is_tensor
_BUILTINS: dict[str, Any] = {
    "isinstance": _is_instance,
    "hasattr": _has_attribute,
    "callable": _is_callable,
    "len": _length,
    "id": _identity,
}
_PYTHONS = {name: getattr(builtins, name) for name in _BUILTINS}
_GETATTR: Any = fx.Proxy.__getattr__
_METHODS = {
    "__getattr__": _attribute,
    "__contains__": _contains,
    "__hash__": _hash,
    "__index__": _index,
    "__iter__": _iterate,
    "__len__": _entries,
    "__getattribute__": _get,
    **dict.fromkeys(("__format__", "__repr__", "__str__"), _text),
    **dict.fromkeys(("__round__", "__trunc__", "__floor__", "__ceil__"), _number),
    **dict.fromkeys(("__divmod__", "__rdivmod__"), _number),
    **dict.fromkeys(("__int__", "__float__", "__complex__"), _number),
}
