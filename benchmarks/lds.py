"""Linear datamodeling score at equal k and at equal time, against peers.

Models are trained on random halves of a training set; scores are good if they predict, by summing
over a half, the output of the model trained on it (Spearman over halves, mean over targets). An MLP
on digits (loss), a small CNN and an MLP on Fashion-MNIST (TRAK's margin), a character transformer
on Python source (loss); ``--settings`` knows a larger CNN as well (``cnn``). Each seed has its own
checkpoint and projection. The damping of each method is the one that is best on average over the
other seeds. Time is from the trained model to all scores, each method through its own pipeline. For
score at equal time, our schemes get the time that the other method took. Rows "3 checkpoints" add
up the scores of the model as it was after each third of its one training; the others have the
trained model alone.

    python benchmarks/lds.py                       # small setting
    python benchmarks/lds.py --quick               # a minute
    python benchmarks/lds.py --full --proj-dims 256 1024 4096 16384 --more-dims --halves 100
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from _methods import Problem, methods, run
from _settings import load
from _study import (
    Cells,
    Row,
    chosen,
    cross_fitted,
    interval,
    means,
    parser,
    ratio,
    shown,
    table,
    write,
)
from _training import SEVERAL, checkpoints, halves, stages_of
from matplotlib.figure import Figure
from tqdm import tqdm

from trak_dropout.metrics import linear_datamodeling_score

# Training samples and targets where the setting's own would take more than the hour that
# `make benchmarks` has.
SMALL = {"mlp": (1000, 100), "lm": (600, 100)}
# Further checkpoints of a training cost nothing but their own gradients.
ORDER = (
    "Gaussian", "Gaussian, loss curvature", "SJLT", "dropout", "dropout, fold 1", "unit dropout",
    "weighted dropout", "dropout, loss curvature", f"Gaussian{SEVERAL}",
    f"dropout{SEVERAL}", f"dropout, loss curvature{SEVERAL}",
    "no compression", "kronfluence EK-FAC", "dattri influence function",
    "dattri TRAK", "gradient dot product", "random",
)  # fmt: skip
OURS = [name for name in ORDER if "dropout" in name]


def measure(options: argparse.Namespace, cells: Cells) -> None:
    """Fill the cells."""
    known = methods()
    for name in options.settings:
        size = (300, 20) if options.quick else () if options.full else SMALL.get(name, ())
        setting = load(name, *size, folder=options.fashion_mnist, device=options.device)
        masks, outputs = halves(setting, options.halves, options.cache)
        todo = [
            (method, k, seed)
            for seed in range(options.seeds)
            for method in chosen(ORDER, options)
            for k in dims(method, options)
            if cells.get(setting=name, method=method, k=k, seed=seed) is None
        ]
        for method, k, seed in tqdm(todo, desc=f"{name}: methods"):
            base, stages = stages_of(method)
            models = checkpoints(setting, seed, options.cache, stages)
            found = run(known[base], Problem(setting, models, seed), k)
            row: Row = {"setting": name, "method": method, "k": k, "seed": seed, "lds": None}
            if found is not None:
                row["lds"] = {
                    str(d): linear_datamodeling_score(v, masks, outputs)
                    for d, v in found.values.items()
                }
                row |= {
                    "seconds": found.seconds, "collecting": found.collecting,
                    "projecting": found.projecting, "megabytes": found.megabytes,
                }  # fmt: skip
            cells.add(row)


def dims(method: str, options: argparse.Namespace) -> list[int]:
    """The k of a method, 0 where it has none; dattri's TRAK is Gaussian as well."""
    if method.endswith(SEVERAL):  # of Gaussian, the slowest of all, the least
        return options.proj_dims[:1] if method.startswith("Gaussian") else options.proj_dims
    if method in OURS:
        return sorted({*options.proj_dims, *options.more_dims})
    if method == "dattri TRAK":
        return options.proj_dims[:1]
    projected = ("Gaussian", "Gaussian, loss curvature", "SJLT")
    return options.proj_dims if method in projected else [0]


def summarize(cells: list[Row]) -> list[Row]:
    """Mean and interval over seeds of each method, setting and k.

    What a method could not do for every seed is left out, because ratios are by seed.
    """
    rows = []
    for setting, method, k in dict.fromkeys((c["setting"], c["method"], c["k"]) for c in cells):
        here = [c for c in cells if (c["setting"], c["method"], c["k"]) == (setting, method, k)]
        if not all(c["lds"] for c in here):
            continue
        by_damping = [c["lds"] for c in here]
        common = set.intersection(*(set(v) for v in by_damping))
        by_damping = [{d: v for d, v in one.items() if d in common} for one in by_damping]
        rows.append(
            {
                "setting": setting,
                "method": method,
                "k": k,
                "lds": interval(cross_fitted(by_damping)),
                "auto": interval([v["auto"] for v in by_damping]) if "auto" in common else None,
                "seconds": statistics.median(c["seconds"] for c in here),
                "megabytes": means(here, "megabytes"),
                "by_damping": {d: statistics.mean(v[d] for v in by_damping) for d in common},
            }
        )
    return rows


