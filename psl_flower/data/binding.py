"""Which argument of a model's forward pass each input of a batch is."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from psl_flower.errors import ConfigError
from psl_flower.signatures import annotate_whole, needed_arguments, whole_dict
from psl_flower.tree import Tree


def forward_signature(model: nn.Module) -> inspect.Signature | None:
    """Return what a model's ``forward`` takes; None where it does not tell (TorchScript).

    Take it from the whole model as its author wrote it: the half of a cut model has lost the names.
    """
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def bind_inputs(signature: inspect.Signature | None, inputs: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that hand a batch's inputs to a model's ``forward``.

    A tuple goes by position, and so does a single tensor. A dict goes by name where ``forward`` has these names; a
    dict of one may have another name. Where the one argument that ``forward`` needs is annotated as a dict, it is given
    the whole.

    Parameters
    ----------
    signature : inspect.Signature or None
        See `forward_signature`; with None, a dict of several goes by name unchecked.
    inputs : tree
        Of a batch, see `Batch`.

    Returns
    -------
    args, kwargs
        As many of them positional as come first in ``forward`` without a gap.

    Raises
    ------
    ConfigError
        If names differ, or ``forward`` needs more inputs, or takes fewer, than there are.
    """
    args: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, dict):
        args, kwargs = _by_name(signature, inputs)
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(
                f"the model's forward takes {_takes(signature)}, rows hold {_holds(inputs)}: {error}; a row's inputs "
                "must be the arguments of forward: leave others out of the rows, or give arguments a default"
            ) from error
    return args, kwargs


def unwrapped(signature: inspect.Signature | None, inputs: Tree) -> str:
    """Return what to say of a dict row's one input that `bind_inputs` gives as it is, to an argument of another name.

    Empty where it does not.
    """
    if signature is None or not isinstance(inputs, dict) or len(inputs) != 1:
        return ""
    (name,), (argument, *_) = inputs, signature.parameters
    if name in signature.parameters:
        return ""
    return f"given was the rows' one input {name!r}; {annotate_whole(argument)}"


def _by_name(signature: inspect.Signature | None, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    parameters = {} if signature is None else dict(signature.parameters)
    whole = None if signature is None else whole_dict(signature, inputs)
    if whole is not None:
        return ((), {whole.name: inputs}) if whole.kind is whole.KEYWORD_ONLY else ((inputs,), {})
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    kinds = {p.kind for p in parameters.values()}
    unknown = [name for name in inputs if name not in named]
    by_position = signature is None or kinds - {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    if unknown and len(inputs) == 1 and by_position:
        return tuple(inputs.values()), {}
    if unknown and signature is not None and inspect.Parameter.VAR_KEYWORD not in kinds:
        needed = needed_arguments(signature)
        remedy = f"; {annotate_whole(needed[0].name)}" if len(needed) == 1 else ""
        raise ConfigError(
            f"a dict row's inputs go to the model by name, its forward takes {_takes(signature)}, but rows hold "
            f"{_holds(inputs)}: rename or remove {', '.join(map(repr, unknown))} "
            f"(a datasets.Dataset: rename_column, remove_columns), or name the label with target={remedy}"
        )
    rest = dict(inputs)
    leading = []
    for name, parameter in parameters.items():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or name not in rest:
            break
        leading.append(rest.pop(name))
    return tuple(leading), rest


def _takes(signature: inspect.Signature) -> str:
    return str(signature.replace(return_annotation=inspect.Signature.empty))


def _holds(inputs: Tree) -> str:
    if isinstance(inputs, dict):
        return ", ".join(map(repr, inputs))
    return f"{len(inputs)} inputs" if isinstance(inputs, tuple) else "one input"
