"""``psl-flower``: one command for what the package's parts do each; ``python -m psl_flower`` is the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from psl_flower.colours import plain_log
from psl_flower.errors import ConfigError

# name: the typer app behind it, as module:object, and what it does
_COMMANDS = {
    "run": ("psl_flower.app.command:run", "Train a Flower app in a simulation of its own, stopped at the end."),
    "deploy": ("psl_flower.app.command:deploy", "The same with a SuperLink and SuperNodes on this machine."),
    "plan": ("psl_flower.plan.command:app", "Compare samplers on your clients before running anything."),
    "audit": ("psl_flower.audit.command:app", "Attack what the server receives, and report what leaks."),
    "experiments": ("psl_flower.experiments.command:app", "Run sweeps, and report what came out."),
    "export": ("psl_flower.export:app", "Write the parts of a trained model as programs for a device and a server."),
    "info": ("psl_flower.info:app", "Say what is installed here, and on which machine: for reports of bugs."),
}


# Options under the names they had in 0.1, for one release more; help does not show them.
_FORMER = {"out": "output", "into": "output"}


class _Commands(TyperGroup):
    """The commands, each imported when it is given: what one needs takes seconds, and help shall not."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands = {name: click.Command(name, help=what) for name, (_, what) in _COMMANDS.items()}
        self.suggest_commands = not hasattr(click.exceptions, "NoSuchCommand")  # with it, click suggests by itself

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _COMMANDS:
            module, _, attribute = _COMMANDS[name][0].partition(":")
            command = typer.main.get_command(getattr(import_module(module), attribute))
            plain_log()  # which the command has imported, if it has one
        return name, command, rest


_app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: _FORMER.get(name, name),
    },
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version("psl-flower"))
        raise typer.Exit


@_app.callback(epilog="Each command has examples: psl-flower COMMAND --help")
def _about(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Parallel split learning for Flower."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    That is 0; 1 where something failed; 2 where an argument is refused; 128 and the number of the signal that ended it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        typer.main.get_command(_app).main(words, prog_name="psl-flower", obj=words)  # it never returns
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ConfigError as error:
        print(f"psl-flower: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
