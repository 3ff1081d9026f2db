"""What is made from the definitions of the keys: pyproject.toml's block with the defaults, and docs/settings.md."""

from __future__ import annotations

import json
import re
import sys
from itertools import groupby
from pathlib import Path

from psl_flower.config.key import Key, keys_of
from psl_flower.config.run_config import RunConfig

COMMAND = "python -m psl_flower.config"
_TABLE = "[tool.flwr.app.config]"
_BLOCK = re.compile(rf"(?<=^{re.escape(_TABLE)}\n).*?(?=^\[|\Z)", re.DOTALL | re.MULTILINE)
_HEAD = f"""\
# Settings of the default app

Each can be given for one run, separated by spaces, strings in quotes of their own:

```sh
psl-flower run . -c "sampler='fls' partition='severe' num-server-rounds=3"
```

An unknown key, and a value that breaks a rule, end the command before anything starts. `flwr run . -c ...` takes the
same keys; there the refusal is the last thing that is printed. The defaults are in `pyproject.toml`. An empty string,
and 0 for a number that must be positive, mean "choose automatically".

This page is made by `{COMMAND}` from `psl_flower/config/run_config.py`, where each key is defined.
"""


def toml_block() -> str:
    """Return the lines of ``[tool.flwr.app.config]``."""
    lines = []
    for section, keys in _sections():
        assignments = [f"{key.name} = {json.dumps(key.default)}" for key in keys]  # JSON's scalars are TOML's
        width = max(map(len, assignments))
        lines += [f"# {section}"]
        lines += [f"{left:{width}} # {_comment(key)}" for left, key in zip(assignments, keys, strict=True)]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Return docs/settings.md."""
    parts = [_HEAD]
    for section, keys in _sections():
        title, _, note = section.partition("; ")
        rows = [f"| `{key.name}` | `{json.dumps(key.default)}` | {key.rule} | {key.sentence} |" for key in keys]
        note = f"{note[0].upper()}{note[1:]}.\n\n" if note else ""
        parts.append(
            f"## {title}\n\n{note}| key | default | values | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


def with_block(pyproject: str) -> str:
    """Return the text of a pyproject.toml with the block in its place."""
    return _BLOCK.sub(lambda _: toml_block(), pyproject, count=1)


def main() -> int:
    """Write both into the folder that psl_flower is developed in; return the exit code."""
    root = Path(__file__).parents[2]
    pyproject, page = root / "pyproject.toml", root / "docs" / "settings.md"
    if not pyproject.is_file() or _TABLE not in pyproject.read_text(encoding="utf-8"):
        print(f"{COMMAND} is for a checkout of psl_flower, {root} is none: run it there", file=sys.stderr)
        return 2
    for path, text in {pyproject: with_block(pyproject.read_text(encoding="utf-8")), page: settings_page()}.items():
        changed = not path.is_file() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {'written anew' if changed else 'as it was'}")
    return 0


def _sections() -> list[tuple[str, list[Key]]]:
    """Return the keys by section, in order."""
    section, pairs = "", []
    for key in keys_of(RunConfig):
        section = key.section or section
        pairs.append((section, key))
    return [(name, [key for _, key in group]) for name, group in groupby(pairs, key=lambda pair: pair[0])]


def _comment(key: Key) -> str:
    return f"{key.sentence} ({key.rule})" if key.rule else key.sentence
