"""Randomness: seeded for a while for all three global generators, and put back to the bit."""
# ruff: noqa: NPY002 (the global generators are what this is about)

import random

import numpy as np
import pytest
import torch

from psl_flower.devices import numpy_words, pick_device, reseed, seeded
from psl_flower.errors import ConfigError

CPU = torch.device("cpu")


def draw():
    return random.gauss(0, 1), np.random.randn(), torch.rand(()).item(), random.random(), np.random.rand()


def test_equal_seeds_give_equal_numbers_whatever_was_drawn_before():
    drawn = []
    for before in range(2):
        for _ in range(before):
            draw()
        with seeded(2**62 + 5, CPU):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    with seeded(2**62 + 6, CPU):
        assert not set(draw()) & set(drawn[0])


def test_generators_are_put_back_also_after_an_error():
    with seeded(1, CPU):  # so that this test leaves nothing behind either
        draw()
        expected = draw()
    with seeded(1, CPU):
        draw()  # one normal number: Python and numpy hold back the second of its pair
        with pytest.raises(KeyError), seeded(3, CPU):
            raise KeyError(draw())
        assert draw() == expected


def test_a_number_that_numpy_holds_back_is_there_after_every_block():
    with seeded(1, CPU):
        expected = [np.random.randn() for _ in range(6)]
    found = []
    with seeded(1, CPU):
        for _ in expected:
            found.append(np.random.randn())
            for _ in range(2):
                with seeded(2, CPU):
                    np.random.randn()
    assert found == expected


def test_words_are_what_numpy_tells_of_its_generator():
    with seeded(3, CPU):
        for count in (0, 1, 700):
            np.random.rand(count)
            _, key, position, *_ = np.random.get_state()
            assert numpy_words() == key.tobytes() + np.int32(position).tobytes()


def test_a_generator_that_cannot_be_seeded_is_refused():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(ConfigError, match=r"got PCG64: leave np\.random\.set_bit_generator out"), seeded(3, CPU):
            pass
    finally:
        np.random.set_bit_generator(before)


def test_reseeding_within_a_block_is_a_block_of_its_own_seed():
    with seeded(8, CPU):
        expected = draw()
    with seeded(7, CPU):
        draw()
        reseed(8, CPU)
        assert draw() == expected


def test_numpy_and_torch_do_not_draw_the_same_numbers():
    """Both start a Mersenne twister from 32 bits; unseparated, torch's random bits are numpy's."""
    with seeded(11, CPU):
        theirs = np.random.randint(0, 2**32, 4, dtype=np.uint64).tolist()
        ours = [torch.randint(0, 2**32, ()).item() for _ in range(4)]
    assert not set(theirs) & set(ours)
    np_state = np.random.RandomState(11).randint(0, 2**32, 4, dtype=np.uint64).tolist()
    assert set(np_state) & set(ours)  # or this test could not fail


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_generator_of_a_gpu_is_seeded_and_put_back():
    gpu = torch.device("cuda")
    before, drawn = torch.cuda.get_rng_state(), []
    for _ in range(2):
        with seeded(5, gpu):
            drawn.append(torch.rand(3, device=gpu))
    assert torch.equal(*drawn)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_an_unknown_device_is_refused():
    assert pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"device must be 'auto' or one that torch has here.* got 'gpu'"):
        pick_device("gpu")
