"""What an audit leaves in a folder: one JSON file, a table, pictures."""

from __future__ import annotations

import json
from pathlib import Path

from psl_flower.audit.pictures import draw
from psl_flower.audit.result import AuditResult

JSON_FILE, TABLE_FILE = "audit.json", "audit.md"


def save_report(result: AuditResult, folder: str | Path) -> list[Path]:
    """Write ``audit.json``, ``audit.md`` and the pictures into a folder, which is made; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {**result.settings, "cases": [case.to_dict() for case in result.cases]}
    (folder / JSON_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    pictures = draw(result, folder)
    shown = "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    (folder / TABLE_FILE).write_text(result.markdown() + shown, encoding="utf-8")
    return [folder / JSON_FILE, folder / TABLE_FILE, *pictures]
