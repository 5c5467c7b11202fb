"""Plots as SVG that takes the page's colors."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Told apart on white and on black, also by who does not see red and green apart.
COLORS = ("#3b82d6", "#d97a1f", "#1f9d84", "#b05bd0", "#b58900", "#888888")


def recall_curves(curves: Mapping[str, NDArray[np.floating]], upto: float = 30) -> str:
    """Draw the share of wrong labels found against the share inspected.

    Args:
        curves: recall after 1, 2, ... samples, by method.
        upto: where the horizontal axis ends, in percent.

    Returns:
        An ``<svg>`` element.
    """
    figure, axes = _figure()
    for (name, curve), color in zip(curves.items(), _colors(len(curves)), strict=True):
        share = 100 * np.arange(len(curve) + 1) / len(curve)
        axes.plot(share, 100 * np.concatenate([[0.0], curve]), label=_plain(name), color=color)
    axes.axline((0, 0), slope=1, color="gray", linewidth=0.8, linestyle=":", label="by chance")
    axes.set(
        xlabel="training samples inspected, most suspect first (%)",
        ylabel="wrong labels found (%)",
        xlim=(0, upto),
        ylim=(0, 102),
    )
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure, "recall")


def distribution(values: NDArray[np.floating], wrong: NDArray[np.bool_] | None) -> str:
    """Draw how self-influence is spread over the training set.

    Args:
        values: ``(n,)``.
        wrong: samples known to have a wrong label, ``(n,)``, drawn apart; None where not known.

    Returns:
        An ``<svg>`` element.
    """
    figure, axes = _figure()
    logarithmic = bool((values > 0).all()) and values.max() > 20 * np.median(values)
    low, high = float(values.min()), float(values.max())
    edges = (
        np.geomspace(low, high, 51)
        if logarithmic and high > low
        else np.linspace(low, max(high, low + 1e-12 + abs(low) * 1e-6), 51)
    )
    if wrong is None:
        axes.hist(values, edges.tolist(), color=COLORS[0], label="training samples")
    else:
        # One before the other: stacked, heights on a logarithmic axis would mislead.
        for part, name, color in (
            (values[~wrong], "right label", COLORS[0]),
            (values[wrong], "label known to be wrong", COLORS[1]),
        ):
            axes.hist(part, edges.tolist(), color=color, alpha=0.75, label=name)
        axes.legend(frameon=False)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=10)
    axes.set(xlabel="self-influence", ylabel="training samples")
    return _svg(figure, "distribution")


def spectra(
    eigenvalues: Mapping[str, NDArray[np.floating]], ridges: Sequence[float], n: int
) -> str:
    """Draw the eigenvalues of each checkpoint's Gram matrix, and where damping sets in.

    Args:
        eigenvalues: descending, by checkpoint.
        ridges: what is added to each of them, in the same order.
        n: number of training samples.

    Returns:
        An ``<svg>`` element.
    """
    figure, axes = _figure()
    colors = _colors(len(eigenvalues))
    for (name, values), ridge, color in zip(eigenvalues.items(), ridges, colors, strict=True):
        positive = np.maximum(values, values.max() * 1e-12) / n
        axes.plot(np.arange(1, len(values) + 1), positive, label=_plain(name), color=color)
        axes.axhline(ridge / n, color=color, linewidth=0.9, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="direction", ylabel="mean square along it")
    axes.plot([], [], color="gray", linewidth=0.9, linestyle="--", label="damping")
    if len(eigenvalues) <= 8:
        axes.legend(frameon=False, loc="lower left")
    return _svg(figure, "spectra")


def across(
    names: Sequence[str], values: NDArray[np.floating], top: Sequence[int], top_names: Sequence[str]
) -> str:
    """Draw how self-influence moves over the checkpoints, in multiples of their medians.

    Args:
        names: of the checkpoints.
        values: ``(checkpoints, n)``.
        top: samples that are drawn as lines.
        top_names: what to call them.

    Returns:
        An ``<svg>`` element.
    """
    figure, axes = _figure(legend=True)
    median = np.median(values, axis=1, keepdims=True)
    relative = values / np.where(median > 0, median, 1.0)
    at = np.arange(len(names))
    low, high = np.quantile(relative, (0.1, 0.9), axis=1)
    axes.fill_between(at, low, high, color="gray", alpha=0.3, label="middle 80 % of all")
    for sample, name, color in zip(top, top_names, _colors(len(top)), strict=True):
        axes.plot(
            at, relative[:, sample], marker="o", markersize=3, color=color, label=_plain(name)
        )
    if (relative > 0).all():
        axes.set_yscale("log")
    shown = at[:: max(1, len(at) // 8)]
    axes.set_xticks(shown, [_plain(names[i]) for i in shown])
    axes.set_ylabel("self-influence / median of the checkpoint")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure, "across")


def _figure(legend: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6 if legend else 6.4, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _plain(name: str) -> str:
    """A name that Matplotlib takes neither for a formula nor for one to leave out."""
    text = name if len(name) <= 40 else name[:39] + "…"
    text = "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an element; ``salt`` keeps the ids of several on one page apart."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    # Matplotlib draws axes in black: let them follow the page, so that dark mode works.
    return text[text.index("<svg") :].replace("#000000", "currentColor")
