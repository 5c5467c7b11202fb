"""Retraining without the most influential samples (the paper's second task), against peers.

Targets come in groups of one class, or one source of text. For each group training samples are
ranked by the sum of their scores, averages over several trainings, for the group's targets; rows "3
checkpoints" add up the scores of each training's model as it was after each third of its epochs.
The first samples are removed, the model is trained again, and the group's mean loss tells how much
they mattered. All methods are trained again with the same seeds, so that their differences, and
those to a training from which nothing is removed, are paired. Two floors: random samples, and
random samples of the group's own class, which tells what knowing the label alone would do. A narrow
ResNet-9 on Fashion-MNIST, and a GPT-NeoX model of bytes on six sources of text. `--least` removes
the least helpful samples instead. Retraining for each damping would cost too much to choose it, so
every method that damps takes the rule `damping="auto"`, which sees the method's own gradients only.

    python benchmarks/retrain.py                   # small setting, about 15 minutes
    python benchmarks/retrain.py --quick           # a minute
    python benchmarks/retrain.py --settings cifar10 --n 50000 --groups 10 --size 100 --device cuda
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from _data import MissingError
from _methods import Problem, methods, run
from _settings import Batch, Setting, load, take
from _study import (
    Cells,
    Row,
    difference,
    interval,
    parser,
    shown,
    table,
    write,
)
from _training import SEVERAL, checkpoints, stages_of, train
from matplotlib.figure import Figure
from tqdm import tqdm

NOTHING, RANDOM, SAME = "nothing removed", "random", "random, same label"
FLOORS = (RANDOM, SAME)
# Any method of `_methods.methods` that scores targets will do; these are run by default.
ORDER = ("dropout", f"dropout{SEVERAL}", f"Gaussian{SEVERAL}", "Gaussian", *FLOORS)


def labels_of(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """The label, or source, of each training sample and of each target."""
    return setting.origin or (setting.train[-1], setting.targets[-1])


def groups_of(setting: Setting, count: int, size: int) -> list[torch.Tensor]:
    """Targets in groups of one label each: numbers of the targets of each group.

    Args:
        setting: the setting.
        count: of groups; they take turns over labels.
        size: most targets of a group.

    Raises:
        MissingError: a group is left without targets.
    """
    labels = labels_of(setting)[1].cpu()
    known = labels.unique().tolist()
    found = []
    for number in range(count):
        again, label = divmod(number, len(known))
        group = torch.nonzero(labels == known[label]).flatten()[again * size : (again + 1) * size]
        if not len(group):
            raise MissingError(f"{setting.name} has too few targets for {count} groups of {size}")
        found.append(group)
    return found


def evaluate(setting: Setting, model: torch.nn.Module, targets: Batch) -> dict[str, float]:
    """Mean loss of some targets, and accuracy or perplexity."""
    with torch.no_grad():
        loss = float(setting.losses(model, targets).mean())
        logits, labels = setting.predict(model, targets)
    if labels.ndim > 1:
        return {"loss": loss, "perplexity": math.exp(loss)}
    return {"loss": loss, "accuracy": float((logits.argmax(-1) == labels).float().mean())}


def rankings(
    setting: Setting,
    method: str,
    seed: int,
    groups: list[torch.Tensor],
    options: argparse.Namespace,
) -> list[np.ndarray] | None:
    """For each group training samples in the order in which they go; None if the method cannot."""
    if method in FLOORS:
        random = np.random.default_rng(seed)
        order = random.permutation(setting.n)
        if method == RANDOM:
            return [order] * len(groups)
        of_train, of_targets = (labels.cpu().numpy() for labels in labels_of(setting))
        own = [of_train[order] == of_targets[group[0]] for group in groups]
        return [np.concatenate([order[same], order[~same]]) for same in own]
    method, stages = stages_of(method)
    count = options.trainings
    models = [
        model
        for i in range(count)
        for model in checkpoints(setting, count * seed + i, options.cache, stages)
    ]
    found = run(methods()[method], Problem(setting, models, seed, batch_size=100), options.proj_dim)
    if found is None:
        return None
    values = found.values.get("auto", next(iter(found.values.values())))
    sums = [values[:, group.numpy()].sum(1) for group in groups]
    return [np.argsort(total if options.least else -total, kind="stable") for total in sums]


def measure(options: argparse.Namespace, cells: Cells) -> None:
    """Fill the cells."""
    names = list(options.methods or ORDER)
    for name in options.settings:
        sizes = (150, 60) if options.quick else (options.n,) if options.n else ()
        try:
            setting = load(name, *sizes, folder=options.fashion_mnist, device=options.device)
        except MissingError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        groups = groups_of(setting, options.groups, options.size)
        kept = torch.cat(groups)
        setting, targets = setting.of_targets(kept), [take(setting.targets, g) for g in groups]
        places = list(torch.arange(len(kept)).split([len(group) for group in groups]))
        # Where the order is the same for all groups one training serves them all.
        jobs = [(NOTHING, 0.0, list(range(len(groups))))]
        for method in names:
            for share in options.shares:
                together = [list(range(len(groups)))]
                apart = [[i] for i in range(len(groups))]
                jobs += [
                    (method, share, some) for some in (together if method == RANDOM else apart)
                ]
        bar = tqdm(
            total=len(jobs) * options.seeds * options.retrains,
            desc=f"{setting.name}: trained again",
        )
        for seed in range(options.seeds):
            orders: dict[str, list[np.ndarray] | None] = {NOTHING: [np.arange(setting.n)]}
            for method, share, some in jobs:
                for again in range(options.retrains):
                    bar.update()
                    key: Row = {
                        "setting": setting.name, "seed": seed, "method": method,
                        "share": share, "again": again,
                    }  # fmt: skip
                    if None not in [cells.get(**key, group=g) for g in some]:
                        continue
                    if method not in orders:
                        orders[method] = rankings(setting, method, seed, places, options)
                    order = orders[method]
                    if order is None:
                        continue
                    left = np.sort(order[some[0]][round(share * setting.n) :])
                    model = train(setting, torch.from_numpy(left), 10_000 + 100 * seed + again)
                    for g in some:
                        cells.add({**key, "group": g, **evaluate(setting, model, targets[g])})
        bar.close()


def summarize(cells: list[Row]) -> list[Row]:
    """Mean and interval over seeds, each the mean over groups and trainings.

    ``effect`` is the loss beyond that of the training with the same seed from which nothing was
    removed.
    """
    rows = []
    base = {
        (c["setting"], c["seed"], c["again"], c["group"]): c["loss"]
        for c in cells
        if c["method"] == NOTHING
    }
    for key in dict.fromkeys((c["setting"], c["method"], c["share"]) for c in cells):
        here = [c for c in cells if (c["setting"], c["method"], c["share"]) == key]
        seeds = sorted({c["seed"] for c in here})
        row: Row = {"setting": key[0], "method": key[1], "share": key[2]}
        for metric in ("loss", "accuracy", "perplexity"):
            row[metric] = (
                interval(
                    statistics.mean(c[metric] for c in here if c["seed"] == seed) for seed in seeds
                )
                if metric in here[0]
                else None
            )
        effects = [
            [
                c["loss"] - base[c["setting"], seed, c["again"], c["group"]]
                for c in here
                if c["seed"] == seed
            ]
            for seed in seeds
        ]
        row["effect"] = interval(statistics.mean(values) for values in effects)
        rows.append(row)
    return rows


def compared(rows: list[Row]) -> list[Row]:
    """Effect of removal by our scores, minus that of others, seed by seed.

    Each also over all shares of a setting (``share`` is None), and over all settings and shares
    (``setting`` is None as well).
    """
    cell = {(r["setting"], r["method"], r["share"]): r["effect"] for r in rows}
    ours = dict.fromkeys(r["method"] for r in rows if "dropout" in r["method"])
    others = dict.fromkeys(r["method"] for r in rows if r["method"] not in (*ours, NOTHING))
    found = []
    for scheme in ours:
        for peer in others:
            at = {
                (setting, share): difference(effect, cell[setting, peer, share])
                for (setting, method, share), effect in cell.items()
                if method == scheme and (setting, peer, share) in cell
            }
            settings = list(dict.fromkeys(setting for setting, _ in at))
            pooled = {
                **at,
                **{(s, None): _mean([v for (o, _), v in at.items() if o == s]) for s in settings},
            }
            if len(settings) > 1:
                pooled[None, None] = _mean([pooled[s, None] for s in settings])
            found += [
                {"setting": s, "share": share, "scheme": scheme, "peer": peer, "effect": value}
                for (s, share), value in pooled.items()
            ]
    return found


def _mean(intervals: list[Row]) -> Row:
    """The interval of means, seed by seed."""
    values = zip(*(found["values"] for found in intervals), strict=True)
    return interval(statistics.mean(part) for part in values)


def draw(rows: list[Row], path: Path) -> None:
    """Draw what removal adds to the groups' loss, over the share removed."""
    settings = list(dict.fromkeys(r["setting"] for r in rows))
    figure = Figure(figsize=(4.5 * len(settings), 3.6), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        base = [r for r in rows if (r["setting"], r["method"]) == (setting, NOTHING)]
        for method in dict.fromkeys(r["method"] for r in rows if r["method"] != NOTHING):
            here = [r for r in rows if (r["setting"], r["method"]) == (setting, method)]
            points = sorted(base + here, key=lambda r: r["share"])
            x = [100 * r["share"] for r in points]
            panel.plot(
                x,
                [r["effect"]["mean"] for r in points],
                "-o" if "dropout" in method else "--s",
                markersize=3,
                label=method,
            )
            panel.fill_between(
                x,
                [r["effect"]["low"] for r in points],
                [r["effect"]["high"] for r in points],
                alpha=0.1,
            )
        panel.axhline(0, color="gray", linewidth=0.8, linestyle=":")
        panel.set(title=setting, xlabel="removed, % of the training set")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss added, trained again")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the study."""
    options_parser = parser(__doc__, "retrain")
    options_parser.add_argument("--settings", nargs="+", default=["resnet9", "few bytes"])
    options_parser.add_argument("--shares", nargs="+", type=float, default=[0.04, 0.08])
    options_parser.add_argument("--groups", type=int, default=4, help="groups of targets")
    options_parser.add_argument("--size", type=int, default=10, help="targets in a group")
    options_parser.add_argument("--trainings", type=int, default=3, help="averaged by scores")
    options_parser.add_argument("--retrains", type=int, default=1, help="trainings of each seed")
    options_parser.add_argument("--proj-dim", type=int, default=2048)
    options_parser.add_argument("--n", type=int, help="training samples")
    options_parser.add_argument("--least", action="store_true", help="remove the least helpful")
    options = options_parser.parse_args()
    if options.quick:
        options.settings, options.shares, options.seeds = ["resnet9"], [0.1], 2
        options.groups, options.size, options.trainings, options.proj_dim = 2, 5, 1, 128
    cells = Cells(options, "retrain")
    measure(options, cells)
    rows = summarize(cells.used)
    if not rows:
        raise SystemExit("retrain: no setting runs here")
    for setting in dict.fromkeys(r["setting"] for r in rows):
        here = {(r["method"], f"{r['share']:.0%}"): r for r in rows if r["setting"] == setting}
        columns = list(dict.fromkeys(share for _, share in here))
        names = list(dict.fromkeys(method for method, _ in here))
        for metric in ("effect", "loss", "accuracy", "perplexity"):
            if next(iter(here.values()))[metric] is not None:

                def cell(m: str, c: str, here: dict = here, metric: str = metric) -> str:
                    return shown(here[m, c][metric]) if (m, c) in here else ""

                print(table(names, columns, cell, f"{setting}: {metric}") + "\n")
    pairs = compared(rows)
    for row in pairs:
        if row["share"] is None:
            print(
                f"{row['setting'] or 'all'}: {row['scheme']} adds {shown(row['effect'])} more than "
                f"{row['peer']}"
            )
    write(options.out, options, rows=rows, compared=pairs)
    draw(rows, options.out.with_suffix(".png"))
    cells.close()


if __name__ == "__main__":
    main()
