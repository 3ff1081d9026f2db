"""One command hands over to the others."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from psl_flower import cli


@pytest.mark.parametrize("command", ["run", "deploy", "plan", "audit", "experiments"])
def test_each_command_has_its_own_help_and_is_listed(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert f"\n  {command} " in capsys.readouterr().out


def test_words_and_exit_codes_are_passed_on(capsys):
    assert cli.main(["experiments", "list"]) == 0
    assert "severe" in capsys.readouterr().out
    assert cli.main(["plan", "--samplers", "usg"]) == 2
    assert "did you mean 'ugs'" in capsys.readouterr().err


def test_the_script_the_module_and_an_unknown_command():
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"] == {"psl-flower": "psl_flower.cli:main"}
    done = subprocess.run([sys.executable, "-m", "psl_flower", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'trian'" in done.stderr
