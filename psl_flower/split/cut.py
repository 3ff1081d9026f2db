"""Cutting an unmodified model at named submodules."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import fx, nn

from psl_flower.errors import CutError
from psl_flower.signatures import whole_dict
from psl_flower.split.copying import copy_model
from psl_flower.split.exported import export
from psl_flower.split.half import CutNames, TracedHalf, listing
from psl_flower.split.lengths import mark_lengths
from psl_flower.split.modes import modes_kept
from psl_flower.split.partition import UnknownNumber, divide
from psl_flower.split.place import example_of, needs_example, share_of
from psl_flower.split.rearrange import prepared
from psl_flower.split.trace import Trace, told, trace

log = logging.getLogger("flwr.psl_flower")

# What was recorded, prepared for some cuts, and for each piece its graph in each mode.
Divided = tuple[Trace, list[dict[bool, fx.Graph]]]


@overload
def split_module(model: nn.Module, cut: str, tail: None = None) -> tuple[nn.Module, nn.Module]: ...
@overload
def split_module(model: nn.Module, cut: str, tail: str) -> tuple[nn.Module, nn.Module, nn.Module]: ...
def split_module(model: nn.Module, cut: str, tail: str | None = None) -> tuple[nn.Module, ...]:
    """Cut a model into a client half and a server half, or into three parts; the model itself is left untouched.

    The parts together compute exactly what the model computes, in training and in evaluation, for any batch size,
    and their parameters and buffers carry the model's own names. No parameter is on both sides; parameters that the
    model never uses are in no part. Residual connections stay, and several tensors may cross a cut, masks and other
    integers too.

    Only the modules that contain a cut are traced with torch.fx; the others are taken over whole. Where that fails, the
    whole model is recorded with torch.export, if there is an example batch, see `Cut`. Where it behaves differently in
    training and evaluation, both are recorded and the part's ``training`` flag decides.
    The first part is called as the model is, by position or by name. Arguments of ``model.forward`` that may be None
    are inputs where the model uses them; those with another default are settings and keep it.

    Parameters
    ----------
    model : nn.Module
    cut : str
        Qualified name of the first server-side submodule, such as "layer2" or "features.3"; or a `Cut`.
    tail : str, optional
        Qualified name of the first submodule that is back on the client, for a U shape.

    Returns
    -------
    client_half : nn.Module
        ``client_half(*inputs)`` returns a tuple of tensors, each with the batch first, also when only one crosses.
    server_half : nn.Module
        ``server_half(*activations)`` returns the model's output. It works on copies of the activations.

    Or, with `tail`:

    head : nn.Module
        ``activations, kept = head(*inputs)``: two tuples of tensors with the batch first. The activations cross to the
        server; what is kept stays on the client for the tail (skip connections; often nothing).
    body : nn.Module
        ``outputs = body(*activations)`` is a tuple of tensors with the batch first, which cross back.
    tail : nn.Module
        ``tail(*outputs, *kept)`` returns the model's output. A parameter that head and tail both use is one and the
        same in both.

    Raises
    ------
    CutError
        If there is no such submodule or the model never calls it; if nothing would be left on one side; if a module,
        parameter or buffer would be needed on both sides; if raw inputs or numbers computed of values would have to
        cross; or if neither torch.fx nor torch.export can record it.
    """
    return cut_apart(model, cut, tail)


def cut_apart(
    model: nn.Module, cut: str, tail: str | None = None, *, share_frozen: bool = False
) -> tuple[nn.Module, ...]:
    """Return the parts of a model, see `split_module`; the values of frozen parameters may be the model's own."""
    cuts = [cut] if tail is None else [cut, tail]
    for kind, name in zip(("cut", "tail"), cuts, strict=False):
        _check_name(model, kind, name)
    root = copy_model(model, share_frozen=share_frozen)
    names = [_first_name(root, name) for name in cuts]
    where = f"cut {cut!r}" + ("" if tail is None else f", tail {tail!r}")
    try:
        recorded, tried, batch = _record(root, names, cut)
        recorded, graphs = tried or _divided(root, recorded, names)
    except CutError as error:
        raise CutError(f"{where}: {error}{_suggestions(model, cut)}") from error.__cause__
    parts = [TracedHalf(root, programs, recorded, CutNames(cut, tail)) for programs in graphs]
    parts[0].arguments, parts[-1].returns = recorded.arguments, recorded.returns
    mark_lengths(parts, root, recorded, names, batch)
    _separate(parts)
    return tuple(parts)


def _divided(root: nn.Module, recorded: Trace, names: Sequence[str]) -> Divided:
    recorded = prepared(root, recorded, names)
    return recorded, divide(root, recorded, names)


