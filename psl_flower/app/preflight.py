"""What can be said of a run before anything of it is started: settings that are refused, folders that are too long."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from psl_flower.checks import check_choice, check_int
from psl_flower.errors import ConfigError
from psl_flower.extras import check_extra
from psl_flower.flower import FIRST_WITH_ONE_ADDRESS, has_one_address
from psl_flower.temporary_folder import check_temporary_folder

_SERVER_APP = "psl_flower.app.server_app:app"
_ASSIGNMENT = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # as Flower's parse_config_args takes apart what -c says


def check_run(app: str | Path, run_config: Sequence[str], num_supernodes: int, *, simulation: bool) -> dict[str, Any]:
    """Refuse what Flower, Ray or the app would refuse half a minute later; return the app's configuration.

    Parameters
    ----------
    app : path
        Folder with the app's pyproject.toml. Of other apps than the default one, only the keys are known.
    run_config : sequence of str
        What ``-c`` says.
    num_supernodes : int
        How many clients there will be.
    simulation : bool
        Whether Ray will run them.

    Returns
    -------
    dict
        The keys of the app, dotted where they are nested, with the overrides.

    Raises
    ------
    ConfigError
        If Flower is too old, the app is not there, a key is unknown, a value is refused, the model cannot be cut where
        it shall be, there are too few clients, or too many for the data, the data are not there, what the settings
        need is not installed, there is no checkpoint to resume from, or TMPDIR is too long.
    """
    check_int(num_supernodes, "--num-supernodes", least=1)
    if not has_one_address():
        raise ConfigError(
            f"psl-flower run and deploy need flwr {FIRST_WITH_ONE_ADDRESS} or newer, got {version('flwr')}: upgrade "
            "it, or start the app with flwr run"
        )
    if simulation:
        check_extra("ray", "simulation", "a simulation")
        check_temporary_folder()
    flower = _flower_table(Path(app))
    keys = _flat(flower.get("config", {}))
    overrides = read_overrides(run_config)
    for name in overrides:
        check_choice(name, "a configuration key", keys)
    if flower.get("components", {}).get("serverapp") != _SERVER_APP:
        return keys | overrides
    from psl_flower import checkpoint
    from psl_flower.app.datasets import check_dataset
    from psl_flower.app.server_app import make_strategy  # torch: only where its models are used
    from psl_flower.app.task import check_split
    from psl_flower.config import RunConfig

    config = RunConfig.read(keys | overrides)
    if config.min_available_nodes > num_supernodes:
        raise ConfigError(
            f"min-available-nodes must be at most the number of clients, {num_supernodes}, got "
            f"{config.min_available_nodes}: lower it, or raise --num-supernodes"
        )
    check_dataset(config.dataset, config.data_path)
    if not config.data_path:  # what is in a folder may be a part of it
        check_split(config, num_supernodes)
    make_strategy(config)
    if config.resume_from not in ("", "latest"):
        checkpoint.read(Path(config.resume_from))
    return keys | overrides


def read_overrides(run_config: Sequence[str]) -> dict[str, Any]:
    """Return the keys and values that ``-c`` gives, as Flower reads them; refuse what it would pass over in silence."""
    if len(run_config) == 1 and run_config[0].endswith(".toml"):
        return _flat(_read_toml(Path(run_config[0]).expanduser()))
    values: dict[str, Any] = {}
    for text in run_config:
        rest = _ASSIGNMENT.sub("", text).strip()
        if rest:
            raise ConfigError(f"-c takes key=value, separated by spaces, without any around '=', got {rest!r}")
        for name, value in _ASSIGNMENT.findall(text):
            try:
                values |= _flat(tomllib.loads(f"{name} = {value}"))
            except tomllib.TOMLDecodeError:
                raise ConfigError(
                    f"-c takes numbers, true, false and strings in quotes, got {name}={value}: write "
                    f"{name}={_as_toml(value)}"
                ) from None
    return values


def _as_toml(text: str) -> str:
    """Return what somebody who writes `text` for a value is likely to mean."""
    number = text.replace(",", ".")
    number = f"0{number}" if number.startswith(".") else f"{number}0" if number.endswith(".") else number
    for guess in (text.lower(), number):  # True, 0,1
        try:
            tomllib.loads(f"guess = {guess}")
        except tomllib.TOMLDecodeError:
            continue
        return guess
    return f"'{text}'"


def _flower_table(app: Path) -> dict[str, Any]:
    """Return ``[tool.flwr.app]`` of an app."""
    path = app.absolute() / "pyproject.toml"
    table: dict[str, Any] = _read_toml(path).get("tool", {}).get("flwr", {}).get("app", {}) if path.exists() else {}
    if not table:
        raise ConfigError(f"there is no Flower app here: {path} must have [tool.flwr.app]. Name the folder of one")
    return table


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a TOML file that can be read: {error}") from None


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
