"""What pyproject.toml declares, tried: ``make matrix``, or ``nox -s "flower(1.28.0)"`` for one of them.

Each session installs releases of its own, gigabytes of them: an interpreter that is not there is skipped, and says so.
Words after ``--`` go to pytest instead of the tests that a session takes by itself.
"""

import os
import re
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

# uv reads none of pip's settings: what ``make`` installs from a folder is to be found here, too.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"].replace(" ", ","))

# nox gives each session a folder for temporary files, with a name too long for the sockets of Ray.
TMPDIR = {"TMPDIR": tempfile.gettempdir()}

# The oldest Flower fits others of its time only.
FLOWERS = {
    "1.28.0": ["flwr[simulation]==1.28.0", "flwr-datasets==0.5.0", "datasets==3.1.0"],
    "1.42.0": ["flwr[simulation]==1.42.0"],
}


def install(session: nox.Session, *pins: str) -> None:
    """Install the package with all extras, in the releases of constraints.txt but for what is pinned here."""
    others = {re.split(r"[\[=]", pin)[0] for pin in pins} | ({"ray"} if "flwr" in str(pins) else set())
    lines = Path("constraints.txt").read_text().splitlines()
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(line for line in lines if line.split("==")[0] not in others))
    session.install("-c", str(constraints), "-e", ".[all,test]", *pins)


def test(session: nox.Session, *words: str) -> None:
    """Run the tests that start no Flower processes."""
    words = tuple(session.posargs) or ("-n", "auto", *words)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", **TMPDIR}
    session.run("pytest", "-q", "-p", "no:cacheprovider", "-m", "not flower and not slow", *words, env=environment)


@nox.session(python=["3.11", "3.12", "3.13"])
def python(session: nox.Session) -> None:
    """Try every Python, with the releases of constraints.txt."""
    install(session)
    test(session)


@nox.session(python="3.11")
@nox.parametrize("flwr", list(FLOWERS), ids=list(FLOWERS))
def flower(session: nox.Session, flwr: str) -> None:
    """Try the oldest and the newest Flower: tests, a simulation and a deployment."""
    install(session, *FLOWERS[flwr])
    test(session)
    session.run("python", "tests/plain_flower.py", "simulation", env=TMPDIR)
    session.run("python", "tests/plain_flower.py", "deployment", env=TMPDIR)


@nox.session(python="3.11", name="newest-torch")
def newest_torch(session: nox.Session) -> None:
    """Try the newest torch."""
    install(session, "torch==2.15.0", "torchvision==0.29.2")
    test(session)


@nox.session(python="3.11", venv_backend="uv")
def oldest(session: nox.Session) -> None:
    """Try the oldest release of everything, torch and Flower among them, but for two extras that need a newer torch."""
    extras = "samplers,simulation,vision,experiments,tensorboard,wandb,test"
    session.install("--resolution", "lowest-direct", "-e", f".[{extras}]")
    test(session)
