"""What a node of a recorded graph is: an input, a number that any batch tells, a change in place."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

PLACE = "psl_flower.place"  # where a node's meta has the line of the user's code that it is from

# What to ask a tensor for that is no tensor: known without its values, but `item` and `tolist`.
_FACTS = frozenset({"shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse"})
_FACT_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride", "get_device", "element_size"})
_FACT_METHODS |= {"is_floating_point", "is_complex", "is_contiguous", "item", "tolist", "len"}
_FACT_METHODS |= {"sym_size", "sym_numel", "sym_stride"}  # as torch.export calls them


def modules_of(node: fx.Node) -> list[str]:
    """Return the modules that a step is, or is within, as far as the recording went through them."""
    if node.op == "call_module":
        return [str(node.target)]
    # torch.fx writes an attribute down where it is used, as if the module that is given it had asked for it
    if node.op != "call_function" or node.target is getattr:
        return []
    # torch.export names the second call of a module layer@1
    return [str(path).partition("@")[0] for path, _ in node.meta.get("nn_module_stack", {}).values()]


def same_memory(node: fx.Node, *, written: bool = False) -> list[fx.Node]:
    """Return what an operation of torch.export may return a view of, or what it writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # an entry of several that an operation returns
        return node.all_input_nodes[:1]
    aliases = [(value, each.alias_info) for value, each in zip(node.args, schema.arguments, strict=False)]
    return [
        value
        for value, alias in aliases
        if isinstance(value, fx.Node) and alias is not None and (alias.is_write or not written)
    ]


def at(node: fx.Node) -> str:
    """Return which line of the user's code a step is from, in brackets, as far as torch.fx has recorded it."""
    found = node.meta.get(PLACE)
    return "" if found is None else f" ({found})"


def shown(node: fx.Node) -> str:
    """Return what to call a step in an error, with the line it is from."""
    name = node.name
    if node.target is getattr:
        name = f"{node.args[0]}.{node.args[1]}"
    return f"{name!r}{at(node)}"


def asks_for_fact(node: fx.Node) -> bool:
    """Whether a node asks a tensor for what is known without its values."""
    return tells_fact(node.target, node.args)


def tells_fact(target: Any, args: Sequence[Any]) -> bool:
    """Whether a step asks a tensor for what is known without its values."""
    if target is getattr:
        return args[1] in _FACTS
    return is_fact(target if isinstance(target, str) else getattr(target, "__name__", ""))


def is_fact(method: str) -> bool:
    """Whether a method of tensors, or a function, tells what is known without their values."""
    return method.partition(".")[0] in _FACT_METHODS  # torch.export has sym_size.int


def is_input(node: Any) -> bool:
    """Whether a node is an argument of the model."""
    return isinstance(node, fx.Node) and node.op == "placeholder"


def is_raw(node: Any) -> bool:
    """Whether a node is an input, or an entry of an input that is a dictionary."""
    if not isinstance(node, fx.Node):
        return False
    return is_input(node) or (
        node.target is operator.getitem and isinstance(node.args[1], str) and is_raw(node.args[0])
    )


def input_name(node: fx.Node) -> str:
    """Return the name of an input, or of an entry of one."""
    return str(node.target if is_input(node) else node.args[1])


def is_shape_of_input(node: Any) -> bool:
    """Whether a node is ``x.shape`` or ``x.size()``, of an input x."""
    if not isinstance(node, fx.Node) or not node.args or not is_raw(node.args[0]):
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target == "size" and len(node.args) == 1 and not node.kwargs


def is_batch_size(node: fx.Node) -> bool:
    """Whether a node is ``x.shape[0]``, ``x.size()[0]``, ``x.size(0)`` or ``len(x)``, of an input x."""
    if node.target is operator.getitem:
        return is_shape_of_input(node.args[0]) and node.args[1:] == (0,)
    if node.target is len:
        return is_raw(node.args[0])
    asked = [*node.args[1:], *node.kwargs.values()]
    return node.target == "size" and is_raw(node.args[0]) and asked == [0]


def size_in(node: fx.Node, tensors: Sequence[fx.Node]) -> tuple[int, int] | None:
    """Return which of some tensors, and which of its dimensions, has the size that torch.export knows a node as."""
    wanted: Any = node.meta.get("val")
    for i, tensor in enumerate(tensors) if isinstance(wanted, torch.SymInt) else ():
        for dimension, size in enumerate(tensor.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr == wanted.node.expr:
                return i, dimension
    return None


def asks_for_device(node: fx.Node) -> bool:
    """Whether a node is ``h.device``: all tensors of a side are on one."""
    return node.target is getattr and node.args[1] == "device"


def is_known_of_any_batch(node: fx.Node, asking: Collection[fx.Node] | None = None) -> bool:
    """Whether any tensor of the batch tells what this node asks an input for, and some or all others ask it."""
    if is_shape_of_input(node):
        return all(is_batch_size(user) for user in node.users if asking is None or user in asking)
    return is_batch_size(node) or asks_for_device(node)


def constant(size: int | torch.SymInt) -> int | None:
    """Return a size that is a constant to recorded code; None for one that varies."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def is_symbol(size: Any) -> bool:
    """Whether a size is one of those that vary, and not computed of it."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_Symbol)
