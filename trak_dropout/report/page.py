"""The page: what it shows, and its rendering from templates."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """A table above the gallery, such as a comparison of methods.

    Args:
        title: its heading.
        head: column names.
        rows: cells as text; the first row is set in bold.
        note: what the columns mean.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing with what it says in words.

    Args:
        svg: an ``<svg>`` element, put into the page as it is.
        title: its heading.
        text: what is seen in it.
    """

    svg: str
    title: str
    text: str


@dataclass(frozen=True)
class Page:
    """Everything that the page shows; every text is escaped.

    Args:
        title: the heading.
        summary: a paragraph below it.
        facts: short figures at the top, by name.
        warnings: what is wrong with the store.
        content: the samples and influences, as JSON values; ``page.js`` says what it reads.
        labeled: whether samples have labels, so that one may be wrong.
        tile: width of a thumbnail in a card, in pixels.
        sheets: thumbnails, as ``data:`` addresses.
        pixelated: whether thumbnails are shown pixel by pixel.
        table: a comparison of methods.
        quality: plots of how well wrong labels are found and scores are spread.
        across: plots over checkpoints.
        health: plots of the store.
        checkpoints: cells of the table of checkpoints.
        settings: how gradients were compressed, by name.
    """

    title: str
    summary: str
    facts: Mapping[str, str]
    warnings: Sequence[str]
    content: Mapping[str, Any]
    labeled: bool = True
    tile: int = 1
    sheets: Sequence[str] = ()
    pixelated: bool = False
    table: Table | None = None
    quality: Sequence[Plot] = ()
    across: Sequence[Plot] = ()
    health: Sequence[Plot] = ()
    checkpoints: Sequence[Mapping[str, str]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


def render(page: Page) -> str:
    """Render the page as one HTML document.

    A content security policy in it allows no request at all, and no script but its own: what
    samples contain is data to the page, and even a mistake in escaping would not run it.

    Args:
        page: what to show.

    Returns:
        The document.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trak_dropout.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "page.js")[0]
    style = environment.loader.get_source(environment, "page.css")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        page=page, script=Markup(script), style=Markup(style), script_hash=digest
    )
