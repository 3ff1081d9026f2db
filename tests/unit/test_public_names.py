"""What the package exports, and what importing parts of it does not drag in."""

import subprocess
import sys

import pytest

import psl_flower


def test_every_name_can_be_had():
    assert psl_flower.__all__ == sorted(psl_flower.__all__)
    for name in psl_flower.__all__:
        assert getattr(psl_flower, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'FedAvg'"):
        psl_flower.FedAvg  # noqa: B018


@pytest.mark.parametrize("module", ["psl_flower", "psl_flower.samplers", "psl_flower.metrics", "psl_flower.stragglers"])
def test_numpy_parts_import_neither_torch_nor_flower(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'flwr', 'ray', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
