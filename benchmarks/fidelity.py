"""How close compressed scores come to those without compression, by scheme, fold and dealing.

The linear datamodeling score (``folds.py``) has the noise of retrained models on top; this study
has none of it. On the same three settings, with fewer samples so that all gradients fit into
memory, scores of every projection are correlated with those of the uncompressed gradients (Pearson
over training samples, mean over targets, each with ``damping="auto"``), and the error of inner
products is taken (mean square over that of the exact ones). Weighted dropout is shown with its
coordinates dealt out to the columns by size, as the package does, and in random order.

    python benchmarks/fidelity.py              # minutes on a core
    python benchmarks/fidelity.py --quick
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import FASHION_MNIST
from _settings import load
from _spectrum import Spectrum
from _study import interval, shown, table
from _training import train
from torch import Tensor
from tqdm import tqdm

from trak_dropout import DenseGradientComputer, DropoutProjector
from trak_dropout.masks import Mask

HERE = Path(__file__).parent
FOLDS = (1, 4, 8, 16, 32)


def projections(
    projector: DropoutProjector, k: int, seed: int
) -> Iterator[tuple[str, Mask | None]]:
    """Name and mask of every projection; None stands for the Gaussian one."""
    yield "Gaussian", None
    kinds = {"dropout": "dropout", "unit": "unit_dropout", "weighted": "weighted_dropout"}
    for name, scheme in kinds.items():
        for fold in FOLDS:
            if fold * k >= projector.grad_dim:
                continue
            other = DropoutProjector(
                projector.grad_dim, k, seed, scheme, fold=fold, layout=projector.layout
            )
            for statistics in projector.statistics.values():
                other.set_statistics(statistics)
            mask = other.mask(0)
            yield f"{name}, fold {fold}", mask
            if scheme == "weighted_dropout" and fold > 1:
                order = np.random.default_rng(seed).permutation(len(mask.columns)) // fold
                yield f"weighted in random order, fold {fold}", replace(mask, columns=order)


def compress(grads: Tensor, mask: Mask | None, k: int, seed: int) -> Tensor:
    """Multiply gradients with a mask's matrix, or with a Gaussian one."""
    if mask is None:
        random = torch.Generator().manual_seed(seed)
        return grads @ torch.randn(grads.shape[1], k, generator=random)
    kept = grads[:, torch.from_numpy(mask.coordinates)] * torch.from_numpy(mask.weights).float()
    out = torch.zeros(len(grads), k)
    return out.index_add_(1, torch.from_numpy(mask.columns), kept)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's over rows, mean over columns."""
    a, b = a - a.mean(0), b - b.mean(0)
    return float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean())


@torch.no_grad()
def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all projections in a setting."""
    setting = load(name, options.n, options.m, folder=options.fashion_mnist)
    with torch.enable_grad():
        model = train(setting, torch.arange(setting.n), 0)
    computer = DenseGradientComputer(model, setting.task)
    samples = [torch.cat(pair) for pair in zip(setting.train, setting.targets, strict=True)]
    calibrated = DropoutProjector.from_model(model, 1, 0, "weighted_dropout")
    batches = zip(*(part.split(100) for part in samples), strict=True)
    parts = [computer.compute_per_sample_grad(batch) for batch in batches]
    calibrated.calibrate(parts, samples=options.n // 2)
    grads = torch.cat([torch.cat([g.flatten(1) for g in part.values()], 1) for part in parts])
    del parts
    x, targets = grads[: setting.n], grads[setting.n :]
    exact = Spectrum(x, targets)
    scores, products = exact.scores(exact.ridge("auto")), (x @ targets.T).double()
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for k in options.proj_dims:
        for seed in tqdm(range(options.seeds), desc=f"{name}, k = {k}", leave=False):
            for method, mask in projections(calibrated, k, seed):
                small = compress(grads, mask, k, seed)
                a, b = small[: setting.n], small[setting.n :]
                spectrum = Spectrum(a, b)
                error = ((a @ b.T).double() / k - products).square().mean()
                found.setdefault((k, method), []).append(
                    (
                        correlation(spectrum.scores(spectrum.ridge("auto")), scores),
                        float(error / products.square().mean()),
                    )
                )
    return [
        {
            "setting": name, "k": k, "method": method,
            "correlation": interval(c for c, _ in values),
            "error": interval(e for _, e in values),
        }
        for (k, method), values in found.items()
    ]  # fmt: skip


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one setting, fewer of everything")
    parser.add_argument("--settings", nargs="+", default=["mlp", "cnn", "lm"])
    parser.add_argument("--proj-dims", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--n", type=int, default=500, help="training samples")
    parser.add_argument("--m", type=int, default=100, help="targets")
    parser.add_argument("--seeds", type=int, default=4, help="of the projections")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fidelity.json")
    parser.add_argument("--fashion-mnist", type=Path, default=FASHION_MNIST)
    options = parser.parse_args()
    if options.quick:
        options.settings, options.proj_dims = ["mlp"], [64]
        options.n, options.m, options.seeds = 100, 20, 2
    rows: list[dict[str, Any]] = []
    for name in options.settings:
        rows += measure(name, options)
    of = {(r["method"], f"{r['setting']} {r['k']}"): r["correlation"] for r in rows}
    columns = list(dict.fromkeys(column for _, column in of))
    names = list(dict.fromkeys(method for method, _ in of))
    print(
        table(names, columns, lambda m, c: shown(of[m, c]) if (m, c) in of else "", "correlation")
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    common = {"n": options.n, "m": options.m, "seeds": options.seeds}
    options.out.write_text(json.dumps({**common, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
