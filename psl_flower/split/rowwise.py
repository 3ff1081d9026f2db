"""Whether a function treats the rows of a batch one by one, told by what it does.

A client half sees its own quota of the global batch. If an example's activations depended on the others in its batch,
or the batch were not the first dimension, training would differ from centralised training without a word. No list of
layers can tell: a batch norm may be frozen, and ``h - h.mean(0)`` is no layer. So some rows are run alone, and compared
with themselves in the batch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from psl_flower.devices import seeded
from psl_flower.errors import CutError
from psl_flower.split.backward import mixed_gradient
from psl_flower.split.chance import alone_by_chance, beside_others
from psl_flower.split.compare import CannotTellError, Dice, alike, pick_rows, same, tensors

_RULE = "must treat examples one by one, or training is not what it would be with all data in one place"
_NORMALISE = (
    "replace layers that normalise over the batch with replace_batch_norm(model, before=cut) (before='server' for a "
    "SplitModel, and tail=tail for a U shape) where the model is made, on the server and in model_fn, and compute "
    "nothing over dimension 0 (attention and recurrent layers need batch_first=True)"
)
_STATE = (
    "it computes other values when it is run again on the same examples, though no random numbers are drawn: it keeps "
    "a state (a counter, a hidden state), and clients keep none between steps; let it depend on its inputs and weights "
    "only, or cut the model before it"
)
_RESHAPE = "keep the batch as the first dimension, with x.flatten(1) instead of x.squeeze() or x.view(-1)"


def find_mixing(
    run: Callable[[Any], Any], inputs: Any, *, module: nn.Module | None = None, who: str = "the client half"
) -> str | None:
    """Return why a function does not treat the rows of a batch one by one, or None if it does.

    The first and the last row are each run alone and compared with the batch's, within rounding. Dropout, which makes
    rows differ rightly, is off meanwhile; all else is as it is. Where random numbers are drawn otherwise, rows are
    compared with themselves beside other rows, with the same random numbers: noise is the same then, mixup is not.
    Where nothing is random, the gradients of the module's parameters are looked at as well.

    Parameters
    ----------
    run : callable
        Takes a tree of inputs (dict, list, tuple, tensor) and returns a tree of tensors, each with a row an example.
        It is called some times, with copies of rows; buffers that it changes are changed.
    inputs : tree
        A batch; tensors have the batch first, what is no tensor is given as it is.
    module : nn.Module, optional
        What `run` runs; nothing else may run it meanwhile. The first of its submodules that mixes rows is named, and
        submodules that draw random numbers without being dropout (such as stochastic depth) are in evaluation mode
        while rows are run alone.
    who : str
        What to call it.

    Returns
    -------
    str or None
        The rule, what was found, and the remedy.

    Raises
    ------
    CannotTellError
        If there is one row only, all rows are alike, or there are very few where random numbers are drawn.
    """
    rows = next((len(leaf) for leaf in tensors(inputs) if leaf.dim()), 0)
    if not rows:
        raise CannotTellError("there is no example to run")
    device = next(iter(tensors(inputs))).device
    dice = Dice(device)
    with _eager(), torch.no_grad(), seeded(0, device):
        with _NoDropout() as watch, _resting(module, dice, lambda: run(pick_rows(inputs))) as drawing:
            before = dice.state()
            whole = tensors(run(pick_rows(inputs)))
            if found := _misshapen(whole, rows):
                return f"{who} {_RULE}: {found}; {_RESHAPE}"
            drawn = before != dice.state()
            found = _difference(run, inputs, whole, rows, module, watch.eps, drawn=drawn)
            if not found and not drawn and module is not None:
                found = mixed_gradient(run, inputs, rows, module, watch.eps)
            chance = alone_by_chance(run, inputs, rows, device) if drawn and not found else None
        if not found and not chance and (drawn or drawing):
            chance = beside_others(run, inputs, rows, device)
    if found or chance:
        return f"{who} {_RULE}: {found or f'{chance}; {_NORMALISE}'}"
    if alike(inputs):
        raise CannotTellError("all examples of the batch are alike")
    return None


def _difference(
    run: Callable[[Any], Any],
    inputs: Any,
    whole: list[Tensor],
    rows: int,
    module: nn.Module | None,
    eps: float,
    *,
    drawn: bool,
) -> str | None:
    """Say what a row alone shows, and the remedy; None if it is as in the batch."""
    for row in sorted({0, rows - 1}):
        watch = _Watch(module, 0, 1)
        try:
            with watch:
                alone = tensors(run(pick_rows(inputs, row, rows)))
        except Exception as error:  # the batch went well, so it is the single row that the code cannot take
            if isinstance(error, CutError):  # says all of it
                return str(error)
            who = watch.running[-1] if watch.running else "it"
            return f"{who} fails on an example alone ({type(error).__name__}: {error}); {_NORMALISE}, and {_RESHAPE}"
        if len(alone) != len(whole):
            return f"there are {len(whole)} outputs for a batch of {rows}, and {len(alone)} for one example; {_RESHAPE}"
        if found := _misshapen(alone, 1):
            return f"{found}; {_RESHAPE}"
        if rows == 1:
            raise CannotTellError("a batch of one example has nothing to compare it with")
        if drawn:  # no two passes are alike
            return None
        for i, (joint, single) in enumerate(zip(whole, alone, strict=True)):
            if not same(joint[row : row + 1], single, eps):
                with _Watch(module, row, rows) as joint_watch:
                    again = tensors(run(pick_rows(inputs)))
                if not all(same(*pair, eps) for pair in zip(whole, again, strict=True)):
                    return _STATE
                where = joint_watch.first_difference(watch, eps) or f"output {i}{watch.last()}"
                return f"{where} for an example depends on the other {rows - 1} in its batch; {_NORMALISE}"
    return None


def _misshapen(outputs: Sequence[Tensor], rows: int) -> str | None:
    for i, output in enumerate(outputs):
        if output.dim() == 0 or len(output) != rows:
            batch = "one example alone" if rows == 1 else f"a batch of {rows}"
            return f"output {i} has shape {tuple(output.shape)} for {batch}"
    return None


def _eager() -> AbstractContextManager[Any]:
    """Run compiled modules as they were written: hooks do not go into what is compiled."""
    # whoever compiles has imported torch's compiler, which takes seconds
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


# Functions whose only randomness is dropout, and the argument that switches it off.
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_SWITCHES: dict[Callable[..., Any], tuple[str, Any]] = {
    **dict.fromkeys(_DROPOUTS, ("training", False)),
    F.multi_head_attention_forward: ("dropout_p", 0.0),
}
_PLAIN_DROPOUTS = (
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
    # as torch.export calls them
    *(torch.ops.aten.dropout.default, torch.ops.aten.alpha_dropout.default, torch.ops.aten.feature_dropout.default),
)
_ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


class _NoDropout(TorchFunctionMode):
    """No dropout while this is entered; on this thread only, and however the functions were imported.

    Attributes
    ----------
    eps : float
        Of the coarsest floating-point numbers that were computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._without_dropout(func, args, kwargs or {})
        if isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()):
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        return result

    def _without_dropout(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _PLAIN_DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in _SWITCHES:
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.arguments.update([_SWITCHES[func]])
            return func(*bound.args, **bound.kwargs)
        if func in _ATTENTION:
            causal = {"is_causal": args[5]} if len(args) > 5 else {}
            return func(*args[:4], **{**kwargs, **causal, "dropout_p": 0.0})
        return func(*args, **kwargs)


@contextmanager
def _resting(module: nn.Module | None, dice: Dice, run: Callable[[], Any]) -> Iterator[list[nn.Module]]:
    """Put those submodules in evaluation mode that draw random numbers themselves, found out by running once."""
    frames: list[list[Any]] = []
    drawing: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        frames.append([dice.state(), False])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        state, inner = frames.pop()
        drew = state != dice.state()
        if drew and not inner and module.training:
            drawing.append(module)
        if frames:
            frames[-1][1] |= drew

    if module is not None:
        with _hooked(module, enter, leave):
            run()
    for one in drawing:
        one.training = False
    try:
        yield drawing
    finally:
        for one in drawing:
            one.training = True


class _Watch:
    """Records what the submodules of a module are given and compute for one row.

    Parameters
    ----------
    module : nn.Module or None
        None records nothing.
    row, rows : int
        Which row of how many.
    """

    def __init__(self, module: nn.Module | None, row: int, rows: int) -> None:
        self._module, self._row, self._rows = module, row, rows
        self._names = {} if module is None else {one: name for name, one in module.named_modules()}
        self._seen: list[tuple[str, Tensor | None]] = []
        self._last: str | None = None
        self.running: list[str] = []

    def __enter__(self) -> _Watch:
        self._hooks = ExitStack()
        if self._module is not None:
            self._hooks.enter_context(_hooked(self._module, self._before, self._after))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def first_difference(self, other: _Watch, eps: float) -> str | None:
        """Return the first that differs from what another watch saw of the same row."""
        for (what, mine), (same_what, theirs) in zip(self._seen, other._seen, strict=False):
            if what != same_what:
                return None
            if mine is not None and theirs is not None and not same(mine, theirs, eps):
                return what
        return None

    def last(self) -> str:
        """Say after which module the outputs were computed."""
        return f" (computed after {self._last})" if self._last else ""

    def _before(self, module: nn.Module, args: Any) -> None:
        name = f"{self._names[module]!r} ({type(module).__name__})"
        self.running.append(name)
        self._note(f"what {name} is given", args)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = self.running.pop()
        self._note(f"what {self._last} computes", output)

    def _note(self, what: str, tree: Any) -> None:
        tensor = next((t for t in tensors(tree) if t.dim() and len(t) == self._rows), None)
        self._seen.append((what, None if tensor is None else tensor[self._row : self._row + 1].clone()))


@contextmanager
def _hooked(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    """Call functions before and after the forward of every submodule."""
    with ExitStack() as handles:
        for one in module.modules():
            if one is not module:
                handles.callback(one.register_forward_pre_hook(before).remove)
                handles.callback(one.register_forward_hook(after).remove)
        yield
