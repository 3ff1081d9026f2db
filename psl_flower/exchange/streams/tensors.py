"""Tensors in frames: their metadata in the header, their bytes in buffers, in fewer bits where that was asked for.

Note [Wire dtypes]: activations and their gradients may travel in fewer bits than they have; both ends still compute in
the dtype they had. A float16 ends at 65,504 and loses everything below 6e-8, which is where gradients of a mean loss
lie, so tensors are scaled by a power of two (exact, and undone on arrival) to a largest magnitude of 2^12. An int8 has
one scale a row, and the row is the example: examples that the model has learned have gradients a thousand times
smaller than the others', and one scale for all would flush them to zero. bfloat16 has float32's range: no scale.
Error feedback would need the same example in every step, and every example comes once an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from psl_flower.errors import ProtocolError
from psl_flower.exchange.codec import dtype_name, from_raw_bytes, raw_bytes
from psl_flower.exchange.streams.frames import Buffer

_LARGEST_EXPONENT = 12  # of scaled float16 values: far from the end of the range, so that nothing rounds to infinity
_REDUCIBLE = (torch.float32, torch.float64)
_CASTS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Packer:
    """Collects the tensors of one frame.

    Parameters
    ----------
    wire_dtype : str
        For the tensors packed with ``reduce=True``, see `StreamOptions`.
    """

    def __init__(self, wire_dtype: str = "float32") -> None:
        self._wire_dtype = wire_dtype
        self.buffers: list[list[Buffer]] = []

    def pack(self, *parts: Tensor, reduce: bool = False) -> dict[str, Any]:
        """Add a tensor, given as parts to be joined in their first dimension; return its metadata.

        The parts are not joined in memory: they are only written one after the other.
        """
        first = parts[0]
        shape = list(first.shape)
        if len(parts) > 1:
            if any(p.shape[1:] != first.shape[1:] or p.dtype != first.dtype for p in parts):
                raise ProtocolError("the parts of a tensor differ in dtype, or in more than their first dimension")
            shape[0] = sum(len(part) for part in parts)
        spec: dict[str, Any] = {"dtype": dtype_name(first), "shape": shape}
        if not reduce or self._wire_dtype == "float32" or first.dtype not in _REDUCIBLE or not math.prod(shape):
            self.buffers.append([raw_bytes(part) for part in parts])
            return spec
        whole = torch.cat(parts) if len(parts) > 1 else first
        return {**spec, "wire": self._wire_dtype, **self._reduce(whole.detach())}

    def _reduce(self, tensor: Tensor) -> dict[str, Any]:
        if self._wire_dtype == "int8":
            rows = tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(1, -1)
            scales = rows.abs().amax(dim=1, keepdim=True).float() / 127
            # a row that is not finite stays so, and is refused where it arrives
            values = (rows / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().nan_to_num(0, 0, 0)
            self.buffers += [[raw_bytes(values.to(torch.int8))], [raw_bytes(scales)]]
            return {}
        exponent = 0
        if self._wire_dtype == "float16":
            largest = float(tensor.abs().max())
            if 0 < largest < math.inf:
                exponent = max(-1000, min(1000, _LARGEST_EXPONENT - math.frexp(largest)[1]))
            tensor = _scaled(tensor, exponent)
        self.buffers.append([raw_bytes(tensor.to(_CASTS[self._wire_dtype]))])
        return {"exponent": exponent}


class Unpacker:
    """Takes the tensors out of a frame, in the order they were packed in.

    Parameters
    ----------
    buffers : sequence of (sequence of memoryview)
        Of a decoded frame.
    """

    def __init__(self, buffers: Sequence[Sequence[Buffer]]) -> None:
        self._buffers = iter(buffers)

    def unpack(self, spec: Any) -> Tensor:
        """Return the next tensor, described by `spec`: a view of the frame, unless it was reduced.

        Raises
        ------
        ProtocolError
            If it is not a tensor's description, or the buffer does not fit it.
        """
        if not isinstance(spec, dict) or not isinstance(spec.get("shape"), list):
            raise ProtocolError(f"expected the description of a tensor, got {spec!r:.80}")
        name, shape, wire = spec.get("dtype"), tuple(spec["shape"]), spec.get("wire")
        if not isinstance(name, str) or any(type(n) is not int for n in shape):
            raise ProtocolError(f"expected a dtype and a shape of whole numbers, got {spec!r:.80}")
        if wire is None:
            return from_raw_bytes(name, shape, self._next())
        dtype = from_raw_bytes(name, (0,), b"").dtype
        if dtype not in _REDUCIBLE or not math.prod(shape):
            raise ProtocolError(f"tensors of {name} {shape} do not travel as {wire!r:.80}")
        if wire == "int8":
            values = from_raw_bytes("int8", shape, self._next())
            rows = values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)
            scales = from_raw_bytes("float32", (len(rows), 1), self._next())
            return (rows.to(dtype) * scales.to(dtype)).reshape(shape)
        exponent = spec.get("exponent")
        if wire not in list(_CASTS) or type(exponent) is not int or abs(exponent) > 1000:
            raise ProtocolError(f"tensors do not travel as {wire!r:.80} with exponent {exponent!r:.80}")
        return _scaled(from_raw_bytes(wire, shape, self._next()).to(dtype), -exponent)

    def finish(self) -> None:
        """Raise ProtocolError if a buffer was not asked for."""
        if next(self._buffers, None) is not None:
            raise ProtocolError("the frame holds more buffers than its header describes")

    def _next(self) -> Buffer:
        pieces = next(self._buffers, None)
        if pieces is None:
            raise ProtocolError("the frame holds fewer buffers than its header describes")
        return pieces[0]


def _scaled(tensor: Tensor, exponent: int) -> Tensor:
    """Multiply by ``2 ** exponent``, in two steps: the factor alone may be beyond float32 where the product is not."""
    if not exponent:
        return tensor
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)
