"""``psl-flower``: one command for what the package's parts do each; ``python -m psl_flower`` is the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

_COMMANDS = {
    "run": ("psl_flower.app.local", "train a Flower app in a simulation of its own, stopped at the end"),
    "deploy": ("psl_flower.app.deployment", "the same with a SuperLink and SuperNodes on this machine"),
    "plan": ("psl_flower.plan.command", "compare samplers on your clients before running anything"),
    "audit": ("psl_flower.audit.command", "attack what the server receives, and report what leaks"),
    "experiments": ("psl_flower.experiments.command", "run sweeps, and report what came out"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand the command line over to the part that it names; return its exit code."""
    width = max(map(len, _COMMANDS))
    parser = argparse.ArgumentParser(
        prog="psl-flower",
        description="Parallel split learning for Flower.",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="one of those below; COMMAND --help")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="what the command takes")
    options = parser.parse_args(arguments)
    module, _ = _COMMANDS[options.command]
    status: int = import_module(module).main(options.words)
    return status


if __name__ == "__main__":
    sys.exit(main())
