"""``psl-flower run`` and ``psl-flower deploy``: a Flower app on a SuperLink of its own, stopped at the end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from psl_flower.app.deployment import LocalDeployment
from psl_flower.app.local import LocalSuperLink, run_app

_App = Annotated[Path, typer.Argument(metavar="APP")]
_Config = Annotated[list[str] | None, typer.Option("--run-config", "-c", help="Overrides, as flwr run takes them.")]
_Dashboard = Annotated[
    bool, typer.Option("--dashboard", help="Show it in TensorBoard while it runs, on this machine only.")
]
_Home = Annotated[Path | None, typer.Option(help="FLWR_HOME to use; a temporary one unless given.")]

run = typer.Typer(add_completion=False)
deploy = typer.Typer(add_completion=False)


@run.command(
    epilog="""Examples:

  psl-flower run

  psl-flower run --num-supernodes 64 -c "sampler='fpls' partition='severe' num-server-rounds=3"

  psl-flower run --dashboard -c "num-server-rounds=50"

  psl-flower run examples/quickstart --num-supernodes 10"""
)
def _run(
    app: _App = Path(),
    num_supernodes: Annotated[int, typer.Option(metavar="K", help="Virtual clients.")] = 16,
    run_config: _Config = None,
    dashboard: _Dashboard = False,
    home: _Home = None,
) -> None:
    """Train a Flower app in Flower's simulation, on a SuperLink of its own that is stopped at the end.

    APP is the folder with the app's pyproject.toml: the current one, unless it is given.
    """
    words = (app, LocalSuperLink, num_supernodes, run_config or (), home)
    raise typer.Exit(run_app(*words, simulation=True, with_dashboard=dashboard))


@deploy.command(
    epilog="""Examples:

  psl-flower deploy --num-supernodes 2 --tls -c "num-server-rounds=2"

  psl-flower deploy examples/deployment"""
)
def _deploy(
    app: _App = Path(),
    num_supernodes: Annotated[int, typer.Option(metavar="K", help="SuperNodes, a process each.")] = 2,
    run_config: _Config = None,
    dashboard: _Dashboard = False,
    home: _Home = None,
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt Flower's own connections, too.")] = False,
) -> None:
    """Train a Flower app on a SuperLink and SuperNodes on this machine, all stopped at the end.

    APP is the folder with the app's pyproject.toml: the current one, unless it is given.
    """
    superlink = partial(LocalDeployment, num_supernodes=num_supernodes, tls=tls)
    words = (app, superlink, num_supernodes, run_config or (), home)
    raise typer.Exit(run_app(*words, simulation=False, with_dashboard=dashboard))
