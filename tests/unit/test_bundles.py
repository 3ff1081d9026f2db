"""The default app and each example make a bundle within the rules of Flower's Hub, and what they need is declared."""

import ast
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.app import app as flwr
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/pyproject.toml"))
MEBIBYTE = 2**20
# what is imported: the package it is of, where the names differ
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "psl_flower": "psl-flower",
    "flwr_datasets": "flwr-datasets",
    "PIL": "pillow",
}


@pytest.mark.parametrize("app", [ROOT, *EXAMPLES], ids=lambda path: "default" if path == ROOT else path.name)
def test_an_app_makes_a_bundle_within_the_hubs_rules(app, tmp_path, monkeypatch):
    # its folder must not have underscores in its name; that of a clone is its owner's business
    monkeypatch.chdir(tmp_path)
    (tmp_path / "an-app").symlink_to(app)
    path = tmp_path / "an-app" if app == ROOT else app
    done = CliRunner().invoke(flwr, ["build", "--app", str(path)])
    assert done.exit_code == 0, done.output
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as files:
        contents = {info.filename: files.read(info) for info in files.infolist()}
    assert contents.keys() >= {"pyproject.toml", "README.md", "LICENSE"}
    assert len(contents) <= 1000
    assert max(map(len, contents.values())) <= MEBIBYTE
    assert bundle.stat().st_size <= 10 * MEBIBYTE
    for content in contents.values():
        content.decode("utf-8")
    assert tomllib.loads(contents["pyproject.toml"].decode())["tool"]["flwr"]["app"]["fab-format-version"] == 1
    assert "SuperNodes" in contents["README.md"].decode() or "num-supernodes" in contents["README.md"].decode()
    assert contents["LICENSE"] == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("app", EXAMPLES, ids=lambda path: path.name)  # the default app's parts are extras
def test_an_example_declares_all_that_it_imports(app):
    declared = " ".join(tomllib.loads((app / "pyproject.toml").read_text())["project"]["dependencies"])
    own = {path.stem for path in app.iterdir()}
    imported = set()
    for path in app.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    needed = {DISTRIBUTIONS.get(name, name) for name in imported - own - sys.stdlib_module_names}
    assert {name for name in needed if name not in declared} == set()
