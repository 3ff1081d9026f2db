"""One command hands over to the others."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from psl_flower import __version__, cli, info

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_each_command_is_listed_and_has_help_with_examples(command, capsys):
    assert cli.main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"Usage: psl-flower {command}" in told
    assert f"psl-flower {command}" in told.split("Examples:")[1]
    assert cli.main(["--help"]) == 0
    assert f" {command} " in capsys.readouterr().out


def test_words_and_exit_codes_are_passed_on(capsys):
    assert cli.main(["experiments", "list"]) == 0
    assert "severe" in capsys.readouterr().out
    assert cli.main(["plan", "usg"]) == 2
    assert "did you mean 'ugs'" in capsys.readouterr().err
    assert cli.main(["rum"]) == 2
    said = capsys.readouterr().err
    assert "No such command 'rum'" in said
    assert said.count("Did you mean") < 2  # once, or with old releases of typer and click never
    assert cli.main(["plan", "--batch-sise", "3"]) == 2
    assert "No such option" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "former"), [(["experiments", "run"], "--out"), (["export"], "--into=nowhere")])
def test_what_is_written_goes_to_output_which_had_other_names(command, former, tmp_path, capsys):
    """What they are given is not there; were they unknown, that would be said."""
    assert cli.main([*command, "--help"]) == 0
    told = capsys.readouterr().out
    assert "--output" in told
    assert former.partition("=")[0] + " " not in told
    words = [former] if "=" in former else [former, str(tmp_path / "out")]
    assert cli.main([*command, str(tmp_path / "none.toml"), *words]) == 2
    assert "No such option" not in capsys.readouterr().err


def test_the_script_the_module_and_an_unknown_command():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"] == {"psl-flower": "psl_flower.cli:main"}
    done = subprocess.run([sys.executable, "-m", "psl_flower", "deplyo"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such command 'deplyo'" in done.stderr
    assert "Did you mean 'deploy'?" in done.stderr


def test_help_and_completion_load_none_of_the_parts():
    """Those take seconds, each."""
    program = (
        "import sys; from psl_flower import cli; code = cli.main(['--help']);"
        "print(code, [m for m in ('torch', 'flwr', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"
    words = {"_PSL_FLOWER_COMPLETE": "complete_bash", "COMP_WORDS": "psl-flower exp", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "psl_flower"], env=os.environ | words, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["experiments", "export"]


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


# --- info ------------------------------------------------------------------------------------------------------------
def test_info_says_what_is_here_as_lines_and_as_json(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.toml").write_text('[superlink.lab]\naddress = "127.0.0.1:9093"\npassword = "do not show"\n')
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"].keys() >= {"torch", "flwr", "numpy"}
    assert told["superlinks"] == {"lab": "127.0.0.1:9093"}
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "do not show" not in text
    for name, version in told["versions"].items():
        assert any(line.split() == [name, version] for line in text.splitlines())


def test_info_names_the_packages_that_an_extra_lacks(monkeypatch):
    needs = [
        "flwr",
        "matplotlib; extra == 'plots'",
        "no-such-thing>=2; extra == 'plots'",
        "flwr[simulation]; extra == 's'",
    ]
    monkeypatch.setattr(info, "requires", lambda name: needs)
    monkeypatch.setattr(info, "metadata", lambda name: _Metadata())
    assert info.missing_packages() == {"plots": ["no-such-thing"], "s": []}


class _Metadata:
    def get_all(self, name):
        return ["plots", "s", "dev"] if name == "Provides-Extra" else None
