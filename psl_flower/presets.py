"""Presets that come with the package: TOML files, in the folder of the command that runs them.

Those of the experiments train and compare (`psl-flower experiments run NAME`); those of the audit train and attack
(`psl-flower audit NAME`). No two have one name.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

from psl_flower.checks import check_choice
from psl_flower.errors import ConfigError

# the package that holds a folder of presets: how one of them is run, and how they are listed
COMMANDS = {
    "audit": ("psl-flower audit", "psl-flower audit --list"),
    "experiments": ("psl-flower experiments run", "psl-flower experiments list"),
}


def preset_names(package: str) -> list[str]:
    """Return the names of a command's presets, in alphabetical order.

    Parameters
    ----------
    package : str
        A key of `COMMANDS`.
    """
    return sorted(each.name.removesuffix(".toml") for each in _folder(package).iterdir() if each.name.endswith(".toml"))


def preset_text(name: str, package: str, what: str = "a preset") -> str:
    """Return a preset as TOML; `what` an error calls the name.

    Raises
    ------
    ConfigError
        If that command has none of this name; it says which command has.
    """
    names = preset_names(package)
    if name not in names:
        for other, (run, _) in COMMANDS.items():
            if name in preset_names(other):
                raise ConfigError(f"{name!r} is a preset of another command: give {run} {name}")
    check_choice(name, f"{what} of {COMMANDS[package][0]}", names)
    return (_folder(package) / f"{name}.toml").read_text(encoding="utf-8")


def elsewhere(package: str) -> str:
    """Return a line that says where a command's presets are run, and where those of the other are listed."""
    (_, shown), *_ = (of for other, of in COMMANDS.items() if other != package)
    return f"Run one: {COMMANDS[package][0]} NAME. Other presets: {shown}"


def _folder(package: str) -> Traversable:
    return files("psl_flower") / package / "presets"
