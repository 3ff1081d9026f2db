"""One command hands over to the others."""

import json
import logging
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import click
import pytest
import typer

from psl_flower import __version__, cli, info
from psl_flower.app.local import LocalSuperLink

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


@pytest.mark.parametrize(
    ("terminal", "no_color", "shown"),
    [(False, "", "INFO : one\n"), (True, "", "\033[92mINFO\033[0m : one\n"), (True, "1", "INFO : one\n")],
)
def test_flowers_colours_are_kept_for_terminals(terminal, no_color, shown, capsys, monkeypatch, tmp_path):
    flwr = tmp_path / "flwr"
    flwr.write_text(
        """#!/bin/sh
if [ $1 = run ]; then printf '\\033[92mINFO\\033[0m : one\nSuccessfully started run 7\n'
else echo '{"runs": [{"status": "finished:completed"}]}'; fi
"""
    )
    flwr.chmod(0o700)
    superlink = LocalSuperLink(tmp_path)
    superlink.environment["PATH"] = os.pathsep.join([str(tmp_path), os.defpath])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    superlink.run(tmp_path)
    assert capsys.readouterr().out == f"{shown}Successfully started run 7\n"


def test_what_a_command_itself_logs_has_no_colours_in_a_file(capsys, monkeypatch):
    handler = logging.StreamHandler()
    handler.colored = True  # as Flower's is
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [handler])
    assert cli.main(["plan", "--help"]) == 0
    assert handler.colored is False


@pytest.mark.parametrize(
    ("path", "name", "begun", "found"),
    [
        ("experiments run", "sweep", "str", ["stragglers"]),
        ("audit", "preset", "priv", ["privacy-cifar10", "privacy-digits", "privacy-fashion-mnist"]),
        ("audit", "attacks", "tail", ["tail-labels", "tail-counts"]),
    ],
)
def test_presets_and_attacks_are_completed(path, name, begun, found):
    first, *rest = path.split()
    module, _, attribute = cli._COMMANDS[first][0].partition(":")
    command = typer.main.get_command(getattr(import_module(module), attribute))
    for each in rest:
        command = command.commands[each]
    (parameter,) = (each for each in command.params if each.name == name)
    assert [item.value for item in parameter.shell_complete(click.Context(command), begun)] == found


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
