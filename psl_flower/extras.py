"""What only some uses of the package need is installed as an extra of it; where one is missing, it is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from psl_flower.errors import ConfigError


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Say which extra to install, where a package that is imported within is not there.

    Parameters
    ----------
    name : str
        The extra, as ``pip install 'psl-flower[name]'`` takes it.
    what : str
        What needs it; the message begins with it.

    Raises
    ------
    ConfigError
        In place of the ModuleNotFoundError. One that comes from the package itself, or from a user's code, is no
        missing extra and stays as it is.
    """
    try:
        yield
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        if not package or find_spec(package) is not None:
            raise
        raise _missing(package, name, what) from exc


def check_extra(package: str, name: str, what: str) -> None:
    """Refuse what is about to be started where a package that other processes will import is not there.

    Raises
    ------
    ConfigError
        It names the extra `name` that has the package.
    """
    if find_spec(package) is None:
        raise _missing(package, name, what)


def _missing(package: str, name: str, what: str) -> ConfigError:
    remedy = f"pip install 'psl-flower[{name}]', or '.[{name}]' in a clone of its repository"
    return ConfigError(f"{what} needs {package}, which is not installed: {remedy}")
