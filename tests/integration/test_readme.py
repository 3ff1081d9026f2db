"""What README shows works: its Python blocks run, in order, in one namespace."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_python_blocks_run(capsys):
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    accuracy, steps = capsys.readouterr().out.splitlines()[:2]
    assert 0.9 < float(accuracy) < 0.99
    assert steps.startswith("16 [125, 125")


def test_linked_files_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("http") and not (README.parent / t).exists()]
    assert not missing
