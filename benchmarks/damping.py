"""Which damping predicts best, and which rule finds it without being told.

On the settings of ``folds.py`` and two more that no rule was chosen on, scores of Gaussian
projection and of every scheme are computed over a grid of dampings, and rules that see only
compressed gradients are compared with the best of the grid (linear datamodeling score, LDS):

- ``flatness``: ``lambda`` is ``6 mean(e)^2 / rms(e)`` over the n eigenvalues e of ``X X^T``, and
  the same with 4 and 9 instead of 6;
- ``denoised``: the same, with the root-mean-square less what the projection adds to it,
  ``rms^2 = (|X^T X|_F^2 - trace(X^T X)^2 / k) / n``, at least ``mean^2``;
- ``mean norm``: ``mean(e)``, the mean squared norm of a compressed gradient, ``trace(X^T X) / n``,
  and a third of it;
- ``mean eigenvalue``: ``trace(X^T X) / k``;
- ``agreement``: the one of the grid at which the scores of different checkpoints agree best.

    python benchmarks/damping.py            # half an hour on 2 cores; trained halves are kept
    python benchmarks/damping.py --quick
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import folds
import numpy as np
import torch
from _data import FASHION_MNIST
from _settings import Setting, load
from _spectrum import Spectrum
from _training import halves, train
from matplotlib.figure import Figure

from trak_dropout.metrics import linear_datamodeling_score

GRID = [10.0**e for e in np.arange(-6, 2.01, 0.5)]
METHODS: dict[str, tuple[str, int] | None] = {
    "Gaussian": None,
    "dropout": ("dropout", 16),
    "unit dropout": ("unit_dropout", 16),
    "weighted dropout": ("weighted_dropout", 16),
    "pure dropout": ("dropout", 1),
    "pure weighted dropout": ("weighted_dropout", 1),
}
UNSEEN = ("digits", "small cnn")


def agreement(scores: list[np.ndarray]) -> float:
    """Mean correlation over targets between the scores of pairs of checkpoints."""
    pairs = itertools.combinations(scores, 2)
    found = [
        np.mean([np.corrcoef(a[:, j], b[:, j])[0, 1] for j in range(a.shape[1])]) for a, b in pairs
    ]
    return float(np.mean(found)) if found else 0.0


def study(setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """LDS over the grid, and at what the rules choose."""
    masks, outputs = halves(setting, options.halves, options.cache)
    everything = torch.arange(len(setting.train[0]))
    models = [train(setting, everything, seed) for seed in range(options.checkpoints)]
    p = sum(parameter.numel() for parameter in models[0].parameters())
    dims = [k for k in options.proj_dims if k <= p]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        for method, k, checkpoints in folds.features(setting, models, dims, seed, METHODS):
            measured = one(checkpoints, masks, outputs)
            found.setdefault((method, k), []).append(measured)
    rows = []
    for (method, k), seeds in found.items():
        mean = {
            key: np.mean([s[key] for s in seeds], axis=0).tolist() for key in ("curve", "agreement")
        }
        best = max(mean["curve"])
        rules = {
            name: statistics.mean(s["rules"][name] for s in seeds) for name in seeds[0]["rules"]
        }
        row = {
            "setting": setting.name, "method": method, "k": k, "n": seeds[0]["n"], "best": best,
            "best_damping": GRID[int(np.argmax(mean["curve"]))], **mean, "rules": rules,
            "flatness": seeds[0]["flatness"], "denoised": seeds[0]["denoised"],
        }  # fmt: skip
        rows.append(row)
        shares = "  ".join(f"{name} {value / best:.3f}" for name, value in rules.items())
        print(
            f"{setting.name:13} {method:22} k {k:5}: best {best:.3f} at damping "
            f"{row['best_damping']:8.2g} (k/n {k / row['n']:.2f}); of best: {shares}",
            flush=True,
        )
    return rows


def one(checkpoints: list[Any], masks: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
    """Measure one seed of a projection."""
    spectra = [Spectrum(x, targets) for x, targets, _ in checkpoints]
    weight = sum(q.double() for _, _, q in checkpoints).numpy()

    def score(ridges: list[float]) -> float:
        total = sum(s.scores(r) for s, r in zip(spectra, ridges, strict=True)).numpy()
        return linear_datamodeling_score(total * weight, masks, outputs)

    curve = [score([d * s.trace / s.k for s in spectra]) for d in GRID]
    agreed = [agreement([s.scores(d * s.trace / s.k).numpy() for s in spectra]) for d in GRID]
    rules = {
        **{f"flatness, {c}": score([c * s.mean**2 / s.rms for s in spectra]) for c in (4, 6, 9)},
        **{
            f"denoised, {c}": score([c * s.mean**2 / s.denoised for s in spectra])
            for c in (4, 6, 9)
        },
        "mean norm": score([s.mean for s in spectra]),
        "mean norm / 3": score([s.mean / 3 for s in spectra]),
        "mean eigenvalue": score([s.trace / s.k for s in spectra]),
        "agreement": curve[int(np.argmax(agreed))],
    }
    return {
        "curve": curve,
        "agreement": agreed,
        "rules": rules,
        "n": spectra[0].n,
        "flatness": [s.mean / s.rms for s in spectra],
        "denoised": [s.mean / s.denoised for s in spectra],
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Each rule's LDS as a share of the best of the grid."""
    lines = [f"{'':20}{'mean':>8}{'least':>8}{'least, unseen':>16}"]
    for rule in rows[0]["rules"]:
        shares = {
            seen: [r["rules"][rule] / r["best"] for r in rows if (r["setting"] in UNSEEN) != seen]
            for seen in (True, False)
        }
        chosen = shares[True] or shares[False]
        other = f"{min(shares[False]):16.3f}" if shares[False] else ""
        lines.append(f"{rule:20}{statistics.mean(chosen):8.3f}{min(chosen):8.3f}{other}")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw LDS over lambda, in mean squared norms, for each setting and k."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    dims = sorted({row["k"] for row in rows})
    figure = Figure(figsize=(2.6 * len(dims), 2.1 * len(settings)), layout="constrained")
    panels = figure.subplots(len(settings), len(dims), squeeze=False, sharex=True)
    for i, setting in enumerate(settings):
        for j, k in enumerate(dims):
            panel = panels[i, j]
            for row in rows:
                if (row["setting"], row["k"]) == (setting, k):
                    ratio = row["n"] / row["k"]
                    panel.plot([d * ratio for d in GRID], row["curve"], label=row["method"])
            panel.axvline(1, color="gray", linewidth=0.8, linestyle=":")
            panel.set(xscale="log", title=f"{setting}, k = {k}")
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, -1].legend(fontsize=6)
    figure.supxlabel("lambda over the mean squared norm of a compressed gradient")
    figure.supylabel("LDS")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the digits, fewer of everything")
    parser.add_argument("--settings", nargs="+", default=["mlp", "cnn", "lm", *UNSEEN])
    parser.add_argument("--proj-dims", nargs="+", type=int, default=[256, 1024, 2048, 4096])
    parser.add_argument("--halves", type=int, default=60)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="first seed of the projections")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, averaged")
    parser.add_argument("--cache", type=Path, default=folds.HERE / "cache")
    parser.add_argument("--out", type=Path, default=folds.HERE / "results" / "damping.json")
    parser.add_argument("--fashion-mnist", type=Path, default=FASHION_MNIST)
    options = parser.parse_args()
    if options.quick:
        options.settings, options.proj_dims, options.halves = ["digits"], [256], 10
    rows: list[dict[str, Any]] = []
    for name in options.settings:
        setting = load(name, folder=options.fashion_mnist)
        rows += study(setting, options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"grid": GRID, "rows": rows}, indent=1) + "\n")
        draw(rows, options.out.with_suffix(".png"))
    print(f"\nLDS over the best of the grid\n{summary(rows)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
