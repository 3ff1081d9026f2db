"""Whole numbers: what is taken for them, and what every refusal says."""

import numpy as np
import pytest

from psl_flower.checks import as_int64
from psl_flower.errors import ConfigError


class TestAsInt64:
    @pytest.mark.parametrize(
        "values", [[1, 2], [1.0, 2.0], np.array([1, 2], np.uint8), np.array([1, 2], np.float16), ()]
    )
    def test_whole_numbers_become_int64(self, values):
        result = as_int64(values, "x")
        assert result.dtype == np.int64
        assert result.tolist() == list(values)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([1, 2.5], "x must be whole numbers, got 2.5"),
            ([1, np.nan], "x must be whole numbers, got nan"),
            ([np.inf], "x must be whole numbers, got inf"),
            (["1"], "x must be whole numbers, got dtype <U1"),
            ([True], "x must be whole numbers, got dtype bool"),
            ([1j], "x must be whole numbers, got dtype complex128"),
            ([None], "x must be whole numbers, got dtype object"),
            ([2**70], "x must be whole numbers, got dtype object"),
            ([[1], [2, 3]], "x must be an array of whole numbers"),
            (np.array([2**63], np.uint64), "x must fit in 64 bits, got 9223372036854775808"),
            ([1e300], r"x must fit in 64 bits, got 1e\+300"),
            ([-1e19], r"x must fit in 64 bits, got -1e\+19"),
        ],
    )
    def test_anything_else_is_refused(self, values, message):
        with pytest.raises(ConfigError, match=message):
            as_int64(values, "x")

    def test_the_largest_that_fits(self):
        assert as_int64(np.array([2**63 - 1], np.uint64), "x").tolist() == [2**63 - 1]

    def test_result_is_a_read_only_copy(self):
        values = np.array([1, 2])
        result = as_int64(values, "x")
        values[0] = 7
        assert result.tolist() == [1, 2]
        with pytest.raises(ValueError, match="read-only"):
            result[0] = 3

    def test_a_view_leaves_its_source_writable(self):
        values = np.array([1, 2])
        result = as_int64(values, "x", copy=False)
        values[0] = 7
        assert result.tolist() == [7, 2]
        with pytest.raises(ValueError, match="read-only"):
            result[0] = 3
