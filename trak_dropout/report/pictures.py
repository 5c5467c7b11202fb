"""Pictures as text that an HTML page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray


def image_uri(image: NDArray[np.floating]) -> str:
    """Return a gray image as a ``data:`` address.

    Args:
        image: gray values, ``(height, width)``; the lowest is shown black, the highest white.

    Returns:
        The address of a PNG.
    """
    buffer = io.BytesIO()
    imsave(buffer, image, cmap="gray", format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves_svg(curves: Mapping[str, NDArray[np.floating]], upto: float = 30) -> str:
    """Draw recall against the share inspected.

    Args:
        curves: recall after 1, 2, ... samples, by method.
        upto: where the horizontal axis ends, in percent.

    Returns:
        An ``<svg>`` element whose text takes the page's color.
    """
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(100 * np.arange(1, len(curve) + 1) / len(curve), 100 * curve, label=name)
    axes.axline((0, 0), slope=1, color="gray", linewidth=0.8, linestyle=":", label="by chance")
    axes.set(
        xlabel="training images inspected, most suspect first (%)",
        ylabel="flipped labels found (%)",
        xlim=(0, upto),
        ylim=(0, 102),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # Matplotlib draws axes and text in black: let them follow the page, so that dark mode works.
    return text[text.index("<svg") :].replace("#000000", "currentColor")