def at_equal_k(rows: list[Row]) -> list[Row]:
    """Ratio of each method to Gaussian at the same k, averaged over settings and k by seed.

    Methods with several checkpoints are compared to Gaussian with the same ones.
    """
    found = []
    cell = {(r["setting"], r["method"], r["k"]): r["lds"] for r in rows}
    for method in dict.fromkeys(r["method"] for r in rows if r["k"]):
        peer = f"Gaussian{SEVERAL}" if method.endswith(SEVERAL) else "Gaussian"
        both = [(s, k) for s, m, k in cell if m == peer and (s, method, k) in cell]
        if not both:
            continue
        ratios = [ratio(cell[s, method, k], cell[s, peer, k])["values"] for s, k in both]
        by_seed = [statistics.mean(part) for part in zip(*ratios, strict=True)]
        each = {f"{s}, k = {k}": statistics.mean(r) for (s, k), r in zip(both, ratios, strict=True)}
        found.append({"method": method, "of_gaussian": interval(by_seed), "each": each})
    return found


def at_equal_time(rows: list[Row]) -> list[Row]:
    """The best that one of our schemes reaches in the time that another method takes."""
    found = []
    for other in rows:
        peer = other["method"]
        if peer in ("Gaussian", "SJLT", "no compression", "kronfluence EK-FAC") or (
            peer.startswith("dattri")
        ):
            for scheme in OURS:
                within = [
                    r for r in rows
                    if r["setting"] == other["setting"] and r["method"] == scheme
                    and r["seconds"] <= other["seconds"]
                ]  # fmt: skip
                if not within:
                    continue
                best = max(within, key=lambda r: r["k"])  # the most columns the time allows
                found.append(
                    {
                        "setting": other["setting"],
                        "peer": peer,
                        "peer_k": other["k"],
                        "peer_seconds": other["seconds"],
                        "scheme": scheme,
                        "k": best["k"],
                        "seconds": best["seconds"],
                        "ratio": ratio(best["lds"], other["lds"]),
                    }
                )
    return found


def equal_time_summary(equal: list[Row]) -> list[Row]:
    """Ratio by peer and scheme, averaged over settings and the peer's k, by seed."""
    found = []
    for peer, scheme in dict.fromkeys((e["peer"], e["scheme"]) for e in equal):
        here = [e["ratio"]["values"] for e in equal if (e["peer"], e["scheme"]) == (peer, scheme)]
        by_seed = [statistics.mean(part) for part in zip(*here, strict=True)]
        found.append(
            {"peer": peer, "scheme": scheme, "ratio": interval(by_seed), "cells": len(here)}
        )
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Draw score over time, a panel for each setting."""
    settings = list(dict.fromkeys(r["setting"] for r in rows))
    figure = Figure(figsize=(4.2 * len(settings), 4), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        for method in ORDER:
            here = sorted(
                (r for r in rows if (r["setting"], r["method"]) == (setting, method)),
                key=lambda r: r["k"],
            )
            if not here or method == "random":
                continue
            y = [r["lds"]["mean"] for r in here]
            low = [r["lds"]["mean"] - r["lds"]["low"] for r in here]
            style = "-o" if method in OURS else "--s"
            panel.errorbar(
                [r["seconds"] for r in here],
                y,
                low,
                fmt=style,
                markersize=4,
                label=method,
                alpha=0.8,
            )
        panel.set(xscale="log", title=setting, xlabel="seconds from model to scores")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("linear datamodeling score")
    panels[-1].legend(fontsize=6)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the study."""
    options_parser = parser(__doc__, "lds")
    options_parser.add_argument(
        "--settings", nargs="+", default=["digits", "small cnn", "mlp", "lm"]
    )
    options_parser.add_argument("--proj-dims", nargs="+", type=int, default=[512, 2048])
    options_parser.add_argument(
        "--more-dims", nargs="*", type=int, default=[4096], help="further k, for our schemes"
    )
    options_parser.add_argument("--halves", type=int, default=60)
    options_parser.add_argument("--full", action="store_true", help="all samples of each setting")
    options = options_parser.parse_args()
    if options.quick:
        options.settings, options.halves, options.seeds = ["mlp"], 10, 2
        options.proj_dims, options.more_dims = [64], [256]
    cells = Cells(options, "lds")
    measure(options, cells)
    rows = summarize(cells.used)
    equal = at_equal_time(rows)
    known = list(dict.fromkeys((r["setting"], r["k"]) for r in rows))
    of = {(r["method"], f"{r['setting']} {r['k'] or ''}".strip()): r for r in rows}
    columns = [f"{s} {k or ''}".strip() for s, k in sorted(known, key=lambda x: (x[0], x[1]))]
    names = [m for m in ORDER if any(r["method"] == m for r in rows)]
    print(table(names, columns, lambda m, c: shown(of[m, c]["lds"]) if (m, c) in of else "", "LDS"))
    by_k = at_equal_k(rows)
    print()
    for row in by_k:
        print(f"{row['method']:28} of Gaussian at equal k: {shown(row['of_gaussian'])}")
    summary = equal_time_summary(equal)
    for row in summary:
        print(f"{row['scheme']:28} of {row['peer']} at equal time: {shown(row['ratio'])}")
    write(
        options.out, options, rows=rows, equal_k=by_k, equal_time=equal, equal_time_summary=summary
    )
    draw(rows, options.out.with_suffix(".png"))
    cells.close()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
