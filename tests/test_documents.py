"""Every decimal figure in README and docs is in benchmarks/results, or follows from it.

A document's figures must be among the rounded numbers of the results that it quotes. Code,
links, formulas and version numbers are left out.
"""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = {
    file.stem: json.loads(file.read_text()) for file in (ROOT / "benchmarks/results").glob("*.json")
}
# These are remade from the results block by block in test_benchmarks.
REMADE = ("evidence.md", "curvature.md")
DOCUMENTS = [
    file
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if file.name not in REMADE
]
# What a document quotes, where it is not free to quote any results.
QUOTED = {
    "cost.md": ("featurize", "projection", "callback"),
    "lds.md": ("folds", "fidelity"),
    "damping.md": ("damping", "defaults"),
}
# Figures that are no results: versions and papers named, thresholds, constants of a rule.
VERSIONS = {"3.10"}
CONSTANTS = {"damping.md": {"0.97", "0.03"}}


def numbers(value: Any) -> Iterator[float]:
    """All numbers in results."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def of_folds() -> Iterator[float]:
    """Ratios to Gaussian, their jackknife errors, and the spread over seeds, of docs/lds.md."""
    rows = RESULTS["folds"]["rows"]
    cell = {(r["method"], r["setting"], r["k"]): r for r in rows}
    places = {key[1:] for key in cell}
    yield statistics.mean(statistics.stdev(r["lds_by_seed"]) for r in rows)
    errors = []
    for method in {key[0] for key in cell}:
        pairs = [(cell[(method, *at)], cell[("Gaussian", *at)]) for at in places]
        ratios = [a["lds"] / b["lds"] for a, b in pairs]
        yield from (statistics.mean(ratios), min(ratios))
        seeds = len(pairs[0][0]["lds_by_seed"])
        without = [
            statistics.mean(
                (sum(a["lds_by_seed"]) - a["lds_by_seed"][i])
                / (sum(b["lds_by_seed"]) - b["lds_by_seed"][i])
                for a, b in pairs
            )
            for i in range(seeds)
        ]
        spread = sum((w - statistics.mean(without)) ** 2 for w in without)
        errors.append((spread * (seeds - 1) / seeds) ** 0.5)
    yield from errors


def of_damping() -> Iterator[float]:
    """What share of the best each rule reaches, of docs/damping.md."""
    rows = [r for name in ("damping", "damping_lm", "damping_cnn") for r in RESULTS[name]["rows"]]
    first = [r for r in RESULTS["damping"]["rows"] if r["setting"] in ("mlp", "cnn", "lm")]
    for rule in rows[0]["rules"]:
        yield statistics.mean(r["rules"][rule] / r["best"] for r in first)
        yield from (r["rules"][rule] / r["best"] for r in rows)


def of_surrogate() -> Iterator[float]:
    """Means and spreads over seeds, and sums and medians of costs, of docs/surrogate.md."""
    for result in RESULTS["surrogate"]["results"]:
        groups: dict[Any, list[float]] = {}
        for row in result["quality"]:
            for key, value in row["quadrants"]["both unseen"].items():
                groups.setdefault((row["method"], row["share"], key), []).append(value)
        for row in result["selection"]:
            groups.setdefault(row["who"], []).append(row["accuracy"])
        for values in groups.values():
            yield statistics.mean(values)
            yield statistics.stdev(values) if len(values) > 1 else 0.0
        for kind, full in result["cost"]["full"].items():
            runs = [row["seconds"][kind] for row in result["cost"]["network"]]
            yield sum(full.values())
            yield from (statistics.median(run[part] for run in runs) for part in runs[0])
            sums = [sum(run.values()) for run in runs]
            yield from (statistics.median(sums), statistics.median(sums) / sum(full.values()))


def figures(text: str) -> list[str]:
    """The figures with a decimal point, in reading order."""
    for pattern in (r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"\$\$.*?\$\$", r"\$[^$]*\$"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r"torch \d+\.\d+\S*|\b\d{4}\.\d{5}\b", "", text)  # versions, papers
    return re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\w)", text)


def allowed(name: str, digits: int) -> set[str]:
    """What a document may quote, with as many digits."""
    values = [x for key in QUOTED.get(name, RESULTS) for x in numbers(RESULTS.get(key, []))]
    if name not in QUOTED or name == "lds.md":
        values += of_folds()
    if name not in QUOTED or name == "damping.md":
        values += of_damping()
    if name not in QUOTED:
        values += of_surrogate()
    return {f"{scale * value:.{digits}f}" for value in values for scale in (1, 100)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_figures_are_results(document: Path) -> None:
    known: dict[int, set[str]] = {}
    unknown = []
    for figure in figures(document.read_text()):
        digits = len(figure.partition(".")[2])
        known.setdefault(digits, allowed(document.name, digits))
        if figure not in known[digits] | VERSIONS | CONSTANTS.get(document.name, set()):
            unknown.append(figure)
    assert not unknown, f"{document.name} has figures that no results hold: {unknown}"


def test_a_wrong_figure_is_found() -> None:
    page = (ROOT / "docs/cost.md").read_text()
    known = allowed("cost.md", 2)
    right = [figure for figure in figures(page) if figure.partition(".")[2][2:] == ""]
    assert right
    assert f"{float(right[0]) + 0.01:.2f}" not in known
    assert figures("of 3.45 and `1.23`, $9.87$, torch 2.13.0, ends with 6.78.") == ["3.45", "6.78"]


def test_runs_that_were_killed_are_told_as_counted() -> None:
    found = RESULTS["crash"]
    said = f"{found['bit_equal']} of {found['runs']} were equal to the bit after {found['kills']}"
    assert f"{said} kills" in " ".join((ROOT / "docs/callback.md").read_text().split())
