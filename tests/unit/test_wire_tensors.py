"""Trees of tensors in frames: they survive bit by bit, or nearly in fewer bits; nothing malformed gets out."""

import numpy as np
import pytest
import torch

from psl_flower import tree
from psl_flower.errors import ProtocolError
from psl_flower.exchange.frames import Decoder, Frame, encode
from psl_flower.exchange.tensors import Packer, Unpacker, from_raw_bytes, raw_bytes

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
COMPLEX = [torch.complex64, torch.complex128]


def sent(value, wire_dtype="float32", *, reduce=False):
    """Return a tree as it arrives, and the bytes that travelled."""
    packer, decoder, frame = Packer(wire_dtype), Decoder(), None
    spec = packer.pack(value, reduce=reduce)
    for chunk in encode(Frame({"spec": spec}, packer.buffers), 0):
        frame = decoder.feed(chunk)
    unpacker = Unpacker(frame.buffers)
    received = unpacker.unpack(frame.header["spec"])
    unpacker.finish()
    assert packer.num_bytes == unpacker.num_bytes == frame.num_bytes()
    return received, packer.num_bytes


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# --- one tensor ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, *COMPLEX, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 0, 3), (2, 3, 4)])
def test_tensors_survive_in_every_dtype(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    assert same(sent(tensor)[0], tensor)


def test_special_values_keep_their_bits():
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    for value in (tensor, tensor.bfloat16()):
        received, _ = sent(value)
        width = {4: torch.int32, 2: torch.int16}[value.element_size()]
        assert torch.equal(received.view(width), value.view(width))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(12.0)[::3],
        torch.ones(3, 1).expand(3, 5),
        torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        torch.randn(3, requires_grad=True) * 2,
        torch.eye(3).to_sparse(),
    ],
    ids=["transposed", "strided", "expanded", "channels-last", "conjugate", "negated", "attached", "sparse"],
)
def test_tensors_survive_in_every_layout(tensor):
    received, _ = sent(tensor)
    assert same(received, tensor.detach().to_dense().resolve_conj().resolve_neg())
    assert not received.requires_grad


def test_neither_end_copies_what_lies_right_in_memory():
    tensor = torch.randn(5, 7)
    data = raw_bytes(tensor)
    assert np.frombuffer(data, np.uint8).ctypes.data == tensor.data_ptr()
    assert len(data) == 5 * 7 * 4  # the elements alone, no header
    assert from_raw_bytes("float32", (5, 7), data).data_ptr() == tensor.data_ptr()


def test_dtypes_that_cannot_be_sent_are_refused():
    with pytest.raises(ProtocolError, match=r"float8_e5m2 cannot be sent; allowed: float64, .*bfloat16"):
        sent(torch.zeros(2).to(torch.float8_e5m2))


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "message"),
    [
        ("float31", (2,), b"\0" * 8, "expected raw bytes of a known dtype, got 'float31'"),
        ("object", (2,), b"\0" * 16, "got 'object'"),
        ("float32", (2,), b"\0" * 7, r"expected 8 bytes for float32 \(2,\), got 7"),
        ("float32", (), b"", "expected 4 bytes"),
        ("float32", (2**40, 2**40), b"\0" * 8, "too large"),
        ("float32", (2**40,), b"\0" * 8, "expected 4398046511104 bytes .*, got 8"),
        ("float32", (-1, -2), b"\0" * 8, "none negative"),
        ("float32", (1,) * 17, b"\0" * 4, "at most 16 dimensions"),
        ("float32", (0, 2**62, 2**62), b"", "too large"),
        ("float32", (0, 2**70), b"", "too large"),
        ("float32", ("2",), b"\0" * 8, "a dtype and a shape of whole numbers"),
        ("float32", (True,), b"\0" * 4, "a dtype and a shape of whole numbers"),
        (5, (2,), b"\0" * 8, "a dtype and a shape of whole numbers"),
        ("float32", 2, b"\0" * 8, "expected the description of a tensor"),
    ],
)
def test_malformed_tensors_are_refused(dtype, shape, data, message):
    spec = {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape}
    with pytest.raises(ProtocolError, match=message):
        Unpacker([[memoryview(data)]]).unpack(spec)


# --- trees -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value",
    [
        None,
        (),
        {},
        (torch.ones(2), None, (torch.zeros(0), {})),
        {"b": torch.ones(2), "a": {"x": (torch.arange(3),), "": None}},
    ],
)
def test_trees_keep_their_structure(value):
    received, _ = sent(value)
    assert tree.structure(received) == tree.structure(value)
    assert all(map(same, tree.leaves(received), tree.leaves(value)))


