"""What all studies share: options, results that survive an interruption, damping, intervals."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import FASHION_MNIST

HERE = Path(__file__).parent
# Of results files, where a study has changed what it writes: older files are not shown.
FORMATS = {"mislabel": 2, "crosssource": 2, "retrain": 2, "scale": 2}
Row = dict[str, Any]


def parser(doc: str, name: str) -> argparse.ArgumentParser:
    """The options that every study has.

    Args:
        doc: the study's docstring.
        name: of its results.
    """
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="a minute: fewer of everything")
    found.add_argument(
        "--seeds", type=int, default=3, help="number of seeds (default: %(default)s)"
    )
    found.add_argument("--methods", nargs="+", help="run only these methods")
    found.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    found.add_argument("--cache", type=Path, default=HERE / "cache", help="for trained models")
    found.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json")
    found.add_argument(
        "--fashion-mnist", type=Path, default=FASHION_MNIST, help="folder of its four .gz files"
    )
    return found


class Cells:
    """Measurements by what was measured, kept on disk, so that a run goes on where it stopped.

    Args:
        options: of the study; cells of another data size, device or version are not used.
        name: of the study.
    """

    # What a cell does not depend on, or names itself.
    _FREE = (
        "methods",
        "out",
        "cache",
        "seeds",
        "settings",
        "shares",
        "proj_dims",
        "more_dims",
        "every",
    )

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        kept = {k: str(v) for k, v in vars(options).items() if k not in self._FREE}
        self._file = options.cache / f"{name}{'-quick' if options.quick else ''}.cells.jsonl"
        self._head = json.dumps({**kept, "torch": torch.__version__})
        self.rows: list[Row] = []
        self.used: list[Row] = []  # those that this run asked for or made
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        if lines and lines[0] == self._head:
            # The last line is cut off where the run was killed while writing it.
            self.rows = [json.loads(line) for line in lines[1:] if line.endswith("}")]
            print(f"going on after {len(self.rows)} measurements in {self._file}", flush=True)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        whole = [self._head, *(json.dumps(row) for row in self.rows)]
        self._file.write_text("\n".join(whole) + "\n")

    def get(self, **key: Any) -> Row | None:
        """The measurement of a cell, or None."""
        found = next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)
        if found is not None and found not in self.used:
            self.used.append(found)
        return found

    def all(self, **key: Any) -> list[Row]:
        """All measurements that a key is part of."""
        found = [r for r in self.rows if all(r.get(k) == v for k, v in key.items())]
        self.used += [row for row in found if row not in self.used]
        return found

    def add(self, row: Row) -> None:
        """Keep a measurement."""
        self.rows.append(row)
        self.used.append(row)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Forget the measurements: they are in the results."""
        self._file.unlink(missing_ok=True)


def cross_fitted(by_damping: Sequence[Mapping[str, float]]) -> list[float]:
    """The value of each seed at the damping that is best on average over the other seeds.

    One rule for all methods, so that none is reported at a damping chosen on the value itself.
    ``"auto"``, which needs no choice, is not among those to choose from.

    Args:
        by_damping: for each seed, values by damping; larger is better.
    """
    return fitted_to(by_damping, by_damping)


def fitted_to(
    by_damping: Sequence[Mapping[str, float]], values: Sequence[Mapping[str, float]]
) -> list[float]:
    """Another value of each seed at the damping that `cross_fitted` chooses.

    Args:
        by_damping: for each seed, what the damping is chosen by; larger is better.
        values: for each seed, the values to report, by damping.
    """
    found = []
    for i, own in enumerate(by_damping):
        others = [v for j, v in enumerate(by_damping) if j != i] or [own]
        tunable = [d for d in own if d != "auto"] or list(own)
        best = max(tunable, key=lambda d: statistics.mean(v[d] for v in others))
        found.append(values[i][best])
    return found


def interval(values: Iterable[float]) -> dict[str, Any]:
    """Mean of values of several seeds and its 95 % interval (Student's t)."""
    from scipy.stats import t

    kept = [float(v) for v in values]
    mean = statistics.mean(kept)
    half = 0.0
    if len(kept) > 1:
        half = t.ppf(0.975, len(kept) - 1) * statistics.stdev(kept) / len(kept) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": kept}


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Interval of the ratio, seed by seed."""
    pairs = zip(ours["values"], theirs["values"], strict=True)
    return interval(a / b for a, b in pairs)


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Interval of the difference, seed by seed."""
    return interval(a - b for a, b in zip(ours["values"], theirs["values"], strict=True))


def shown(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """An interval as in a table: mean and half its width."""
    if value is None:
        return ""
    return f"{value['mean']:.{digits}f} ± {value['high'] - value['mean']:.{digits}f}"


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the measurements were made on."""
    return {
        "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[2],  # of the last quarter of an hour: others slow a study down
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write(path: Path, options: argparse.Namespace, **content: Any) -> None:
    """Write results, complete or not at all; the file is called after the study."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        k: v for k, v in vars(options).items() if k not in ("out", "cache", "fashion_mnist")
    }
    head = {"format": FORMATS.get(path.stem, 1), "machine": machine(options), "options": settings}
    text = json.dumps({**head, **content}, indent=1)
    fresh = path.with_suffix(".new")
    fresh.write_text(text + "\n")
    fresh.replace(path)
    print(f"written to {path}")


def table(
    rows: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], str], corner: str = ""
) -> str:
    """A Markdown table, aligned to be read in a terminal, too."""
    body = [[corner, *columns], *([row, *(cell(row, c) for c in columns)] for row in rows)]
    widths = [max(len(line[i]) for line in body) for i in range(len(columns) + 1)]
    lines = [
        " | ".join(part.ljust(w) for part, w in zip(line, widths, strict=True)) for line in body
    ]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in lines)


def chosen(names: Iterable[str], options: argparse.Namespace) -> list[str]:
    """The methods to run."""
    return [name for name in names if not options.methods or name in options.methods]


def means(rows: Sequence[Row], key: str) -> float | None:
    """Mean over rows of what they all have."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else None
