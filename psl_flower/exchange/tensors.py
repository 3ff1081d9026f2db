"""Trees of tensors in frames: their description in the header, their bytes in buffers, in fewer bits where asked for.

Note [Wire dtypes]: activations and their gradients may travel in fewer bits than they have; both ends still compute in
the dtype they had. A float16 ends at 65,504 and loses everything below 6e-8, which is where gradients of a mean loss
lie, so tensors are scaled by a power of two (exact, and undone on arrival) to a largest magnitude of 2^12. An int8 has
one scale a row, and the row is the example: examples that the model has learned have gradients a thousand times
smaller than the others', and one scale for all would flush them to zero. bfloat16 has float32's range: no scale.
Error feedback would need the same example in every step, and every example comes once an epoch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psl_flower.errors import ProtocolError
from psl_flower.exchange.frames import Buffer
from psl_flower.exchange.limits import MAX_DEPTH, MAX_DIMENSIONS, MAX_ELEMENTS, MAX_LEAVES, MAX_NAME, MAX_PACKED
from psl_flower.exchange.packing import LEVELS, MAX_BITS, SPARSE, num_mask_bytes, packed, unpack_levels, unpack_sparse
from psl_flower.tree import Tree

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_EXPONENT = 12  # of scaled float16 values: far from the end of the range, so that nothing rounds to infinity
_PACKABLE = (torch.float32, torch.float64)
_CASTS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_WIDTHS = {"float32": 8, "int8": 1, **{name: dtype.itemsize for name, dtype in _CASTS.items()}}

# torch warns once per process that a tensor over immutable bytes must not be written to; none of ours is.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class Packer:
    """Collects the tensors of one frame.

    Parameters
    ----------
    wire_dtype : str
        For the trees packed with ``reduce=True``, see `StreamOptions`.

    Attributes
    ----------
    num_bytes : int
        Of the trees so far; columns do not count.
    """

    def __init__(self, wire_dtype: str = "float32") -> None:
        self._wire_dtype = wire_dtype
        self.buffers: list[list[Buffer]] = []
        self.num_bytes = 0

    def pack(self, tree: Tree, *, reduce: bool = False, packing: int | None = None) -> Any:
        """Add the tensors of a tree; return its description, in JSON's terms.

        With `reduce` in fewer bits, where the wire has fewer; with `packing` in fewer bytes, where they tell little.

        None is null, a tuple a list, a dict ``{"keys": [...], "values": [...]}``, and a tensor has a dtype and a shape.
        """
        if tree is None:
            return None
        if isinstance(tree, Mapping):
            values = [self.pack(value, reduce=reduce, packing=packing) for value in tree.values()]
            return {"keys": list(tree), "values": values}
        if isinstance(tree, tuple | list):
            return [self.pack(value, reduce=reduce, packing=packing) for value in tree]
        before = len(self.buffers)
        spec = self._tensor(tree.detach(), reduce, packing)
        self.num_bytes += sum(piece.nbytes for pieces in self.buffers[before:] for piece in pieces)
        return spec

    def column(self, values: NDArray[Any]) -> Any:
        """Add a numpy array; return its description."""
        self.buffers.append([memoryview(values.tobytes())])
        return {"dtype": values.dtype.name, "shape": list(values.shape)}

    def _tensor(self, tensor: Tensor, reduce: bool, packing: int | None = None) -> dict[str, Any]:
        spec: dict[str, Any] = {"dtype": dtype_name(tensor), "shape": list(tensor.shape)}
        packs = packing is not None and tensor.dtype in _PACKABLE and 0 < tensor.numel() <= MAX_PACKED
        if packing is not None and packs and (not reduce or self._wire_dtype == "float32"):
            found = packed(tensor.cpu().contiguous(), packing)
            if found is not None:
                self.buffers += [[raw_bytes(t)] for t in found[1]]
                return {**spec, **found[0]}
        if not reduce or not _reducible(tensor.dtype, self._wire_dtype) or not tensor.numel():
            self.buffers.append([raw_bytes(tensor)])
            return spec
        return {**spec, "wire": self._wire_dtype, **self._reduce(tensor)}

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

    Attributes
    ----------
    num_bytes : int
        Of the trees so far; columns do not count.
    """

    def __init__(self, buffers: Sequence[Sequence[Buffer]]) -> None:
        self._buffers = iter(buffers)
        self._leaves = self._unpacked = 0
        self.num_bytes = 0

    def unpack(self, spec: Any, depth: int = 0) -> Tree:
        """Return the next tree, described by `spec`; its tensors are views of the frame, unless they were reduced.

        Raises
        ------
        ProtocolError
            If it is no tree's description, or the buffers do not fit it.
        """
        self._leaves += 1
        if self._leaves > MAX_LEAVES or depth > MAX_DEPTH:
            raise ProtocolError(f"a frame holds at most {MAX_LEAVES} tensors, nested {MAX_DEPTH} deep")
        if spec is None:
            return None
        if isinstance(spec, list):
            return tuple(self.unpack(part, depth + 1) for part in spec)
        if isinstance(spec, dict) and "keys" in spec:
            keys, values = spec["keys"], spec.get("values")
            if not isinstance(keys, list) or not isinstance(values, list) or len(keys) != len(values):
                raise ProtocolError(f"expected as many keys as values, got {spec!r:.80}")
            if len(set(map(str, keys))) != len(keys) or not all(type(k) is str and len(k) <= MAX_NAME for k in keys):
                raise ProtocolError(
                    f"keys must be different strings of at most {MAX_NAME} characters, got {keys!r:.80}"
                )
            return {key: self.unpack(value, depth + 1) for key, value in zip(keys, values, strict=True)}
        return self._tensor(spec)

    def column(self, spec: Any, dtype: torch.dtype, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """Return the next numpy array; it must have that dtype and shape, None is any length."""
        counted = self.num_bytes
        tensor = self._tensor(spec)
        self.num_bytes = counted
        fits = len(tensor.shape) == len(shape) and all(
            b is None or a == b for a, b in zip(tensor.shape, shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            raise ProtocolError(f"expected a column {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        return np.asarray(tensor.numpy())

    def _tensor(self, spec: Any) -> Tensor:
        if not isinstance(spec, dict) or not isinstance(spec.get("shape"), list):
            raise ProtocolError(f"expected the description of a tensor, got {spec!r:.80}")
        name, shape, wire = spec.get("dtype"), tuple(spec["shape"]), spec.get("wire")
        if not isinstance(name, str) or any(type(n) is not int for n in shape):
            raise ProtocolError(f"expected a dtype and a shape of whole numbers, got {spec!r:.80}")
        if "packed" in spec:
            return self._packed(name, shape, spec)
        if wire is None:
            return from_raw_bytes(name, shape, self._next())
        dtype = from_raw_bytes(name, (0,), b"").dtype
        if not _reducible(dtype, str(wire)) or not math.prod(shape):
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

    def _packed(self, name: str, shape: tuple[int, ...], spec: Mapping[str, Any]) -> Tensor:
        dtype = from_raw_bytes(name, (0,), b"").dtype
        how, bits, entries = spec["packed"], spec.get("bits", 1), spec.get("entries", 0)
        if dtype not in _PACKABLE or not shape or any(n < 1 for n in shape) or len(shape) > MAX_DIMENSIONS:
            raise ProtocolError(f"tensors of {name} {shape!r:.80} do not travel packed")
        count = math.prod(shape)
        self._unpacked += count
        if self._unpacked > MAX_PACKED:
            raise ProtocolError(f"a frame holds at most {MAX_PACKED} packed elements, got more")
        if how not in (SPARSE, LEVELS) or type(bits) is not int or type(entries) is not int:
            raise ProtocolError(f"tensors do not travel packed as {how!r:.80}")
        if how == SPARSE:
            mask = from_raw_bytes("uint8", (num_mask_bytes(count),), self._next())
            return unpack_sparse(dtype, shape, mask, from_raw_bytes(name, (entries,), self._next()))
        if not 2 <= bits <= MAX_BITS:
            raise ProtocolError(f"an entry has 2 to {MAX_BITS} bits, got {bits}")
        codes = from_raw_bytes("uint8", (num_mask_bytes(count, bits),), self._next())
        return unpack_levels(dtype, shape, bits, codes, from_raw_bytes(name, (shape[0], 1), self._next()))

    def finish(self) -> None:
        """Raise ProtocolError if a buffer was not asked for."""
        if next(self._buffers, None) is not None:
            raise ProtocolError("the frame holds more buffers than its header describes")

    def _next(self) -> Buffer:
        pieces = next(self._buffers, None)
        if pieces is None:
            raise ProtocolError("the frame holds fewer buffers than its header describes")
        self.num_bytes += len(pieces[0])
        return pieces[0]


def _reducible(dtype: torch.dtype, wire_dtype: str) -> bool:
    """Return whether tensors travel in fewer bits than they have."""
    return dtype.is_floating_point and _WIDTHS.get(wire_dtype, 8) < dtype.itemsize


def _scaled(tensor: Tensor, exponent: int) -> Tensor:
    """Multiply by ``2 ** exponent``, in two steps: the factor alone may be beyond float32 where the product is not."""
    if not exponent:
        return tensor
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)


# --- one tensor ------------------------------------------------------------------------------------------------------
def dtype_name(tensor: Tensor) -> str:
    """Return how a tensor's dtype is called on the wire."""
    if tensor.dtype not in _NAMES:
        raise ProtocolError(f"tensors of dtype {tensor.dtype} cannot be sent; allowed: {', '.join(_DTYPES)}")
    return _NAMES[tensor.dtype]


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's elements, row-major and little-endian, as bytes: a view if it lies so in memory already."""
    flat = tensor.detach().to_dense().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def from_raw_bytes(dtype_name: str, shape: tuple[int, ...], data: bytes | memoryview) -> Tensor:
    """Return the tensor that raw bytes hold, as a view of them.

    Raises
    ------
    ProtocolError
        If the dtype is unknown, the shape is impossible, or the number of bytes does not fit both.
    """
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise ProtocolError(f"expected raw bytes of a known dtype, got {dtype_name!r:.80}")
    if len(shape) > MAX_DIMENSIONS or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ProtocolError(f"expected at most {MAX_DIMENSIONS} dimensions, none negative, got {shape!r:.80}")
    if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise ProtocolError(f"expected a shape of at most {MAX_ELEMENTS} elements, got {shape!r:.80}: too large")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise ProtocolError(f"expected {expected} bytes for {dtype_name} {shape}, got {len(data)}")
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if expected else torch.empty(shape, dtype=dtype)
