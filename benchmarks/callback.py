"""What a collection of the callback costs, beside a plain pass and in memory.

An MLP and ResNet-9 on Fashion-MNIST and a GPT-NeoX language model on source code are trained by a
Trainer. After each epoch, in turn, it (a) runs forward and backward over the training data as a
training step does, without the optimizer, and (b) collects: a pass over the same data in the same
batches that writes compressed gradients and weights. Ratios are medians over epochs. Memory is the
peak of what a training process holds, with the collector and without, each in a process of its own.

    python benchmarks/callback.py            # about half an hour on 2 cores
    python benchmarks/callback.py --quick    # the MLP, few samples

Writes benchmarks/results/callback.json. The aim is at most 1.0 (0.85 for the language
model), memory at most 1.15.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _data
import _models
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trak_dropout import CausalLMOutput
from trak_dropout.lightning import GradientCollector

RESULTS = Path(__file__).parent / "results"
LENGTH = 64


@dataclass(frozen=True)
class Setting:
    """A model, its data and its task."""

    model: Callable[[], nn.Module]
    data: Callable[[int], TensorDataset]
    task: Any
    samples: int
    batch_size: int
    most: float  # what the collection may cost, in plain passes


def images(count: int) -> TensorDataset:
    """Fashion-MNIST."""
    pixels, labels = _data.fashion_mnist(Path("/usr/share/datasets/fashion-mnist"), "train")
    return TensorDataset(pixels[:count], labels[:count])


def text(count: int) -> TensorDataset:
    """Sequences of characters of Python's standard library."""
    characters = _data.source_text("Python", count * LENGTH)
    codes = torch.tensor([min(ord(c), 127) for c in characters])
    return TensorDataset(codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH))


SETTINGS = {
    "MLP": Setting(
        lambda: _models.mlp(784, 1024, 1000, 64, 10),
        images, "image_classification", 6000, 64, 1.0,
    ),
    "ResNet-9": Setting(
        lambda: _models.ResNet9(1, 16), images, "image_classification", 1000, 50, 1.0,
    ),
    "language model": Setting(
        _models.neox(256, 4, 8, 128, LENGTH), text, CausalLMOutput(), 1200, 16, 0.85,
    ),
}  # fmt: skip


class Module(pl.LightningModule):
    """A network with its loss.

    Args:
        net: the network.
        causal: whether it is a language model.
    """

    def __init__(self, net: nn.Module, causal: bool) -> None:
        super().__init__()
        self.net = net
        self.causal = causal

    def forward(self, *inputs: Tensor) -> Any:
        """Call the network."""
        return self.net(*inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        if not self.causal:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        logits = self.net(input_ids=batch[0], use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 1e-4)


class PlainPass(pl.Callback):
    """Times forward and backward over the training data, after each epoch."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.seconds: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Module) -> None:
        """Run it; weights, gradients and running statistics are as before."""
        held = {name: t.clone() for name, t in pl_module.named_buffers()}
        begun = time.perf_counter()
        for batch in self.loader:
            pl_module.training_step(batch, 0).backward()
            pl_module.zero_grad()
        self.seconds.append(time.perf_counter() - begun)
        for name, t in pl_module.named_buffers():
            t.copy_(held[name])


class Timed(GradientCollector):
    """A collector that keeps how long each collection took."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect."""
        begun = time.perf_counter()
        super().on_train_epoch_end(trainer, pl_module)
        self.taken = [*getattr(self, "taken", []), time.perf_counter() - begun]


def fit(
    name: str, samples: int, epochs: int, proj_dim: int, collect: bool, plain: bool, store: Path
) -> dict[str, Any]:
    """Train with what is asked for; returns the seconds of each pass and the peak memory."""
    setting = SETTINGS[name]
    torch.manual_seed(0)
    data = setting.data(samples)
    causal = isinstance(setting.task, CausalLMOutput)
    module = Module(setting.model(), causal)
    callbacks: list[pl.Callback] = []
    ordered = DataLoader(data, setting.batch_size)
    pass_, collector = PlainPass(ordered), Timed(
        store, task=setting.task, proj_dim=proj_dim, model="net"
    )  # fmt: skip
    callbacks += [pass_] if plain else []
    callbacks += [collector] if collect else []
    pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(data, setting.batch_size, shuffle=True))  # fmt: skip
    shutil.rmtree(store, ignore_errors=True)
    return {
        "plain": pass_.seconds,
        "collect": getattr(collector, "taken", []),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "samples": len(data),
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def apart(*arguments: Any) -> dict[str, Any]:
    """Run `fit` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(fit, arguments)


def measure(name: str, samples: int, epochs: int, proj_dim: int) -> dict[str, Any]:
    """Measure a setting."""
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        timed = apart(name, samples, epochs + 1, proj_dim, True, True, store)
        memory = [
            apart(name, samples, 2, proj_dim, collect, False, store)["peak_mb"]
            for collect in (False, True)
        ]
    # The first epoch pays for what is set up once: hooks, masks, checks.
    ratios = [c / p for c, p in zip(timed["collect"][1:], timed["plain"][1:], strict=True)]
    return {
        "setting": name,
        "parameters": timed["parameters"],
        "samples": timed["samples"],
        "proj_dim": proj_dim,
        "plain_seconds": statistics.median(timed["plain"][1:]),
        "collect_seconds": statistics.median(timed["collect"][1:]),
        "first_collect_seconds": timed["collect"][0],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "most": SETTINGS[name].most,
        "peak_mb_without": memory[0],
        "peak_mb_with": memory[1],
        "memory_ratio": memory[1] / memory[0],
    }


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--proj-dim", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the MLP, few samples")
    parser.add_argument("--out", type=Path, default=RESULTS / "callback.json")
    options = parser.parse_args()
    rows = []
    print("setting          collection / plain pass   at most   memory with / without   at most")
    for name in ["MLP"] if options.quick else options.settings:
        samples = 1000 if options.quick else SETTINGS[name].samples
        row = measure(name, samples, 2 if options.quick else options.epochs, options.proj_dim)
        rows.append(row)
        print(
            f"{name:<16} {row['ratio']:>23.2f} {row['most']:>9.2f} {row['memory_ratio']:>23.2f} "
            f"{1.15:>9.2f}",
            flush=True,
        )
    if not options.quick:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        options.out.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
