"""How close trajectory scores of compressed rows come to those without compression.

Three trainings (an MLP and a CNN on Fashion-MNIST, a character transformer; plain gradient descent,
a few epochs) run with the callback in mode "training": every row is the gradient at the weights of
its very step. Trajectory scores and self-influence (TracIn along the run) of each scheme are
correlated with those of the same training whose rows keep every coordinate (Pearson; for scores
over training samples, mean over targets). Beside them stands a Gaussian projection of the rows that
keep every coordinate, by TRAK's BasicProjector, which cannot run in the training itself.

    python benchmarks/trajectory.py              # minutes on a core
    python benchmarks/trajectory.py --quick

Fashion-MNIST: Debian's dataset-fashion-mnist, or --fashion-mnist DIR with its four .gz files.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from _data import FASHION_MNIST
from _settings import Setting, load
from _study import interval, shown, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from trak.projectors import BasicProjector

import trak_dropout as td
from trak_dropout.lightning import GradientCollector

HERE = Path(__file__).parent
METHODS: dict[str, dict[str, Any]] = {
    "dropout, fold 1": {"proj_type": "dropout"},
    "dropout, fold 16": {"proj_type": "dropout", "fold": 16},
    "unit, fold 1": {"proj_type": "unit_dropout"},
    "weighted, fold 1": {"proj_type": "weighted_dropout"},
    "weighted, fold 1, each epoch": {"proj_type": "weighted_dropout", "calibrate_each": True},
    "weighted, fold 16": {"proj_type": "weighted_dropout", "fold": 16},
}
RATE = 0.05
Scores = tuple[np.ndarray, np.ndarray]


class Module(pl.LightningModule):
    """A setting's model and loss, and plain gradient descent."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.model, self.setting = setting.model(), setting

    def forward(self, *batch: Tensor, **named: Tensor) -> Any:
        """Call the model."""
        return self.model(*batch, **named)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Compute the loss."""
        return self.setting.losses(self.model, tuple(batch)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train with plain gradient descent."""
        return torch.optim.SGD(self.parameters(), RATE)


def of_layers(model: nn.Module) -> list[str]:
    """The parameters of layers: the transformer's positions are one by themselves."""
    return [name for name, _ in model.named_parameters() if "." in name]


def collected(
    setting: Setting, folder: str, epochs: int, **options: Any
) -> td.attribution.AttributionStore:
    """Train with the callback; return its store, with the targets added."""
    pl.seed_everything(0, verbose=False)
    module = Module(setting)
    collector = GradientCollector(
        folder,
        setting.task,
        grad_wrt=of_layers(module.model),
        mode="training",
        overwrite=True,
        model="model",
        **options,
    )
    pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[collector],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(TensorDataset(*setting.train), setting.batch_size, shuffle=True))
    store = collector.store
    targets = DataLoader(TensorDataset(*setting.targets), setting.batch_size)
    store.add_targets("targets", targets, progress=False)
    return store


def correlations(scores: Scores, exact: Scores) -> tuple[float, float]:
    """Pearson's with the exact scores, mean over targets, and with the exact self-influence."""
    columns = zip(scores[0].T, exact[0].T, strict=True)
    of_scores = np.mean([np.corrcoef(a, b)[0, 1] for a, b in columns])
    return float(of_scores), float(np.corrcoef(scores[1], exact[1])[0, 1])


def gaussian(rows: list[tuple[Tensor, Tensor]], k: int, seed: int) -> Scores:
    """Scores of a Gaussian projection of whole rows, with one learning rate throughout."""
    scores, own = 0.0, 0.0
    for model_id, (x, targets) in enumerate(rows):
        projector = BasicProjector(x.shape[1], k, seed, "normal", "cpu", block_size=256)
        a, b = (projector.project(part, model_id) for part in (x, targets))
        scores, own = scores + a @ b.T, own + a.square().sum(1)
    return scores.numpy(), own.numpy()


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all methods in a setting."""
    setting = load(name, options.n, options.m, folder=options.fashion_mnist)

    def scored(store: td.attribution.AttributionStore) -> Scores:
        scores = td.trajectory_scores(store, "targets")
        return np.asarray(scores), td.trajectory_self_influence(store)

    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = dict(setting.model().named_parameters())
        p = sum(weights[name].numel() for name in of_layers(setting.model()))
        whole = collected(setting, f"{folder}/whole", options.epochs, proj_dim=p)
        exact = scored(whole)
        rows = [
            (
                torch.from_numpy(np.array(whole.grads(m))),
                torch.from_numpy(np.load(whole.save_dir / str(m) / "targets_grads.mmap")),
            )
            for m in whole.model_ids
        ]
        for k in options.proj_dims:
            for seed in tqdm(range(options.seeds), desc=f"{name}, k = {k}", leave=False):
                mine = correlations(gaussian(rows, k, seed), exact)
                found.setdefault(("Gaussian, of whole rows", k), []).append(mine)
                for method, how in METHODS.items():
                    store = collected(
                        setting, f"{folder}/some", options.epochs, proj_dim=k, seed=seed, **how
                    )
                    found.setdefault((method, k), []).append(correlations(scored(store), exact))
    for (method, k), values in found.items():
        yield {
            "setting": name,
            "k": k,
            "method": method,
            "scores": interval(a for a, _ in values),
            "self_influence": interval(b for _, b in values),
        }


def main() -> None:
    """Run the study."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one setting, fewer of everything")
    parser.add_argument("--settings", nargs="+", default=["mlp", "cnn", "lm"])
    parser.add_argument("--proj-dims", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--n", type=int, default=500, help="training samples")
    parser.add_argument("--m", type=int, default=50, help="targets")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5, help="of the projections")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "trajectory.json")
    parser.add_argument("--fashion-mnist", type=Path, default=FASHION_MNIST)
    options = parser.parse_args()
    if options.quick:
        options.settings, options.proj_dims = ["mlp"], [64]
        options.n, options.m, options.epochs, options.seeds = 100, 20, 2, 2
    rows = [row for name in options.settings for row in measure(name, options)]
    for key in ("scores", "self_influence"):
        of = {(r["method"], f"{r['setting']} {r['k']}"): shown(r[key]) for r in rows}
        columns = list(dict.fromkeys(column for _, column in of))
        methods = list(dict.fromkeys(method for method, _ in of))
        print(table(methods, columns, lambda m, c: of[m, c], key), flush=True)  # noqa: B023
    options.out.parent.mkdir(parents=True, exist_ok=True)
    common = {
        "n": options.n, "m": options.m, "epochs": options.epochs, "seeds": options.seeds,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    options.out.write_text(json.dumps({**common, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
