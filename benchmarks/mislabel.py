"""Finding flipped labels by self-influence (the paper's first task), against peers.

10 and 20 % of the labels are flipped, a model is trained on them, and training samples are
inspected in the order of their self-influence. On scikit-learn's digits (MLP), Fashion-MNIST (MLP),
and passages of text from six real sources (pretrained MiniLM with LoRA adapters). Each seed flips
other labels, trains another model and draws another projection. The damping of each method is the
one that is best on average over the other seeds. The cost of compression alone is measured on
finished gradients, beside computing them.

    python benchmarks/mislabel.py                  # small setting
    python benchmarks/mislabel.py --quick          # a minute
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved
from _methods import Problem, methods, run
from _settings import Setting, load, take
from _study import (
    Cells,
    Row,
    chosen,
    cross_fitted,
    difference,
    fitted_to,
    interval,
    parser,
    shown,
    table,
    write,
)
from _training import trained
from matplotlib.figure import Figure
from tqdm import tqdm
from trak.projectors import BasicProjector

from trak_dropout import DropoutProjector, FactoredGradientComputer
from trak_dropout.metrics import mislabel_auc, mislabel_recall

ORDER = (
    "dropout", "dropout, fold 1", "unit dropout", "weighted dropout", "Gaussian", "SJLT",
    "no compression", "kronfluence EK-FAC", "gradient dot product", "loss", "random",
)  # fmt: skip
EKFAC = "kronfluence EK-FAC"
COSTED = ("dropout, fold 1", "dropout", "unit dropout", "Gaussian")
INSPECTED = (0.05, 0.1, 0.2, 0.3, 0.4)


def flip(setting: Setting, share: float, seed: int) -> tuple[Setting, torch.Tensor]:
    """Give some training samples another label; return the setting and which were flipped."""
    random = torch.Generator().manual_seed(seed)
    labels = setting.train[-1].clone()
    classes = int(labels.max()) + 1
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[torch.randperm(len(labels), generator=random)[: round(share * len(labels))]] = True
    shift = torch.randint(1, classes, (len(labels),), generator=random)
    labels[flipped] = ((labels + shift) % classes)[flipped]
    return setting.relabeled(labels), flipped


def measure(options: argparse.Namespace, cells: Cells) -> None:
    """Fill the cells."""
    known = methods()
    for name in options.settings:
        clean = load(
            name,
            *((200, 20) if options.quick else ()),
            folder=options.fashion_mnist,
            device=options.device,
        )
        todo = [
            (share, seed, method)
            for share in options.shares
            for seed in range(options.seeds)
            for method in chosen(ORDER, options)
            if method != EKFAC or name == "digits" or options.ekfac
            if cells.get(setting=clean.name, share=share, seed=seed, method=method) is None
        ]
        for share, seed, method in tqdm(todo, desc=f"{clean.name}: methods"):
            setting, flipped = flip(clean, share, seed)
            model = trained(setting, seed, options.cache)
            problem = Problem(setting, [model], seed, wanted="self")
            found = run(known[method], problem, options.proj_dim)
            row: Row = {"setting": clean.name, "share": share, "seed": seed, "method": method}
            row["auc"] = None
            if found is not None:
                row["auc"] = {str(d): mislabel_auc(v, flipped) for d, v in found.values.items()}
                row["recall"] = {
                    str(d): [mislabel_recall(v, flipped, s) for s in INSPECTED]
                    for d, v in found.values.items()
                }
                row |= {"seconds": found.seconds, "megabytes": found.megabytes}
            cells.add(row)
        costed = [n for n in COSTED if cells.get(setting=clean.name, cost=True, method=n)]
        if costed != list(COSTED):
            for row in cost(clean, trained(flip(clean, 0.1, 0)[0], 0, options.cache), options):
                cells.add(row)


def cost(setting: Setting, model: torch.nn.Module, options: argparse.Namespace) -> list[Row]:
    """Time to compress a batch of finished gradients, beside the time to compute them."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    p = sum(q.numel() for q in model.parameters() if q.requires_grad)
    batch = take(setting.train, slice(256))
    computer: Any = FactoredGradientComputer(model, setting.task, p, grad_wrt=names)

    def finished() -> dict[str, torch.Tensor]:
        return dict(computer.compute_per_sample_grad(batch).items())

    grads = finished()
    shared: dict[str, Any] = {"proj_dim": options.proj_dim, "grad_wrt": names}
    projectors: dict[str, Any] = {
        "dropout, fold 1": DropoutProjector.from_model(model, fold=1, **shared),
        "dropout": DropoutProjector.from_model(model, **shared),
        "unit dropout": DropoutProjector.from_model(model, proj_type="unit_dropout", **shared),
        "Gaussian": BasicProjector(p, options.proj_dim, 0, "normal", "cpu", block_size=256),
    }
    calls = {name: lambda q=q: q.project(grads, 0) for name, q in projectors.items()}
    times = interleaved(
        {"collecting": finished, **calls}, 3 if options.quick else 9, {"Gaussian": 1}
    )
    base = statistics.median(times["collecting"])
    return [
        {
            "setting": setting.name,
            "cost": True,
            "method": name,
            "of_collecting": statistics.median(times[name]) / base,
        }
        for name in projectors
    ]


