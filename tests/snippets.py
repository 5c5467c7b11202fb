"""The documents' Python snippets, run as a reader would paste them, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def snippets(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


def run(document: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a document's snippets in the current directory; lines in errors are the document's."""
    text = document.read_text()
    names = {"__name__": "__main__", **(names or {})}
    for snippet in snippets(document):
        before = text[: text.index(snippet)].count("\n")
        exec(compile("\n" * before + snippet, str(document), "exec"), names)
    return names
