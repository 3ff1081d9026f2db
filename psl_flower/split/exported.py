"""Recording a model with `torch.export`, for code that torch.fx cannot trace: today's transformers, above all.

What is recorded is the whole model, operation by operation. Every operation names the module it came from, and
parameters keep their names, so that the recording is divided where it enters a submodule, as that of torch.fx is.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_map

from psl_flower.errors import CutError
from psl_flower.origin import is_users
from psl_flower.signatures import whole_dict
from psl_flower.split.arguments import Arguments
from psl_flower.split.decided import by_rows, ones_noted, shown
from psl_flower.split.gradients import applied, apply
from psl_flower.split.modes import modes_kept, pinned_modules
from psl_flower.split.place import is_text
from psl_flower.split.recordable import answered_as_run
from psl_flower.split.refused import BY_HAND, kept, refusals_kept, refused
from psl_flower.split.settings import settings_refused
from psl_flower.split.trace import TRIES, Form, Trace, random_states, refuse_backward_hooks, told, told_drawn
from psl_flower.split.tracer import TRACING
from psl_flower.split.unchanged import RECORDED, unchanged

_LEFT_OUT = (
    "the model was cut without it: put it into the example, Cut(name, example={...}), on server and clients, or leave "
    "it out of the rows"
)
_FIRST_TORCH = "2.10"  # 2.6 cannot record GPT-2, BERT and ViT; 2.9 leaves a model's state out without a word

# What torch.export puts in to check that later calls are like the example; the parts check what they are given.
_CHECKS = ("_assert", "sym_constrain_range")

_REQUIRES_GRAD: Any = Tensor.requires_grad

# How code asks a tensor for its values.
_OF_VALUES = {"__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy", "is_nonzero"}

# By argument: a tensor, or of the one that takes a batch as a dict, the tensors by name.
Inputs = Mapping[str, Tensor | dict[str, Tensor]]


def export(root: nn.Module, example: Mapping[str, Tensor], share: Collection[str]) -> Trace:
    """Record what `root` does, in training and in evaluation, for batches of any size and texts of any length.

    Parameters
    ----------
    root : nn.Module
        Constants of its code are stored on it, and a cache of keys and values that its configuration asks for is
        switched off; otherwise it is left as it was.
    example : dict of str to Tensor
        Inputs by name, batch first.
    share : collection of str
        Inputs that may cross a cut as they are.

    Raises
    ------
    CutError
        If `torch.export` cannot record it, or only for batches of one size, or without gradients.
    """
    if Version(torch.__version__) < Version(_FIRST_TORCH):
        raise CutError(f"a cut with torch.export needs torch {_FIRST_TORCH} or later, this is {torch.__version__}")
    whole = whole_dict(inspect.signature(root.forward), example)
    arguments = Arguments.given(root, list(example) if whole is None else [whole.name], _LEFT_OUT)
    copies = {name: value.detach().clone() for name, value in example.items()}  # views of nothing
    inputs = {name: copies[name] if whole is None else copies for name in arguments.inputs}
    refuse_backward_hooks(root, (name for name, _ in root.named_modules()))
    for name, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CutError(
                f"{name!r} is a module of torch.jit, which torch.export records without the gradients that go through "
                f"it: use the nn.Module that it was made of, or {BY_HAND}"
            )
    _without_cache(root)
    graphs: dict[bool, fx.Graph] = {}
    returns: dict[bool, TreeSpec] = {}
    decisions: dict[str, None] = {}
    with modes_kept(root) as put:
        for mode in (True, False):
            put(mode)
            made, decided = _export_once(root, arguments, inputs)
            decisions |= dict.fromkeys(decided)
            graphs[root.training], returns[root.training] = _as_graph(root, made, inputs)
    if (found := by_rows([*decisions], inputs)) is not None:
        raise CutError(
            f"the code decides by the number of rows ({shown(found)}), and torch.export would record one way for ever: "
            f"have it do the same for any batch, or {BY_HAND}"
        )
    arguments = arguments.annotated(graphs.values()).with_sizes(graphs.values()).with_decisions([*decisions])
    return Trace(graphs, pinned_modules(root), arguments, frozenset(share), Form(returns))


def _export_once(root: nn.Module, arguments: Arguments, inputs: Inputs) -> tuple[fx.GraphModule, list[str]]:
    """Return what torch.export records, and what it has decided by the sizes of the inputs."""
    for _ in range(TRIES):
        states = random_states()
        made = _export(root, arguments, inputs)
        if random_states() == states:
            return made
    raise CutError(told_drawn(root, "torch.export"))


def _export(root: nn.Module, arguments: Arguments, inputs: Inputs) -> tuple[fx.GraphModule, list[str]]:
    sizes = torch.export.Dim
    dynamic = tree_map(
        lambda value: {0: sizes.DYNAMIC, 1: sizes.AUTO} if is_text(value) else {0: sizes.DYNAMIC}, dict(inputs)
    )
    try:
        with (
            refusals_kept(),
            TRACING,
            _called_by(root, arguments.signature),
            _own_gradients_refused(),
            settings_refused(),
            ones_noted() as ones,
            answered_as_run(root),
            _as_if_run(),
            _Asked(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*assigned during export")  # a state, which would be left out
            exported = torch.export.export(root, (), dict(inputs), dynamic_shapes=dynamic, strict=False)
            return exported.module(check_guards=False), [*getattr(exported, "_guards_code", ()), *ones]
    except Exception as error:  # the user's code, run with tensors that hold no values
        raise CutError(
            f"torch.export cannot record {type(root).__name__} ({told(error)}). What it "
            f"cannot see is code that depends on the values of tensors, keeps a state between calls, or is an autograd "
            f"function of one's own: change that, or {BY_HAND}"
        ) from error


@contextmanager
def _as_if_run() -> Iterator[None]:
    """Tell the user's own code that nothing is compiled: it would do something else."""
    own = {name: getattr(torch.compiler, name) for name in ("is_compiling", "is_exporting")}

    def answering(function: Any) -> Any:
        return lambda: not is_users(sys._getframe(1).f_code.co_filename) and function()

    try:
        for name, function in own.items():
            setattr(torch.compiler, name, answering(function))
        yield
    finally:
        for name, function in own.items():
            setattr(torch.compiler, name, function)


