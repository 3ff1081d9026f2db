"""Fields of a header, checked: what comes from the wire may be anything."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

from psl_flower.errors import ProtocolError
from psl_flower.exchange.limits import MAX_CONFIG, MAX_ENTRIES, MAX_TEXT
from psl_flower.protocol import Config


def field(header: Mapping[str, Any], name: str, kind: type, most: int = MAX_TEXT) -> Any:
    """Return a field of a type; a text of at most so many characters."""
    value = header.get(name)
    if type(value) is not kind or (type(value) is int and value.bit_length() > 63):
        raise ProtocolError(f"expected {name!r} to be of type {kind.__name__}, got {value!r:.80}")
    if isinstance(value, str) and len(value) > most:
        raise ProtocolError(f"expected {name!r} to be of at most {most} characters, got {len(value)}")
    return value


def integers(header: Mapping[str, Any], name: str, bits: int = 63) -> list[int]:
    """Return a list of integers of at most so many bits."""
    values: list[int] = limited(field(header, name, list), MAX_ENTRIES)
    if not all(type(value) is int and value.bit_length() <= bits for value in values):
        raise ProtocolError(f"expected {name!r} to be a list of integers, got {values!r:.80}")
    return values


def nodes_of(header: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids of nodes, each once."""
    nodes = tuple(integers(header, "nodes", bits=64))  # Flower's node ids have no sign
    if not nodes or len(set(nodes)) != len(nodes):
        raise ProtocolError(f"expected nodes, each once, got {nodes!r:.80}")
    return nodes


def limited(values: Any, most: int) -> Any:
    """Return values that must not be more than so many."""
    if len(values) > most:
        raise ProtocolError(f"expected at most {most} entries, got {len(values)}")
    return values


def seconds_of(value: Any, most: float = 2**53) -> float:
    """Return a time."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ProtocolError(f"expected seconds, finite and not negative, got {value!r:.80}")
    if value > most:
        raise ProtocolError(f"expected at most {most:g} seconds, got {value!r:.80}")
    return float(value)


def node_of(text: str) -> int:
    """Return a number that is a key, and so a text, in JSON."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise ProtocolError(f"expected a number, got {text!r:.80}")
    return int(text)


# --- configuration ---------------------------------------------------------------------------------------------------
def encode_config(config: Config) -> dict[str, Any]:
    """Return a ConfigRecord's values as JSON has them: bytes as base64, and floats that are no number by name."""
    return {name: _each(_encode_value, value) for name, value in config.items()}


def _encode_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def decode_config(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what `encode_config` was given."""
    found = limited(field(header, name, dict), MAX_CONFIG)
    return {key: _each(_decode_value, value) for key, value in found.items()}


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    return [function(v) for v in value] if isinstance(value, list) else function(value)


def _decode_value(value: Any) -> Any:
    if isinstance(value, dict):
        try:
            if set(value) == {"bytes"}:
                return base64.b64decode(value["bytes"], validate=True)
            if set(value) == {"float"}:
                return float(value["float"])
        except (TypeError, ValueError) as exc:
            raise ProtocolError(f"not a configuration value: {value!r:.80}") from exc
    if not isinstance(value, bool | int | float | str):
        raise ProtocolError(f"not a configuration value: {value!r:.80}")
    return value
