"""Tables for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any


def describe_html(
    title: str,
    facts: Mapping[str, Any],
    head: Sequence[str] = (),
    rows: Iterable[Sequence[Any]] = (),
) -> str:
    """Return what a notebook shows of an object: its facts, and a table below them.

    Args:
        title: the object's class.
        facts: values by name.
        head: names of the table's columns; no table where there are none.
        rows: its rows.

    Returns:
        HTML in which every text is escaped.
    """
    listed = ", ".join(f"{escape(name)} {escape(str(value))}" for name, value in facts.items())
    parts = [f"<div><p><b>{escape(title)}</b> {listed}</p>"]
    if head:
        parts.append(f"<table><thead>{_row(head, 'th')}</thead><tbody>")
        parts += [_row(row, "td") for row in rows]
        parts.append("</tbody></table>")
    return "".join([*parts, "</div>"])


def _row(cells: Sequence[Any], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def as_bytes(count: float) -> str:
    """Return a number of bytes in words, such as ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