def nested(depth):
    return [nested(depth - 1)] if depth else None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (5, "expected the description of a tensor, got 5"),
        ({"keys": ["a"]}, "as many keys as values"),
        ({"keys": ["a", "b"], "values": [None]}, "as many keys as values"),
        ({"keys": "ab", "values": [None, None]}, "as many keys as values"),
        ({"keys": ["a", "a"], "values": [None, None]}, "keys must be different strings"),
        ({"keys": [1], "values": [None]}, "keys must be different strings"),
        ({"keys": ["x" * 1001], "values": [None]}, "at most 1000 characters"),
        (nested(20), "nested 16 deep"),
        ([None] * 100_001, "at most 100000 tensors"),
        ([{"dtype": "int8", "shape": [0]}] * 2, "fewer buffers than its header describes"),
    ],
)
def test_malformed_trees_are_refused(spec, message):
    with pytest.raises(ProtocolError, match=message):
        Unpacker([[memoryview(b"")]]).unpack(spec)


def test_buffers_that_nobody_asked_for_are_refused():
    with pytest.raises(ProtocolError, match="more buffers than its header describes"):
        Unpacker([[memoryview(b"")]]).finish()


# --- columns ---------------------------------------------------------------------------------------------------------
def column(values, dtype, shape):
    packer = Packer()
    spec = packer.column(values)
    assert packer.num_bytes == 0  # only trees count
    return Unpacker(packer.buffers).column(spec, dtype, shape)


def test_columns_arrive_as_arrays():
    values = np.arange(12).reshape(3, 4)[:, ::2]
    values.setflags(write=False)
    received = column(values, torch.int64, (3, None))
    np.testing.assert_array_equal(received, values)
    assert received.dtype == np.int64


@pytest.mark.parametrize(
    ("values", "dtype", "shape"),
    [
        (np.arange(3), torch.int64, (4,)),
        (np.arange(3), torch.int64, (3, 1)),
        (np.arange(3), torch.float64, (3,)),
        (np.arange(3.0, dtype=np.float32), torch.float64, (None,)),
    ],
)
def test_columns_of_another_form_are_refused(values, dtype, shape):
    with pytest.raises(ProtocolError, match=r"expected a column torch\.\w+ \(.*\), got torch\.\w+ \("):
        column(values, dtype, shape)


# --- fewer bits ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wire_dtype", "tolerance", "share"),
    [("float32", 0, 1), ("float16", 2**-11, 0.5), ("bfloat16", 2**-8, 0.5), ("int8", 0.5 / 127, 0.27)],
)
@pytest.mark.parametrize("magnitude", [1.0, 1e-12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_small_beside_the_largest_value(wire_dtype, tolerance, share, magnitude, dtype):
    x = torch.randn(8, 4, 50, generator=torch.Generator().manual_seed(0), dtype=dtype) * magnitude
    y, num_bytes = sent(x, wire_dtype, reduce=True)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert float((y - x).abs().max()) <= tolerance * 1.01 * float(x.abs().max())
    assert num_bytes <= x.numel() * 4 * share * (2 if wire_dtype == "float32" and dtype == torch.float64 else 1)


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16", "int8"])
def test_only_what_may_be_reduced_is(wire_dtype):
    x = torch.randn(8, 4)
    assert same(sent(x, wire_dtype)[0], x)


def test_int8_has_a_scale_of_its_own_for_each_example():
    x = torch.randn(3, 100) * torch.tensor([1.0, 1e-6, 0.0])[:, None]
    y, _ = sent(x, "int8", reduce=True)
    assert ((y - x).abs().amax(dim=1) <= x.abs().amax(dim=1) / 127).all()


def test_float16_keeps_gradients_that_float16_alone_would_lose():
    x = torch.tensor([[3e-9, -1e-9, 0.0]])
    assert not x.half().any()
    y, _ = sent(x, "float16", reduce=True)
    assert torch.allclose(y, x, rtol=1e-3, atol=0)


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(wire_dtype, bad):
    y, _ = sent(torch.tensor([[1.0, bad], [1.0, 2.0]]), wire_dtype, reduce=True)
    assert not torch.isfinite(y[0]).all()


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "tensor", [torch.arange(5), torch.zeros(0, 3), torch.randn(4).half(), torch.tensor(2.5), torch.zeros(2, 2)]
)
def test_integers_and_empty_and_short_tensors(wire_dtype, tensor):
    y, _ = sent(tensor, wire_dtype, reduce=True)
    assert y.dtype == tensor.dtype
    assert torch.allclose(y, tensor, atol=0.02)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"dtype": "int64", "shape": [2], "wire": "int8"}, "do not travel as 'int8'"),
        ({"dtype": "float32", "shape": [0], "wire": "int8"}, "do not travel as 'int8'"),
        ({"dtype": "float32", "shape": [2], "wire": "int4"}, "do not travel as 'int4'"),
        ({"dtype": "float32", "shape": [2], "wire": "float16"}, "with exponent None"),
        ({"dtype": "float32", "shape": [2], "wire": "float16", "exponent": 2000}, "with exponent 2000"),
        ({"dtype": "float31", "shape": [2], "wire": "float16", "exponent": 0}, "known dtype"),
    ],
)
def test_malformed_reductions_are_refused(spec, message):
    with pytest.raises(ProtocolError, match=message):
        Unpacker([[memoryview(b"\0" * 4)]] * 2).unpack(spec)