def summarize(cells: list[Row]) -> list[Row]:
    """Mean and interval over seeds of each method, setting and share."""
    rows = []
    measured = [c for c in cells if c.get("auc")]
    for key in dict.fromkeys((c["setting"], c["share"], c["method"]) for c in measured):
        here = [c for c in measured if (c["setting"], c["share"], c["method"]) == key]
        by_damping = [c["auc"] for c in here]
        recalls = [
            fitted_to(by_damping, [{d: r[i] for d, r in c["recall"].items()} for c in here])
            for i in range(len(INSPECTED))
        ]
        rows.append(
            {
                "setting": key[0],
                "share": key[1],
                "method": key[2],
                "auc": interval(cross_fitted(by_damping)),
                "auc_auto": interval([a["auto"] for a in by_damping])
                if "auto" in by_damping[0]
                else None,
                "recall": [interval(values) for values in recalls],
                "seconds": statistics.median(c["seconds"] for c in here),
            }
        )
    return rows


def compared(rows: list[Row]) -> list[Row]:
    """AUC of our schemes minus that of others, by setting and share."""
    cell = {(r["setting"], r["share"], r["method"]): r["auc"] for r in rows}
    return [
        {
            "setting": setting, "share": share, "scheme": scheme, "peer": peer,
            "difference": difference(auc, cell[setting, share, peer]),
        }
        for (setting, share, scheme), auc in cell.items()
        if "dropout" in scheme
        for peer in ("Gaussian", "no compression", "loss", "kronfluence EK-FAC")
        if (setting, share, peer) in cell
    ]  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """Draw recall over the share inspected."""
    keys = list(dict.fromkeys((r["setting"], r["share"]) for r in rows))
    settings = list(dict.fromkeys(s for s, _ in keys))
    shares = list(dict.fromkeys(s for _, s in keys))
    figure = Figure(figsize=(3.6 * len(settings), 3 * len(shares)), layout="constrained")
    panels = figure.subplots(len(shares), len(settings), squeeze=False, sharey=True)
    for row in rows:
        panel = panels[shares.index(row["share"]), settings.index(row["setting"])]
        style = "-" if "dropout" in row["method"] else "--"
        mean = [r["mean"] for r in row["recall"]]
        panel.plot(INSPECTED, mean, style, marker=".", label=row["method"])
        panel.fill_between(
            INSPECTED,
            [r["low"] for r in row["recall"]],
            [r["high"] for r in row["recall"]],
            alpha=0.1,
        )
        panel.set(title=f"{row['setting']}, {row['share']:.0%} flipped", ylim=(0, 1.02))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(fontsize=5)
    figure.supxlabel("share inspected")
    figure.supylabel("share of flipped labels found")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the study."""
    options_parser = parser(__doc__, "mislabel")
    options_parser.add_argument("--settings", nargs="+", default=["digits", "fashion", "text"])
    options_parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2])
    options_parser.add_argument("--proj-dim", type=int, default=2048)
    options_parser.add_argument(
        "--ekfac", action="store_true", help="EK-FAC on every setting, not only the digits (slow)"
    )
    options = options_parser.parse_args()
    if options.quick:
        options.settings, options.shares, options.seeds, options.proj_dim = (
            ["digits"],
            [0.1],
            2,
            128,
        )
    cells = Cells(options, "mislabel")
    measure(options, cells)
    rows = summarize(cells.used)
    of = {(r["method"], f"{r['setting']}, {r['share']:.0%}"): r for r in rows}
    names = [m for m in ORDER if any(r["method"] == m for r in rows)]
    columns = list(dict.fromkeys(column for _, column in of))
    print(table(names, columns, lambda m, c: shown(of[m, c]["auc"]) if (m, c) in of else "", "AUC"))
    costs = [c for c in cells.used if c.get("cost")]
    for row in costs:
        print(f"{row['setting']}: {row['method']} costs {row['of_collecting']:.2%} of collecting")
    write(options.out, options, inspected=INSPECTED, rows=rows, compared=compared(rows), cost=costs)
    draw(rows, options.out.with_suffix(".png"))
    cells.close()


if __name__ == "__main__":
    main()
