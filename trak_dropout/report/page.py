"""The page: what it shows, and its rendering from a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
from numpy.typing import NDArray

from trak_dropout.report.pictures import curves_svg, image_uri


@dataclass(frozen=True)
class Example:
    """A sample with its picture.

    Args:
        image: gray values, ``(height, width)``, any range.
        name: what to call it.
        label: the label it was given.
        true_label: the right label, where known.
        value: its score, where it has one.
    """

    image: NDArray[np.floating]
    name: str
    label: str
    true_label: str | None = None
    value: float | None = None

    @property
    def wrong(self) -> bool:
        """Whether the given label is known to be wrong."""
        return self.true_label is not None and self.true_label != self.label

    @property
    def uri(self) -> str:
        """The picture as a ``data:`` address."""
        return image_uri(self.image)

    @property
    def description(self) -> str:
        """The sample in words, for who does not see the picture."""
        right = f", in truth {self.true_label}" if self.wrong else ""
        return f"{self.name}, labeled {self.label}{right}"


@dataclass(frozen=True)
class Target:
    """A target with the training samples that help and harm it most."""

    example: Example
    helpful: Sequence[Example]
    harmful: Sequence[Example]


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    Args:
        title: its heading.
        summary: a paragraph below the heading.
        table_head: column names.
        table: rows of formatted cells.
        table_note: what the columns mean.
        curves: recall after 1, 2, ... samples inspected, by method.
        flagged: the most suspect training samples, most suspect first.
        targets: explained predictions.
    """

    title: str
    summary: str
    table_head: Sequence[str]
    table: Sequence[Sequence[str]]
    table_note: str
    curves: Mapping[str, NDArray[np.floating]]
    flagged: Sequence[Example]
    targets: Sequence[Target]


def render(report: Report) -> str:
    """Render the page as HTML that fetches nothing from outside.

    Args:
        report: what to show; every text is escaped.

    Returns:
        The HTML document.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trak_dropout.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(
        report=report, curves=curves_svg(report.curves)
    )
