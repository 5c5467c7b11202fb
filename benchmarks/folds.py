"""Linear datamodeling score of every scheme and fold, beside Gaussian projection at equal k.

Three settings: an MLP and a CNN on Fashion-MNIST (TRAK's margin), a character transformer on the
source of Python's standard library (loss of a sequence). For each, models are trained on random
halves of the training set; scores are good if they predict, by summing over a half, the outputs of
the model trained on it (Spearman over halves, mean over targets). All methods see the same
checkpoints, gradients and dampings; each is reported at its best damping, averaged over seeds of
the projection.

    python benchmarks/folds.py              # an hour on 2 cores; trained halves are kept
    python benchmarks/folds.py --quick      # a minute: fewer of everything

What the results hold already, for the same numbers of halves and so on, is not measured again: they
are written after each seed, and more seeds add to them.

Fashion-MNIST: Debian's dataset-fashion-mnist, or --fashion-mnist DIR with its four .gz files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import FASHION_MNIST
from _settings import Setting, load
from _training import halves, train
from matplotlib.figure import Figure
from torch import Tensor, nn
from trak.projectors import BasicProjector

from trak_dropout import DenseGradientComputer, DropoutProjector
from trak_dropout.metrics import linear_datamodeling_score

HERE = Path(__file__).parent
DAMPINGS = (1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = (1, 2, 4, 8, 16, 32)
LARGE_FOLDS = (64, 128)  # the last keeps every coordinate of these models
SCHEMES: dict[str, tuple[str, int] | None] = {
    "Gaussian": None,
    **{f"dropout, fold {fold}": ("dropout", fold) for fold in (*FOLDS, *LARGE_FOLDS)},
    **{f"unit, fold {fold}": ("unit_dropout", fold) for fold in (1, 16)},
    **{f"weighted, fold {fold}": ("weighted_dropout", fold) for fold in FOLDS},
}


def gradients(setting: Setting, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Whole gradients of training samples and after them of targets, ``(n + m, p)``.

    Returns:
        The gradients, and the out-to-loss gradients of training samples.
    """
    computer = DenseGradientComputer(model, setting.task)
    samples = [torch.cat(pair) for pair in zip(setting.train, setting.targets, strict=True)]
    grads = torch.empty(len(samples[0]), sum(q.numel() for q in model.parameters()))
    out_to_loss = []
    at = 0
    for batch in zip(*(part.split(350) for part in samples), strict=True):
        vectors = computer.compute_per_sample_grad(batch)
        size = len(batch[0])
        torch.cat([v.detach().flatten(1) for v in vectors.values()], 1, out=grads[at : at + size])
        out_to_loss.append(computer.compute_loss_grad(batch))
        at += size
    return grads, torch.cat(out_to_loss)[: len(setting.train[0])]