def _record(root: nn.Module, names: Sequence[str], cut: str) -> tuple[Trace, Divided | None, Mapping[str, Any] | None]:
    """Record a model with torch.fx, which looks at the code around the cuts only, else with torch.export.

    Where it had to be divided to be tried, what came of that is returned, too; and the batch it was tried with.
    """
    example, share = example_of(root, cut), share_of(cut)
    try:
        recorded = trace(root, names, share)
        left_out = [name for name in example or () if name not in recorded.arguments.inputs]
        whole = whole_dict(recorded.arguments.signature, left_out)
        if not left_out or whole is not None:
            if example is None:
                return recorded, None, None
            batch = example if whole is None else {whole.name: example}
            return recorded, _try(root, recorded, names, batch), batch
        error = CutError(f"torch.fx would leave out {listing(left_out)}, which forward does without.")
    except CutError as exc:
        error = exc
    if example is None:
        raise CutError(f"{error} Or let torch.export record it: it {needs_example(root)}.") from error.__cause__
    try:
        recorded = export(root, example, share)
    except CutError as other:
        raise CutError(f"{error} Nor does torch.export do: {str(other).removesuffix('.')}.") from other.__cause__
    log.info("%s is cut with torch.export: %s", type(root).__name__, str(error).partition(". ")[0])
    return recorded, None, None


def _try(root: nn.Module, recorded: Trace, names: Sequence[str], example: Mapping[str, Any]) -> Divided | None:
    """Run what torch.fx has recorded on the example, in evaluation mode.

    Raises
    ------
    CutError
        If a number, or what else is no tensor, would cross: torch.export knows numbers, and what is in other things.
    """
    try:
        recorded, graphs = _divided(root, recorded, names)
    except UnknownNumber:
        raise
    except CutError:
        return None  # torch.export would not do it either
    try:
        with modes_kept(root), torch.no_grad(), torch.random.fork_rng(devices=[]):
            root.eval()
            *parts, _ = (TracedHalf(root, programs, recorded, CutNames()) for programs in graphs)
            parts[0].arguments = recorded.arguments
            values = parts[0](**example)
            if len(parts) == 2:
                parts[1](*values[0])
    except CutError:
        raise
    except Exception as error:
        raise CutError(f"what torch.fx has recorded cannot be run with the example ({told(error)}).") from error
    return recorded, graphs


def _separate(parts: Sequence[nn.Module]) -> None:
    """Give each part modules of its own where several have the same, but for those with state: they stay tied."""
    for i, part in enumerate(parts):
        others = {module for other in parts[:i] for module in other.modules()}
        for parent in list(part.modules()):
            if parent in others:
                continue
            for name, module in parent.named_children():
                if module in others and not module.state_dict():
                    setattr(parent, name, copy.deepcopy(module))


def cut_candidates(model: nn.Module, depth: int | None = None) -> list[str]:
    """List the submodules a model can be cut at, in the order in which it defines them.

    Parameters
    ----------
    model : nn.Module
    depth : int, optional
        How deep to look: 1 for the model's own children; by default all the way down.

    Returns
    -------
    list of str
        Names that `split_module` accepts.
    """
    root = copy_model(model)
    return list(_candidates(root, "", depth, None))


def _candidates(root: nn.Module, parent: str, depth: int | None, whole: Trace | None) -> Iterator[str]:
    """Yield the names inside a module; `whole` is what torch.export has recorded, which holds for all of them."""
    children = [(f"{parent}.{name}" if parent else name) for name, _ in root.get_submodule(parent).named_children()]
    children = [child for child in children if _first_name(root, child) == child]
    if not children or depth == 0:
        return
    try:
        recorded = whole or _record(root, children[:1], children[0])[0]
    except CutError:
        return  # nor can anything deeper be cut, for that needs the same code traced
    for child in children:
        try:
            _divided(root, recorded, [child])
        except CutError:
            pass
        else:
            yield child
        deeper = None if depth is None else depth - 1
        yield from _candidates(root, child, deeper, recorded if recorded.returns else None)


def _check_name(model: nn.Module, kind: str, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise CutError(f"{kind} must be the name of a submodule, got {name!r}.{_suggestions(model, '')}")
    try:
        model.get_submodule(name)
    except AttributeError:
        raise CutError(
            f"{kind} {name!r}: {type(model).__name__} has no such submodule.{_suggestions(model, name)}"
        ) from None


def _suggestions(model: nn.Module, cut: str) -> str:
    """Say which names might have been meant, and where the model can be cut."""
    names = [name for name, _ in model.named_modules() if name and name != cut]
    near = difflib.get_close_matches(cut, names, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    candidates = cut_candidates(model, depth=1)
    if candidates:
        return f"{hint} {type(model).__name__} can be cut at {listing(candidates)}, or deeper inside them."
    return f"{hint} None of its children is a place to cut {type(model).__name__}: cut deeper, or use SplitModel."


def _first_name(root: nn.Module, name: str) -> str:
    """Return the name under which torch.fx knows the submodule called `name` (a module may have several names)."""
    module = root.get_submodule(name)
    return next(str(first) for first, candidate in root.named_modules() if candidate is module)
