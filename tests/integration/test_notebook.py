"""The notebook runs from its first cell to its last, and shows what its texts say."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook" / "psl_flower.ipynb"


def test_it_is_kept_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.slow
def test_it_runs_and_draws_while_it_trains():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    told = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    uniform, fixed = (
        [float(value) for value in re.findall(r"\d\.\d\d", line)]
        for line in told.splitlines()
        if line.startswith(("UGS", "FLS"))
    )
    assert len(uniform) == len(fixed) == 5
    assert 0.8 < uniform[-1] < 0.99
    assert fixed[-1] < uniform[-1] - 0.2
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", ())]
    assert len(pictures) == 2
    assert min(map(len, pictures)) > 20_000  # curves are on it: empty axes are smaller
