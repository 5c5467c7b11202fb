"""Retraining without the most influential samples (the paper's second task), against peers.

Training samples are ranked by the sum of their scores for all targets. The first 1, 5, 10 and 20 %
are removed, the model is trained again with other seeds, and the targets' loss and accuracy (or
perplexity) tell how much they mattered; removing random samples is the floor. A narrow ResNet-9 on
Fashion-MNIST, and a GPT-NeoX model of bytes on six sources of text. `--least` removes the least
helpful samples instead. Retraining for each damping would cost too much to choose it, so every
method that damps takes the rule `damping="auto"`, which sees the method's own gradients only.

    python benchmarks/retrain.py                   # small setting
    python benchmarks/retrain.py --quick           # a minute
    python benchmarks/retrain.py --settings cifar10 --n 50000 --retrains 5 --device cuda
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from _methods import Problem, methods, run
from _settings import Setting, load
from _study import (
    Cells,
    Row,
    difference,
    interval,
    means,
    parser,
    shown,
    table,
    write,
)
from _training import train, trained
from matplotlib.figure import Figure
from tqdm import tqdm

# Any method of `_methods.methods` that scores targets will do; these are run by default.
ORDER = ("dropout", "Gaussian", "random")
NOTHING = "nothing removed"


def ranked_by(options: argparse.Namespace) -> list[str]:
    """The methods to remove by."""
    return list(options.methods or ORDER)


def evaluate(setting: Setting, model: torch.nn.Module) -> dict[str, float]:
    """Mean loss of the targets, and accuracy or perplexity."""
    with torch.no_grad():
        loss = float(setting.losses(model, setting.targets).mean())
        logits, labels = setting.predict(model, setting.targets)
    if labels.ndim > 1:
        return {"loss": loss, "perplexity": math.exp(loss)}
    return {"loss": loss, "accuracy": float((logits.argmax(-1) == labels).float().mean())}


def ranking(
    setting: Setting, method: str, seed: int, options: argparse.Namespace
) -> tuple[np.ndarray, float] | None:
    """Training samples in the order in which they go, and the seconds that took."""
    model = trained(setting, seed, options.cache)
    problem = Problem(setting, [model], seed, batch_size=100)
    found = run(methods()[method], problem, options.proj_dim)
    if found is None:
        return None
    values = found.values.get("auto", next(iter(found.values.values())))
    total = values.sum(1)
    return np.argsort(total if options.least else -total, kind="stable"), found.seconds


def measure(options: argparse.Namespace, cells: Cells) -> None:
    """Fill the cells."""
    for name in options.settings:
        sizes = (150, 60) if options.quick else (options.n,) if options.n else ()
        setting = load(name, *sizes, folder=options.fashion_mnist, device=options.device)
        total = (
            options.seeds * options.retrains * (1 + len(ranked_by(options)) * len(options.shares))
        )
        bar = tqdm(total=total, desc=f"{setting.name}: trained again")
        for seed in range(options.seeds):
            for method in (NOTHING, *ranked_by(options)):
                shares = [0.0] if method == NOTHING else options.shares
                todo = [
                    (share, again)
                    for share in shares
                    for again in range(options.retrains)
                    if cells.get(
                        setting=setting.name, seed=seed, method=method, share=share, again=again
                    )
                    is None
                ]
                bar.update(len(shares) * options.retrains - len(todo))
                ranked = (
                    (np.arange(setting.n), 0.0)
                    if method == NOTHING
                    else ranking(setting, method, seed, options)
                    if todo
                    else None
                )
                for share, again in todo if ranked is not None else ():
                    kept = np.sort(ranked[0][round(share * setting.n) :])
                    model = train(setting, torch.from_numpy(kept), 10_000 + 100 * seed + again)
                    cells.add(
                        {
                            "setting": setting.name, "seed": seed, "method": method,
                            "share": share, "again": again, "seconds": ranked[1],
                            **evaluate(setting, model),
                        }
                    )  # fmt: skip
                    bar.update()
        bar.close()


def summarize(cells: list[Row]) -> list[Row]:
    """Mean and interval over seeds, each the mean over trainings."""
    rows = []
    for key in dict.fromkeys((c["setting"], c["method"], c["share"]) for c in cells):
        here = [c for c in cells if (c["setting"], c["method"], c["share"]) == key]
        row: Row = {"setting": key[0], "method": key[1], "share": key[2]}
        for metric in ("loss", "accuracy", "perplexity"):
            by_seed = [
                means([c for c in here if c["seed"] == seed], metric)
                for seed in sorted({c["seed"] for c in here})
            ]
            row[metric] = None if None in by_seed else interval(v for v in by_seed if v is not None)
        rows.append(row)
    return rows


def compared(rows: list[Row]) -> list[Row]:
    """Loss after removal by our scores, minus that by others."""
    cell = {(r["setting"], r["method"], r["share"]): r["loss"] for r in rows}
    return [
        {
            "setting": setting, "scheme": scheme, "peer": peer, "share": share,
            "loss": difference(loss, cell[setting, peer, share]),
        }
        for (setting, scheme, share), loss in cell.items()
        if "dropout" in scheme
        for peer in ("Gaussian", "gradient dot product", "random")
        if (setting, peer, share) in cell
    ]  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """Draw the targets' loss over the share removed."""
    settings = list(dict.fromkeys(r["setting"] for r in rows))
    figure = Figure(figsize=(4.5 * len(settings), 3.6), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        base = [r for r in rows if (r["setting"], r["method"]) == (setting, NOTHING)]
        for method in dict.fromkeys(r["method"] for r in rows if r["method"] != NOTHING):
            here = [r for r in rows if (r["setting"], r["method"]) == (setting, method)]
            points = sorted(base + here, key=lambda r: r["share"])
            x = [r["share"] for r in points]
            panel.plot(
                x,
                [r["loss"]["mean"] for r in points],
                "-o" if "dropout" in method else "--s",
                markersize=3,
                label=method,
            )
            panel.fill_between(
                x,
                [r["loss"]["low"] for r in points],
                [r["loss"]["high"] for r in points],
                alpha=0.1,
            )
        panel.set(title=setting, xlabel="share removed")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss of the targets, trained again")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the study."""
    options_parser = parser(__doc__, "retrain")
    options_parser.add_argument("--settings", nargs="+", default=["resnet9", "bytes"])
    options_parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.05, 0.1, 0.2])
    options_parser.add_argument("--retrains", type=int, default=2, help="trainings of each seed")
    options_parser.add_argument("--proj-dim", type=int, default=1024)
    options_parser.add_argument("--n", type=int, help="training samples")
    options_parser.add_argument("--least", action="store_true", help="remove the least helpful")
    options = options_parser.parse_args()
    if options.quick:
        options.settings, options.shares, options.seeds = ["resnet9"], [0.2], 2
        options.retrains, options.proj_dim = 1, 128
    cells = Cells(options, "retrain")
    measure(options, cells)
    rows = summarize(cells.used)
    for setting in dict.fromkeys(r["setting"] for r in rows):
        here = {(r["method"], f"{r['share']:.0%}"): r for r in rows if r["setting"] == setting}
        columns = list(dict.fromkeys(share for _, share in here))
        names = list(dict.fromkeys(method for method, _ in here))
        for metric in ("loss", "accuracy", "perplexity"):
            if next(iter(here.values()))[metric] is not None:

                def cell(m: str, c: str, here: dict = here, metric: str = metric) -> str:
                    return shown(here[m, c][metric]) if (m, c) in here else ""

                print(table(names, columns, cell, f"{setting}: {metric}") + "\n")
    write(options.out, options, rows=rows, compared=compared(rows))
    draw(rows, options.out.with_suffix(".png"))
    cells.close()


if __name__ == "__main__":
    main()
