"""What pyproject.toml declares, tried: ``make matrix``, or ``nox -s "flower(1.28.0)"`` for one of them.

Each session installs releases of its own, gigabytes of them. An interpreter that is not there is skipped, and says so.
"""

import nox

nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

# Releases that are not the newest fit others of their time only.
OF_THEIR_TIME = {
    "1.28.0": ["flwr-datasets==0.5.0", "safetensors==0.4.5", "rich<14"],
    "1.42.0": [],
}
WITHOUT_FLOWER = ["-m", "not flower and not slow", "-q", "-p", "no:cacheprovider"]


def install(session: nox.Session, *pins: str, constrained: bool = False) -> None:
    """Install the package for its tests, with what is pinned here."""
    extra = ["-c", "constraints.txt"] if constrained else []
    session.install(*extra, "-e", ".[dev]", *pins)


def test(session: nox.Session, *words: str) -> None:
    """Run the tests that start no Flower processes; words after ``--`` go to pytest instead of `words`."""
    session.run("pytest", *WITHOUT_FLOWER, *(session.posargs or words), env={"OMP_NUM_THREADS": "1"})


@nox.session(python=["3.11", "3.12", "3.13"])
def python(session: nox.Session) -> None:
    """Try every Python, with the releases of constraints.txt."""
    install(session, constrained=True)
    test(session)


@nox.session(python="3.11")
@nox.parametrize("flwr", list(OF_THEIR_TIME), ids=list(OF_THEIR_TIME))
def flower(session: nox.Session, flwr: str) -> None:
    """Try the oldest and the newest Flower: tests, and a simulation by ``flwr run``."""
    install(session, f"flwr[simulation]=={flwr}", *OF_THEIR_TIME[flwr])
    test(session)
    session.run("python", "tests/plain_flower.py")


@nox.session(python="3.11", name="torch")
def newest_torch(session: nox.Session) -> None:
    """Try the newest torch."""
    install(session, "torch", "torchvision")
    test(session)


@nox.session(python="3.11", name="oldest-torch")
def oldest_torch(session: nox.Session) -> None:
    """Try the oldest torch, with all but transformers, which need a newer one."""
    extras = "samplers,simulation,vision,experiments,tensorboard,wandb"
    tools = ["pytest", "pytest-timeout", "hypothesis", "torchmetrics", "pyyaml", "nbclient", "ipykernel"]
    session.install("-e", f".[{extras}]", "torch==2.4.1", "torchvision==0.19.1", "numpy<2.3", *tools)
    test(session, "tests/unit", "--ignore", "tests/unit/test_cut_exported.py")
