"""What a sweep was run with: command, machine, versions."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from psl_flower.threads import available_cores

_PACKAGES = ("psl-flower", "torch", "flwr", "ray", "numpy")


def provenance(arguments: Sequence[str], workers: int, module: str = "psl_flower.experiments") -> dict[str, Any]:
    """Return the command, a module's, with its arguments, and what it runs on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "workers": workers,
        "processor": _processor(),
        "cores": available_cores(),
        "gpu": device,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
