"""Defences as they are written in a configuration: ``"GaussianNoise(0.1), DistanceCorrelation(0.5)"``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from psl_flower.checks import check_choice
from psl_flower.errors import ConfigError
from psl_flower.privacy.defences.base import Defence
from psl_flower.privacy.defences.compression import Quantize, TopK
from psl_flower.privacy.defences.correlation import DistanceCorrelation
from psl_flower.privacy.defences.cut_gradient import ClipCutGradient
from psl_flower.privacy.defences.labels import RandomizedResponse
from psl_flower.privacy.defences.noise import GaussianNoise, LaplaceNoise
from psl_flower.privacy.defences.scrutiny import GradientScrutiny

DEFENCES: dict[str, type[Defence]] = {
    each.__name__: each
    for each in (
        ClipCutGradient,
        DistanceCorrelation,
        GaussianNoise,
        GradientScrutiny,
        LaplaceNoise,
        Quantize,
        RandomizedResponse,
        TopK,
    )
}


def parse_defences(text: str, others: Mapping[str, Callable[..., Any]] | None = None) -> tuple[Any, ...]:
    """Return the defences that a text names, in its order; none for an empty one. Nothing of it is evaluated.

    Parameters
    ----------
    text : str
    others : dict of str to callable, optional
        What else may be named.

    Raises
    ------
    ConfigError
        If it is written wrongly, or names what there is not.
    """
    rule = f"defences are written as 'GaussianNoise(0.1), Quantize(bits=8)', got {text!r:.200}"
    try:
        found = ast.parse(f"({text},)" if text.strip() else "()", mode="eval").body
    except (SyntaxError, ValueError) as exc:
        raise ConfigError(rule) from exc
    if not isinstance(found, ast.Tuple):
        raise ConfigError(rule)
    known: dict[str, Callable[..., Any]] = {**DEFENCES, **(others or {})}
    made = []
    for call in found.elts:
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ConfigError(rule)
        if not all(each.arg for each in call.keywords):
            raise ConfigError(rule)
        name = check_choice(call.func.id, "a defence", known)
        try:
            values = [_literal(value) for value in call.args]
            named = {str(each.arg): _literal(each.value) for each in call.keywords}
            made.append(known[name](*values, **named))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"{rule}: {name} takes numbers, {exc}") from exc
    return tuple(made)


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise ValueError(f"not {ast.unparse(value)!r:.80}") from None