class _Asked(TorchFunctionMode):
    """Keeps what torch.export cannot tell of values, should the code catch it, and refuses what it leaves out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "register_hook":
            raise refused(
                f"a hook on a tensor would be lost: move it into a submodule of its own, have it in an autograd "
                f"function, or {BY_HAND}"
            )
        if name == "__get__" and func == _REQUIRES_GRAD.__get__ and is_users(_asking().co_filename):
            raise refused(
                f"whether a tensor requires gradients would be recorded for ever: decide by self.training, or {BY_HAND}"
            )
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            raise (kept(error) if name in _OF_VALUES else error)  # noqa: B904 - itself


def _asking() -> CodeType:
    """Return the code that asks, past what torch.export has in between."""
    frame = sys._getframe(1)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code


@contextmanager
def _called_by(root: nn.Module, signature: inspect.Signature) -> Iterator[None]:
    """Have `root` tell this signature of its forward: torch.export cannot do with sizes of what is in ``**kwargs``."""
    own, before = root.__dict__.get("forward"), root.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with unchanged(root):  # here, for torch.export puts some of it back
            return before(*args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    root.__dict__["forward"] = forward
    try:
        yield
    finally:
        del root.__dict__["forward"]
        if own is not None:
            root.__dict__["forward"] = own


@contextmanager
def _own_gradients_refused() -> Iterator[None]:
    """Refuse autograd functions of one's own: torch.export records their forward, and their backward is lost."""
    thread = threading.get_ident()

    def refuse(cls: type, args: Any) -> None:
        # of an operator with a name (torch.library) the call is recorded, and so its backward with it
        if threading.get_ident() == thread and not cls.__module__.startswith("torch._library"):
            raise CutError(f"its backward would be lost: {cls.__module__}.{cls.__qualname__}")

    def call(cls: type, *args: Any) -> Any:
        refuse(cls, args)
        return apply(cls, *args)

    with applied(call, refuse):
        yield


def _without_cache(root: nn.Module) -> None:
    """Have a language model keep no keys and values of a call for the next: training has no use for them."""
    for module in root.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False


def _as_graph(root: nn.Module, made: fx.GraphModule, inputs: Inputs) -> tuple[fx.Graph, TreeSpec]:
    """Return a recording as a graph whose attributes are those of `root`, and the form of what it returns.

    Constants and regions of code under another autograd mode become attributes of `root`. Devices that are written
    into the code, those of the machine that records, become that of the inputs.
    """
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    placeholders = (node for node in made.graph.nodes if node.op == "placeholder")
    for name, value in inputs.items():
        given = graph.placeholder(name)
        if isinstance(value, Tensor):
            source = next(placeholders)
            values[source] = _copied(given, source)
            continue
        for key in value:
            source = next(placeholders)
            values[source] = _copied(graph.call_function(operator.getitem, (given, key)), source)
    device = graph.call_function(getattr, (next(iter(values.values())), "device"))
    own = {*dict(root.named_parameters(remove_duplicate=False)), *dict(root.named_buffers(remove_duplicate=False))}

    def here(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return values[argument]
        return device if isinstance(argument, torch.device) else argument

    for node in made.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            if name not in own:
                name = _store(root, name.replace(".", "_"), operator.attrgetter(name)(made))
            values[node] = _copied(graph.get_attr(name), node)
        elif node.op == "output":
            graph.output(tuple(fx.node.map_aggregate(node.args[0], here)))
        elif node.op != "placeholder" and not _name(node).startswith(_CHECKS):
            new = graph.create_node(
                node.op, node.target, fx.node.map_aggregate(node.args, here), fx.node.map_aggregate(node.kwargs, here)
            )
            values[node] = _copied(new, node)
    for node in reversed(list(graph.nodes)):  # what only the checks asked for
        number = isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | bool)
        if not node.users and (node is device or node.op == "get_attr" or number):
            graph.erase_node(node)
    codegen: Any = made.graph._codegen
    return graph, codegen.pytree_info.out_spec


def _copied(node: fx.Node, source: fx.Node) -> fx.Node:
    node.meta = dict(source.meta)
    return node


def _store(root: nn.Module, name: str, value: Any) -> str:
    """Keep a constant of the recorded code on the model, under a name that is free; return it."""
    free = next(f"{RECORDED}{i}_{name}" for i in itertools.count() if not hasattr(root, f"{RECORDED}{i}_{name}"))
    setattr(root, free, value)
    return free


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
