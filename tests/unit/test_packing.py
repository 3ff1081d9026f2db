"""Rows that tell little travel in few bytes, and arrive as the numbers they were."""

import numpy as np
import pytest
import torch

from psl_flower.client.defending import packing_of
from psl_flower.errors import ProtocolError
from psl_flower.exchange.tensors import Packer, Unpacker
from psl_flower.privacy import GaussianNoise, LaplaceNoise, Quantize, RandomizedResponse, TopK

MANY = 2**20 // 100 + 7  # rows of 100, of which bits are handled in several turns


def sent(tensor, packing, wire_dtype="float32"):
    packer = Packer(wire_dtype)
    spec = packer.pack(tensor, reduce=True, packing=packing)
    buffers = [[memoryview(bytes(piece)) for piece in pieces] for pieces in packer.buffers]
    unpacker = Unpacker(buffers)
    found = unpacker.unpack(spec)
    unpacker.finish()
    assert unpacker.num_bytes == packer.num_bytes
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    return found, packer.num_bytes


def rows(n, *shape, seed=0, dtype=torch.float32):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(5, 1), (64, 16), (3, 99)])
def test_the_largest_entries_travel_with_a_bit_for_each(dtype, n, k):
    left = TopK(k).rows(rows(n, 4, 25, dtype=dtype), None)
    found, num_bytes = sent(left, TopK(k).packing)
    assert torch.equal(found, left)
    assert num_bytes == min(-(-n * 100 // 8) + n * k * dtype.itemsize, n * 100 * dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 8, 11, 16])
def test_levels_travel_in_their_bits_and_a_scale_a_row(dtype, bits):
    x = rows(40, 7, 9, dtype=dtype) * torch.logspace(-20, 20, 40, dtype=dtype).reshape(-1, 1, 1)
    x[3] = 0
    left = Quantize(bits).rows(x, None)
    found, num_bytes = sent(left, bits)
    assert torch.equal(found, left)
    assert num_bytes == -(-40 * 63 * bits // 8) + 40 * dtype.itemsize


@pytest.mark.parametrize("packing", [0, 4])
def test_many_rows_are_packed_in_turns(packing):
    x = rows(MANY, 100)
    left = TopK(3).rows(x, None) if packing == 0 else Quantize(4).rows(x, None)
    found, num_bytes = sent(left, packing)
    assert torch.equal(found, left)
    assert num_bytes < 0.16 * left.nbytes


def test_a_minus_zero_and_what_is_not_finite_stay_what_they_are():
    x = torch.zeros(4, 50)
    x[0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
    found, num_bytes = sent(x, 0)
    assert np.array_equal(found.numpy().view(np.int32), x.numpy().view(np.int32))
    assert num_bytes == 25 + 3 * 4
    assert sent(torch.full((4, 50), float("nan")), 4)[1] == 800


@pytest.mark.parametrize("packing", [0, 2, 16])
def test_other_numbers_go_as_they_are(packing):
    x = rows(6, 50)
    found, num_bytes = sent(x, packing)
    assert torch.equal(found, x)
    assert num_bytes == x.nbytes
    for other in (torch.zeros(0, 3), torch.arange(12).reshape(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16)):
        assert sent(other, packing)[1] == other.nbytes


def test_a_wire_of_fewer_bits_has_its_own_way():
    left = Quantize(4).rows(rows(6, 50), None)
    assert sent(left, 4, "int8")[1] == 6 * (50 + 4)


def test_the_last_defence_of_rows_decides():
    assert packing_of([]) is packing_of([RandomizedResponse(1.0, 4)]) is None
    assert packing_of([GaussianNoise(1), TopK(3), RandomizedResponse(1.0, 4)]) == 0
    assert packing_of([TopK(3), Quantize(5)]) == 5
    assert packing_of([Quantize(5), LaplaceNoise(1)]) is None


@pytest.mark.parametrize(
    ("spec", "buffers", "message"),
    [
        ({"packed": "sparse", "entries": 2}, [b"\x80", b"\0" * 8], "names 1 entries, got 2"),
        ({"packed": "sparse", "entries": -1}, [b"\x80", b""], "none negative"),
        ({"packed": "sparse", "entries": 1}, [b"\x80\0", b"\0" * 4], "expected 1 bytes"),
        ({"packed": "sparse", "entries": 1.0}, [b"\x80", b"\0" * 4], "packed as 'sparse'"),
        ({"packed": "levels", "bits": 1}, [b"\0"], "2 to 16 bits, got 1"),
        ({"packed": "levels", "bits": 17}, [b"\0"], "2 to 16 bits, got 17"),
        ({"packed": "levels", "bits": 4}, [b"\0" * 3, b"\0" * 8], "expected 4 bytes"),
        ({"packed": "levels", "bits": 4}, [b"\0" * 4, b"\0" * 4], "expected 8 bytes"),
        ({"packed": "dense"}, [], "packed as 'dense'"),
        ({"packed": "sparse", "shape": []}, [], "do not travel packed"),
        ({"packed": "sparse", "shape": [0, 4]}, [], "do not travel packed"),
        ({"packed": "sparse", "dtype": "int64"}, [], "do not travel packed"),
    ],
)
def test_what_is_packed_wrongly_is_refused(spec, buffers, message):
    given = {"dtype": "float32", "shape": [2, 4], **spec}
    with pytest.raises(ProtocolError, match=message):
        Unpacker([[memoryview(b)] for b in buffers]).unpack(given)
