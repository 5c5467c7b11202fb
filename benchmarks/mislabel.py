"""Finding flipped labels by self-influence (the paper's first task), against peers.

10 and 20 % of the labels are flipped, a model is trained on them, and training samples are
inspected in the order of their self-influence. On scikit-learn's digits (MLP), Fashion-MNIST (MLP),
and passages of text from six real sources (pretrained MiniLM with LoRA adapters). Each seed flips
other labels, trains another model and draws another projection. The damping of each method is the
one that is best on average over the other seeds.

The cost of compression is measured three ways, on the study's models, an MLP of 1.9M parameters and
ResNet-9: as a share of the time of TRAK's gradient computer, whose finished gradients a user who
swaps the projector compresses; as what the package's own pipeline, which forms no gradients, takes
beyond TRAK's computer alone; and, more strictly than either, as a share of our own fast collecting.

    python benchmarks/mislabel.py                  # small setting, about nine minutes
    python benchmarks/mislabel.py --quick          # a minute
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _models
import torch
from _data import MissingError
from _measure import interleaved
from _methods import Problem, methods, run
from _settings import Setting, fashion_loss, load, take
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
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import BasicProjector

from trak_dropout import DropoutProjector, FactoredGradientComputer
from trak_dropout.metrics import mislabel_auc, mislabel_recall

ORDER = (
    "dropout", "dropout, fold 1", "unit dropout", "weighted dropout", "Gaussian", "SJLT",
    "no compression", "kronfluence EK-FAC", "gradient dot product", "loss", "random",
)  # fmt: skip
EKFAC = "kronfluence EK-FAC"
ON_TEXT = ("dropout", "Gaussian", "no compression", "gradient dot product", "loss", "random")
FOLDS = (1, 8, 16)
# What the study's models are too small to tell: a model and a batch size, by name.
LARGE: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "MLP, 1.9M": (lambda: _models.mlp(784, 1024, 1000, 64, 10), 64),
    "ResNet-9": (lambda: _models.ResNet9(1), 32),
}
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


def affordable(name: str, share: float, method: str, options: argparse.Namespace) -> bool:
    """Whether a measurement is part of the small setting: EK-FAC and the encoder are slow."""
    if name == "text":
        return share == options.shares[0] and method in ON_TEXT
    return method != EKFAC or name == "digits"


def measure(options: argparse.Namespace, cells: Cells) -> None:
    """Fill the cells."""
    known = methods()
    for name in options.settings:
        try:
            clean = load(
                name,
                *((200, 20) if options.quick else ()),
                folder=options.fashion_mnist,
                device=options.device,
            )
        except MissingError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        todo = [
            (share, seed, method)
            for share in options.shares
            for seed in range(options.seeds)
            for method in chosen(ORDER, options)
            if options.every or affordable(name, share, method, options)
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
        # TRAK's computer has to run for a share of its time.
        if clean.dense and not cells.all(setting=clean.name, cost=True):
            model = trained(flip(clean, 0.1, 0)[0], 0, options.cache)
            for row in cost(clean, model, 256, options):
                cells.add(row)
    for name, (build, batch_size) in ({} if options.quick else LARGE).items():
        if not cells.all(setting=name, cost=True):
            torch.manual_seed(0)
            try:
                setting = replace(fashion_loss(256, 1, options.fashion_mnist), name=name)
            except MissingError as error:
                print(f"{name} is left out: {error}", flush=True)
                continue
            for row in cost(setting, build().eval(), batch_size, options):
                cells.add(row)


def cost(
    setting: Setting, model: torch.nn.Module, batch_size: int, options: argparse.Namespace
) -> list[Row]:
    """What compressing a batch costs, beside its gradients.

    ``of_trak`` is the projector's time on finished gradients over that of TRAK's gradient computer,
    ``of_ours`` over that of forming them with ours, and ``added`` is what the package's own
    pipeline, from batch to compressed gradients, takes more than TRAK's computer alone (negative
    where it takes less), as a share of it. Medians of interleaved rounds.
    """
    p, k = sum(q.numel() for q in model.parameters()), options.proj_dim
    batch = take(setting.train, slice(batch_size))
    theirs = FunctionalGradientComputer(model, setting.task, p, torch.float32, options.device)
    ours = FactoredGradientComputer(model, setting.task, p, torch.float32, options.device)

    def formed() -> dict[str, torch.Tensor]:
        return dict(ours.compute_per_sample_grad(batch).items())

    grads = theirs.compute_per_sample_grad(batch)
    calls: dict[str, Any] = {
        "trak": lambda: theirs.compute_per_sample_grad(batch),
        "formed": formed,
    }
    for fold in FOLDS:
        projector = DropoutProjector.from_model(model, k, fold=fold, device=options.device)
        calls["project", fold] = lambda q=projector: q.project(grads, 0)
        calls["pipeline", fold] = lambda q=projector: q.project(
            ours.compute_per_sample_grad(batch), 0
        )
    slow = {"trak": 5}
    if p * k < 4.5e9:  # beyond that a minute for a batch
        gaussian = BasicProjector(p, k, 0, "normal", options.device, block_size=256)
        calls["Gaussian"] = lambda: gaussian.project(grads, 0)
        slow["Gaussian"] = 1
    times = interleaved(calls, 3 if options.quick else 5 if p > 10**6 else 9, slow, options.device)
    seconds = {name: statistics.median(rounds) for name, rounds in times.items()}
    shared = {"setting": setting.name, "cost": True, "p": p, "batch": len(batch[0]), "k": k}
    rows = [
        {
            **shared,
            "method": f"dropout, fold {fold}",
            "of_trak": seconds["project", fold] / seconds["trak"],
            "added": seconds["pipeline", fold] / seconds["trak"] - 1,
            "of_ours": seconds["project", fold] / seconds["formed"],
        }
        for fold in FOLDS
    ]
    if "Gaussian" in seconds:
        rows.append(
            {
                **shared,
                "method": "Gaussian",
                "of_trak": seconds["Gaussian"] / seconds["trak"],
                "added": seconds["Gaussian"] / seconds["trak"],  # there is no other pipeline
                "of_ours": seconds["Gaussian"] / seconds["formed"],
            }
        )
    return rows


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
        "--every",
        action="store_true",
        help="every method and share on every setting, EK-FAC as well (slow)",
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
    if not rows:
        raise SystemExit("mislabel: no setting runs here")
    of = {(r["method"], f"{r['setting']}, {r['share']:.0%}"): r for r in rows}
    names = [m for m in ORDER if any(r["method"] == m for r in rows)]
    columns = list(dict.fromkeys(column for _, column in of))
    print(table(names, columns, lambda m, c: shown(of[m, c]["auc"]) if (m, c) in of else "", "AUC"))
    costs = [c for c in cells.used if c.get("cost")]
    for row in costs:
        print(
            f"{row['setting']}: {row['method']} costs {row['of_trak']:.2%} of TRAK's computer, "
            f"{row['of_ours']:.2%} of ours; the whole pipeline {row['added']:+.0%} of TRAK's"
        )
    write(
        options.out,
        options,
        inspected=INSPECTED,
        rows=rows,
        compared=compared(rows),
        cost=costs,
    )
    draw(rows, options.out.with_suffix(".png"))
    cells.close()


if __name__ == "__main__":
    main()
