"""What a release says of itself is the same everywhere."""

import re
import tomllib
from pathlib import Path

import yaml

import psl_flower

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert psl_flower.__version__ == PROJECT["version"] == citation["version"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert PROJECT["version"] in headings


def test_all_holds_every_extra_and_the_docs_name_each():
    extras = PROJECT["optional-dependencies"]
    named = set(re.findall(r"\[(.*?)\]", extras["all"][0])[0].split(","))
    assert named == extras.keys() - {"all", "test", "dev"}
    readme = (ROOT / "README.md").read_text()
    assert [name for name in named if name not in readme] == []


def test_every_extra_that_the_code_names_is_there():
    """A message with an extra that does not exist would send people nowhere."""
    named = set()
    for path in (ROOT / "psl_flower").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"\bextra\(\"(\w+)\"", text)) | set(
            re.findall(r"check_extra\(\"\w+\", \"(\w+)\"", text)
        )
    assert named >= {"samplers", "simulation", "vision", "experiments"}
    assert named <= PROJECT["optional-dependencies"].keys()
