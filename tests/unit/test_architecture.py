"""The package keeps to its floors: what stands on one knows only those below, and no file is too long to be read."""

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "psl_flower"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
DOCUMENT = ROOT / "docs" / "architecture.md"

MOST_LINES = 450
# Longer ones there still are. None is added: divide the file instead.
LONGER: set[str] = set()


def imports(module: str, source: str) -> Iterator[str]:
    """Yield the modules of the package that a module imports, whether at once, within a function or for types only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            # `from package import module` names a module, `from module import name` does not
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in full]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "psl_flower":
                yield name if name in MODULES else f"{name}.__init__"


def part_of(module: str) -> str:
    """Return the package, or module beside the packages, that a module is in."""
    return module.split(".")[1]


def floors() -> dict[str, int]:
    """Return the floor of each part of the package, as the document numbers them."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## Floors")[1].split("\n## ")[0]
    rows = re.findall(r"^(\d+)\. (.*?):", section, re.MULTILINE)
    numbers = [int(number) for number, _ in rows]
    assert numbers == list(range(1, len(rows) + 1))
    placed = [(part, int(number)) for number, parts in rows for part in re.findall(r"`(\w+)`", parts)]
    assert len(dict(placed)) == len(placed), "a part stands on two floors"
    return dict(placed)


@functools.cache
def all_imports() -> dict[str, set[str]]:
    """Return what each module imports; the package's own __init__ is left out, it loads what it names on first use."""
    found = {m: set(imports(m, path.read_text(encoding="utf-8"))) for m, path in MODULES.items()}
    del found["psl_flower.__init__"]
    return found


def test_every_part_of_the_package_stands_on_a_floor() -> None:
    assert floors().keys() == {part_of(module) for module in all_imports()}


def test_a_floor_knows_only_those_below_it() -> None:
    floor = floors()
    upward = {
        f"{module} (floor {floor[part_of(module)]}) imports {name} (floor {floor[part_of(name)]})"
        for module, names in all_imports().items()
        for name in names
        if part_of(name) != part_of(module) and floor[part_of(name)] >= floor[part_of(module)]
    }
    assert not upward


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = all_imports()
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import psl_flower.errors", {"psl_flower.errors"}),
        ("from psl_flower import checkpoint", {"psl_flower.checkpoint"}),
        ("from psl_flower.checks import check_int", {"psl_flower.checks"}),
        ("from psl_flower.samplers import Sampler, base", {"psl_flower.samplers.__init__", "psl_flower.samplers.base"}),
        ("def f():\n    from psl_flower.errors import ConfigError", {"psl_flower.errors"}),
        ("import numpy\nfrom torch import nn", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, found: set[str]) -> None:
    assert set(imports("psl_flower.somewhere", source)) == found


def test_no_file_is_too_long() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module for module, length in lengths.items() if length > MOST_LINES} == LONGER
