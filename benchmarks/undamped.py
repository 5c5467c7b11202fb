"""Does the one-line swap survive TRAK's default of no damping where coordinates are dead?

Trains networks on scikit-learn's digits, whose border pixels are dark, runs TRAK's own loop with
its own score computer and no damping, and counts the runs that end with finite scores that are not
all zero: for Gaussian projection and for dropout over a range of folds, at the same k, seeds and
precisions. Also prints the share of targets whose most influential training image has their class.

    python benchmarks/undamped.py            # a few minutes on 2 cores
    python benchmarks/undamped.py --quick
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import statistics
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from trak import TRAKer
from trak.projectors import BasicProjector

from trak_dropout import DropoutProjector
from trak_dropout.metrics import retrieval_accuracy

N_TRAIN, N_TARGETS, EPOCHS = 1500, 100, 10
FOLDS = (1, 2, 4, 8, 16, 32)


def mlp(*widths: int) -> nn.Module:
    """Return a ReLU network over flattened images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise((64, *widths)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def convnet() -> nn.Module:
    """Return a network of two convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 10),
    )


NETWORKS = {
    "MLP 32": lambda: mlp(32),
    "MLP 128": lambda: mlp(128),
    "MLP 256-64": lambda: mlp(256, 64),
    "CNN 12-24": convnet,
}


def train(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    """Train with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def attempt(model: nn.Module, data: tuple[Tensor, Tensor], projector: Any, half: bool) -> Any:
    """Run TRAK's loop; return the share of targets of the right class, None if it failed."""
    images, labels = data
    state = model.state_dict()
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        traker = TRAKer(
            model=model,
            task="image_classification",
            train_set_size=N_TRAIN,
            save_dir=folder,
            device="cpu",
            projector=projector,
            use_half_precision=half,
            logging_level=logging.ERROR,
        )
        traker.load_checkpoint(state, model_id=0)
        for rows in torch.arange(N_TRAIN).split(750):
            traker.featurize((images[rows], labels[rows]), num_samples=len(rows))
        try:
            traker.finalize_features()
        except torch.linalg.LinAlgError:
            return None
        traker.start_scoring_checkpoint("targets", state, 0, N_TARGETS)
        traker.score((images[-N_TARGETS:], labels[-N_TARGETS:]), num_samples=N_TARGETS)
        scores = np.array(traker.finalize_scores("targets"), dtype=np.float32)
    if not np.isfinite(scores).all() or not scores.any():
        return None
    return retrieval_accuracy(scores, labels[:N_TRAIN], labels[-N_TARGETS:])


def draw(summary: dict[str, dict[str, int]], path: Path) -> None:
    """Draw the share of runs that survived."""
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(summary), [100 * s["survived"] / s["runs"] for s in summary.values()])
    axes.bar_label(bars, [f"{s['survived']} of {s['runs']}" for s in summary.values()], padding=3)
    axes.set(xlabel="undamped runs with finite scores (%)", xlim=(0, 115))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one network, one seed")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of training and projection")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "undamped.json"
    )
    options = parser.parse_args()
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    labels = torch.tensor(digits)[order]
    networks = list(NETWORKS)[: 1 if options.quick else None]
    outcomes: dict[str, list[Any]] = {}
    for name, seed in itertools.product(networks, range(1 if options.quick else options.seeds)):
        torch.manual_seed(seed)
        model = train(NETWORKS[name](), images[:N_TRAIN], labels[:N_TRAIN])
        p = sum(parameter.numel() for parameter in model.parameters())
        for k, half in itertools.product((128, 512, 1024), (True, False)):
            projectors: dict[str, Any] = {
                "Gaussian": BasicProjector(p, k, seed, "normal", "cpu"),
                **{
                    f"fold {fold}": DropoutProjector.from_model(model, k, seed, fold=fold)
                    for fold in FOLDS
                },
            }
            for method, projector in projectors.items():
                share = attempt(model, (images, labels), projector, half)
                outcomes.setdefault(method, []).append(
                    {"network": name, "seed": seed, "k": k, "half": half, "same_class": share}
                )
        print(f"{name}, seed {seed}: done", flush=True)
    summary = {}
    print(f"\n{'projection':12} {'survived':>10} {'same class, median of survivors':>34}")
    for method, runs in outcomes.items():
        shares = [run["same_class"] for run in runs if run["same_class"] is not None]
        summary[method] = {"runs": len(runs), "survived": len(shares)}
        median = f"{statistics.median(shares):.3f}" if shares else "-"
        print(f"{method:12} {len(shares):>4} of {len(runs):<3} {median:>33}")
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({"summary": summary, "runs": outcomes}, indent=1) + "\n")
    draw(summary, options.out.with_suffix(".png"))
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
