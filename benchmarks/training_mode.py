"""What mode "training" adds to an epoch: paired epochs with and without, interleaved.

Two Trainers, one with the collector and one without, fit the same model on the same data, and take
turns every few batches, so that what else the machine does falls on both. The time of an epoch is
the sum of a fit's own turns, with what it does at the epoch's end. The figure is the median of the
ratios of paired epochs, by the clock and by the processor time of the thread that trains. (What the
first epoch of a fit does once is not in it.)

    python benchmarks/training_mode.py
    python benchmarks/training_mode.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _measure import keep_freed_memory, spread
from _models import ResNet9, neox
from featurize import cross_entropy, mlp, next_token
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trak_dropout.lightning import GradientCollector


class Module(pl.LightningModule):
    """A model, its loss, and Adam."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model, self.loss_of = model, loss

    def forward(self, *batch: Tensor) -> Any:
        """Call the model."""
        return self.model(*batch)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Compute the loss."""
        return self.loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train with Adam."""
        return torch.optim.Adam(self.parameters(), 1e-4)


def images(count: int, channels: int, side: int) -> TensorDataset:
    """Random images and labels."""
    return TensorDataset(torch.randn(count, channels, side, side), torch.randint(10, (count,)))


def sentences(count: int, length: int, vocabulary: int) -> TensorDataset:
    """Random sequences."""
    return TensorDataset(torch.randint(vocabulary, (count, length)))


# Model, loss, data for a number of batches, and batch size.
SETTINGS: dict[str, Any] = {
    "mlp": (mlp, cross_entropy, lambda n: images(64 * n, 1, 28), 64),
    "resnet9": (ResNet9, cross_entropy, lambda n: images(32 * n, 3, 32), 32),
    "gpt-neox-10m": (neox(320, 8, 8, 512), next_token, lambda n: sentences(16 * n, 64, 512), 16),
}
BATCHES = {"mlp": 938, "resnet9": 40, "gpt-neox-10m": 40}  # Fashion-MNIST has 938 of the first
MOST = 1.05  # what an epoch may take with the collector
TURNS = 20  # of a fit in an epoch, at most


class Turns(pl.Callback):
    """Lets fits in several threads take turns of a few batches, and times their epochs.

    Args:
        name: of this fit.
        order: names of all fits; they take turns in this order.
        state: shared by all: whose turn it is, and the seconds of each epoch, by the clock and of
            the thread's processor time.
        batches: in a turn.
    """

    def __init__(self, name: str, order: list[str], state: dict[str, Any], batches: int) -> None:
        self.name, self.order, self.state, self.batches = name, order, state, batches
        self.spent = [0.0, 0.0]

    def _wait(self) -> None:
        with self.state["changed"]:
            self.state["changed"].wait_for(
                lambda: self.state["turn"] == self.name or self.state["failures"]
            )
        if self.state["failures"]:
            raise RuntimeError("another fit failed")

    def _pass_on(self) -> None:
        following = self.order[(self.order.index(self.name) + 1) % len(self.order)]
        with self.state["changed"]:
            self.state["turn"] = following
            self.state["changed"].notify_all()

    def _begin(self, module: Any) -> None:
        _synchronize(module)
        self.started = time.perf_counter(), time.thread_time()

    def _end(self, module: Any) -> None:
        _synchronize(module)
        now = time.perf_counter(), time.thread_time()
        self.spent = [s + b - a for s, a, b in zip(self.spent, self.started, now, strict=True)]

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Begin when it is this fit's turn."""
        self._wait()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin to measure."""
        self.spent = [0.0, 0.0]
        self._begin(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let another fit run some batches."""
        if (batch_idx + 1) % self.batches == 0:
            self._end(pl_module)
            self._pass_on()
            self._wait()
            self._begin(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take the time, and let another fit end its epoch."""
        self._end(pl_module)
        self.state["seconds"][self.name].append(tuple(self.spent))
        self._pass_on()
        self._wait()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leave the rest to the others."""
        self._pass_on()


def _synchronize(module: pl.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize()


def measure(setting: str, k: int, scheme: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time paired epochs of a setting."""
    build, loss, data, batch_size = SETTINGS[setting]
    torch.manual_seed(0)
    batches = options.batches or BATCHES[setting]
    dataset = data(batches)
    names = ["plain", "collected"]
    state: dict[str, Any] = {
        "changed": threading.Condition(),
        "turn": "plain",
        "seconds": {name: [] for name in names},
        "failures": [],
    }

    def fit(name: str, folder: str) -> None:
        try:
            torch.manual_seed(0)
            module = Module(build(), loss)
            # The collector's epoch end lies before that of the turns, so that it is measured.
            callbacks: list[Any] = [Turns(name, names, state, -(-batches // TURNS))]
            if name == "collected":
                collector = GradientCollector(folder, proj_dim=k, proj_type=scheme, mode="training")
                callbacks.insert(0, collector)
            pl.Trainer(
                max_epochs=options.epochs + 1,
                accelerator="gpu" if options.device != "cpu" else "cpu",
                devices=1,
                precision=options.precision,
                logger=False,
                callbacks=callbacks,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(module, DataLoader(dataset, batch_size, shuffle=True))
        except BaseException as error:
            with state["changed"]:
                state["failures"].append(error)
                state["changed"].notify_all()
            raise

    with tempfile.TemporaryDirectory() as folder:
        threads = [threading.Thread(target=fit, args=(name, folder)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if state["failures"]:
        raise state["failures"][0]
    plain, collected = (state["seconds"][name][1:] for name in names)
    wall, cpu = (
        [ours[i] / theirs[i] for ours, theirs in zip(collected, plain, strict=True)] for i in (0, 1)
    )
    return {
        "setting": setting,
        "scheme": scheme,
        "k": k,
        "plain_seconds": statistics.median(seconds for seconds, _ in plain),
        "collected_seconds": statistics.median(seconds for seconds, _ in collected),
        **spread(wall, cpu),
        "epochs": len(wall),
        "batches": batches,
        "most": MOST,
    }


def main() -> None:
    """Run the benchmark."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--k", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--schemes", nargs="+", default=["dropout"])
    parser.add_argument("--epochs", type=int, default=5, help="pairs that count")
    parser.add_argument("--batches", type=int, help="in an epoch, when not the default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "training_mode.json"
    )
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    print(
        f"{'setting':14} {'scheme':14} {'k':>6} {'plain s':>9} {'ratio':>7} {'from':>7} {'to':>7} "
        f"{'processor':>9}"
    )
    for setting in options.settings:
        for scheme in options.schemes:
            for k in options.k:
                row = measure(setting, k, scheme, options)
                rows.append(row)
                print(
                    f"{setting:14} {scheme:14} {k:6} {row['plain_seconds']:9.2f} "
                    f"{row['ratio']:7.3f} {row['lowest']:7.3f} {row['highest']:7.3f} "
                    f"{row['cpu_ratio']:9.3f}",
                    flush=True,
                )
    machine = {
        "device": options.device,
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