def features(
    setting: Setting,
    models: list[nn.Module],
    dims: list[int],
    seed: int,
    schemes: dict[str, tuple[str, int] | None],
) -> Iterator[tuple[str, int, list[Any]]]:
    """Compress the gradients of all checkpoints by some methods.

    Yields:
        Method, k, and for each checkpoint the features of training samples and of targets and the
        out-to-loss gradients.
    """
    n = len(setting.train[0])
    found: dict[tuple[str, int], list[Any]] = {}
    for model_id, model in enumerate(models):
        grads, q = gradients(setting, model)
        some = grads[: n : max(1, n // 400)]
        for method, chosen in schemes.items():
            if chosen is None:
                gaussian = BasicProjector(
                    grads.shape[1], max(dims), seed, "normal", "cpu", block_size=256
                )
                x = gaussian.project(grads, model_id)
                for k in dims:  # the first columns of a Gaussian projection are one themselves
                    found.setdefault((method, k), []).append((x[:n, :k], x[n:, :k], q))
                continue
            for k in dims:
                projector = DropoutProjector.from_model(model, k, seed, chosen[0], fold=chosen[1])
                if chosen[0] == "weighted_dropout":
                    projector.calibrate([some])
                x = torch.cat([projector.project(part, model_id) for part in grads.split(350)])
                found.setdefault((method, k), []).append((x[:n], x[n:], q))
    for (method, k), checkpoints in found.items():
        yield method, k, checkpoints


def scores(checkpoints: list[Any], damping: float, grams: list[Tensor]) -> np.ndarray:
    """TRAK's scores at a relative damping."""
    total, weight = 0.0, 0.0
    for (x, targets, q), gram in zip(checkpoints, grams, strict=True):
        damped = gram.clone()
        damped.diagonal().add_(damping * gram.trace() / len(gram))
        solved = torch.cholesky_solve(targets.double().T, torch.linalg.cholesky(damped))
        total = total + x.double() @ solved
        weight = weight + q.double()
    return (total * weight).numpy()


def study(
    setting: Setting, rows: list[dict[str, Any]], options: argparse.Namespace
) -> Iterator[int]:
    """Measure all methods in a setting, seed by seed.

    Args:
        setting: the setting.
        rows: what is known; added to.
        options: of the command.

    Yields:
        Each seed, when it has been added.
    """
    masks, outputs = halves(setting, options.halves, options.cache)
    everything = torch.arange(len(setting.train[0]))
    models: list[nn.Module] = []
    here = {(r["method"], r["k"]): r for r in rows if r["setting"] == setting.name}

    def known(method: str, k: int) -> list[dict[str, float]]:
        return here[method, k]["by_seed"] if (method, k) in here else []

    for seed in range(options.seeds):
        missing = {
            method: chosen
            for method, chosen in SCHEMES.items()
            if any(len(known(method, k)) <= seed for k in options.proj_dims)
        }
        if not missing:
            continue
        models = models or [train(setting, everything, i) for i in range(options.checkpoints)]
        for method, k, checkpoints in features(setting, models, options.proj_dims, seed, missing):
            grams = [x.double().T @ x.double() for x, _, _ in checkpoints]
            row = here.setdefault(
                (method, k),
                {"setting": setting.name, "k": k, "method": method, "by_seed": []},
            )
            row["by_seed"].append(
                {
                    str(damping): linear_datamodeling_score(
                        scores(checkpoints, damping, grams), masks, outputs
                    )
                    for damping in DAMPINGS
                }
            )
            row |= at_best(row["by_seed"])
        rows += [row for row in here.values() if row not in rows]
        yield seed


def at_best(by_seed: list[dict[str, float]]) -> dict[str, Any]:
    """The score at the damping that is best on average over seeds."""
    mean = {damping: statistics.mean(s[damping] for s in by_seed) for damping in by_seed[0]}
    best = max(mean, key=mean.__getitem__)
    return {
        "lds": mean[best],
        "lds_by_seed": [s[best] for s in by_seed],
        "damping": float(best),
        "lds_by_damping": mean,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Format the scores, and each method's mean ratio to Gaussian."""
    cells = sorted({(row["setting"], row["k"]) for row in rows})
    lds = {(row["method"], row["setting"], row["k"]): row["lds"] for row in rows}
    lines = [f"{'':22}" + "".join(f"{f'{s} {k}':>12}" for s, k in cells) + f"{'of Gaussian':>22}"]
    for method in dict.fromkeys(row["method"] for row in rows):
        ratios = [lds[method, s, k] / lds["Gaussian", s, k] for s, k in cells]
        lines.append(
            f"{method:22}"
            + "".join(f"{lds[method, s, k]:12.3f}" for s, k in cells)
            + f"{statistics.mean(ratios):10.3f} (least {min(ratios):.3f})"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw each method's score in each setting."""
    cells = sorted({(row["setting"], row["k"]) for row in rows})
    figure = Figure(figsize=(2.4 * len(cells), 3.6), layout="constrained")
    panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for panel, (name, k) in zip(panels, cells, strict=True):
        here = [row for row in rows if (row["setting"], row["k"]) == (name, k)]
        panel.barh([row["method"] for row in here], [row["lds"] for row in here])
        reference = next(row["lds"] for row in here if row["method"] == "Gaussian")
        panel.axvline(reference, color="gray", linewidth=0.8, linestyle=":")
        panel.set(title=f"{name}, k = {k}", xlabel="LDS")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer of everything, k = 128")
    parser.add_argument("--settings", nargs="+", default=["mlp", "cnn", "lm"])
    parser.add_argument("--proj-dims", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--halves", type=int, default=60, help="models trained on random halves")
    parser.add_argument("--checkpoints", type=int, default=3, help="models trained on everything")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the projections")
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="for trained halves")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "folds.json")
    parser.add_argument("--fashion-mnist", type=Path, default=FASHION_MNIST)
    options = parser.parse_args()
    if options.quick:
        options.halves, options.checkpoints, options.proj_dims = 10, 1, [128]
        options.seeds = 1
    common = {
        "halves": options.halves,
        "checkpoints": options.checkpoints,
        "proj_dims": options.proj_dims,
    }
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    same = {name: kept.get(name) for name in common} == common
    rows = [r for r in kept["rows"] if "by_seed" in r and r["method"] in SCHEMES] if same else []
    for name in options.settings:
        size = (300, 20) if options.quick else ()
        setting = load(name, *size, folder=options.fashion_mnist)
        started = time.perf_counter()
        for seed in study(setting, rows, options):
            rows.sort(key=lambda row: list(SCHEMES).index(row["method"]))
            options.out.parent.mkdir(parents=True, exist_ok=True)
            content = {**common, "seeds": options.seeds, "rows": rows}
            options.out.write_text(json.dumps(content, indent=1) + "\n")
            print(f"{setting.name}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    draw(rows, options.out.with_suffix(".png"))
    print(f"\nLDS at the best damping\n{table(rows)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
