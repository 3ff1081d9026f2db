"""``psl-flower info``: what is installed here, what is missing, and where Flower and Ray are looked for."""

from __future__ import annotations

import json
import os
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement

from psl_flower.machine import installed_version, machine

# What changes how Flower, Ray and torch behave; nothing secret is in them.
_VARIABLES = (
    *("FLWR_HOME", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "RAY_ADDRESS", "TMPDIR"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"),
)
_COLLECTIONS = ("all", "test", "dev")

app = typer.Typer(add_completion=False)


@app.command(
    epilog="""Examples:

  psl-flower info

  psl-flower info --json"""
)
def _info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False) -> None:
    """Say what is installed here, what is missing, and where Flower and Ray are looked for: for reports of bugs."""
    found = information()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [(name, str(found[name])) for name in ("processor", "cores", "gpu", "system", "python")]
    rows += found["versions"].items()
    for name, lacking in found["extras"].items():
        rows.append((f"extra {name}", f"missing: {', '.join(lacking)}" if lacking else "installed"))
    rows += [(f"SuperLink {name}", address) for name, address in found["superlinks"].items()]
    rows += found["environment"].items()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value or '-'}")


def information() -> dict[str, Any]:
    """Return the machine, versions, what each extra lacks, the SuperLinks Flower knows, and environment variables."""
    return {
        **machine(),
        "extras": missing_packages(),
        "superlinks": superlinks(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def missing_packages() -> dict[str, list[str]]:
    """Return which packages of each extra are not installed; empty where psl-flower itself is not, but a copy of it."""
    try:
        extras = metadata("psl-flower").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return {}
    needs = [Requirement(text) for text in requires("psl-flower") or []]
    missing: dict[str, list[str]] = {extra: [] for extra in extras if extra not in _COLLECTIONS}
    for extra, lacking in missing.items():
        for need in needs:
            # what is needed with the extra only
            if need.marker and need.marker.evaluate({"extra": extra}) and not need.marker.evaluate({"extra": ""}):
                names = ["ray"] if "simulation" in need.extras else [need.name]  # flwr itself is always there
                lacking += [name for name in names if name != "psl-flower" and not installed_version(name)]
    return missing


def superlinks() -> dict[str, str]:
    """Return the addresses in the ``config.toml`` of Flower's home, by name; nothing else of it."""
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
    try:
        table = tomllib.loads((home / "config.toml").read_text(encoding="utf-8")).get("superlink", {})
    except (OSError, ValueError):
        return {}
    return {name: str(each.get("address", "local")) for name, each in table.items() if isinstance(each, dict)}
