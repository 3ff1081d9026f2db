"""What this machine is, and which versions are installed on it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from psl_flower.threads import available_cores

_PACKAGES = ("psl-flower", "torch", "flwr", "ray", "numpy")


def machine() -> dict[str, Any]:
    """Return processor, cores, GPU, system, and the versions of Python and what matters most."""
    import torch

    return {
        "processor": _processor(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: found for name in _PACKAGES if (found := installed_version(name))},
    }


def installed_version(package: str) -> str:
    """Return the version of an installed package, empty if it is not there."""
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
