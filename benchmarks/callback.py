"""What a collection of the callback costs, beside a plain pass and in memory.

An MLP and ResNet-9 on Fashion-MNIST and a GPT-NeoX language model on source code are trained by a
Trainer, for a few steps at a time. After them, in turn, it (a) runs forward and backward over the
data as training steps do, without the optimizer, and (b) collects, for each projection: a pass over
the same data, in batches of the collector's choice, that writes compressed gradients and weights.
Ratios are medians over rounds, by the clock and by the process's processor time. Memory is the peak
of what a training process holds, with the collector (at its defaults) and without, each in a
process of its own.

    python benchmarks/callback.py            # about half an hour on 2 cores
    python benchmarks/callback.py --quick    # the MLP, few samples

Writes benchmarks/results/callback.json. The aim is at most 1.0 (0.85 for the language
model), memory at most 1.15.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _data
import _models
import pytorch_lightning as pl
import torch
from _measure import Measured, freed_memory_given_back, keep_freed_memory, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trak_dropout import CausalLMOutput
from trak_dropout.lightning import GradientCollector
from trak_dropout.masks import DEFAULT_FOLD

RESULTS = Path(__file__).parent / "results"
LENGTH = 64
DEFAULT = f"fold {DEFAULT_FOLD}"
PROJECTIONS: dict[str, tuple[str, int]] = {
    "fold 1": ("dropout", 1),
    "fold 8": ("dropout", 8),
    DEFAULT: ("dropout", DEFAULT_FOLD),
    "weighted, fold 1": ("weighted_dropout", 1),
}


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
    return TensorDataset(pixels[:count].clone(), labels[:count].clone())


def text(count: int) -> TensorDataset:
    """Sequences of characters of Python's standard library."""
    characters = _data.source_text("Python", count * LENGTH)
    codes = torch.tensor([min(ord(c), 127) for c in characters])
    return TensorDataset(codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH))


SETTINGS = {
    "MLP": Setting(
        lambda: _models.mlp(784, 1024, 1000, 64, 10),
        images, "image_classification", 12_800, 64, 1.0,
    ),
    "ResNet-9": Setting(
        lambda: _models.ResNet9(1), images, "image_classification", 960, 32, 1.0,
    ),
    "language model": Setting(
        _models.neox(320, 8, 8, 512, LENGTH), text, CausalLMOutput(), 320, 16, 0.85,
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


Times = tuple[float, float]
"""Seconds by the clock, and of the process's processor time."""


class Clock:
    """The time that a block takes."""

    def __enter__(self) -> Clock:
        """Begin."""
        self.begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self.spent: Times = (
            time.perf_counter() - self.begun[0],
            time.process_time() - self.begun[1],
        )


class Rounds(pl.Callback):
    """After the steps of an epoch, a plain pass and a collection, timed.

    Args:
        loader: what the plain pass runs over.
        collector: what collects.
    """

    def __init__(self, loader: DataLoader, collector: Collector) -> None:
        self.loader, self.collector = loader, collector
        self.plain: list[Times] = []
        self.collected: list[Times] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Module) -> None:
        """Run them; weights, gradients and running statistics are as before."""
        held = {name: t.clone() for name, t in pl_module.named_buffers()}
        with Clock() as clock:
            for batch in self.loader:
                pl_module.training_step(batch, 0).backward()
                pl_module.zero_grad()
        self.plain.append(clock.spent)
        for name, t in pl_module.named_buffers():
            t.copy_(held[name])
        with Clock() as clock:
            self.collector.collect_now(trainer, pl_module)
        self.collected.append(clock.spent)


class Collector(GradientCollector):
    """A collector that collects when it is told to."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait."""

    def collect_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect as at the end of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)


def fit(
    name: str, data: TensorDataset, epochs: int, steps: int | None, callbacks: list[Any]
) -> Any:
    """Train with callbacks; returns the module."""
    setting = SETTINGS[name]
    torch.manual_seed(0)
    module = Module(setting.model(), isinstance(setting.task, CausalLMOutput))
    pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_train_batches=steps,
    ).fit(module, DataLoader(data, setting.batch_size, shuffle=True))  # fmt: skip
    return module


def timed(name: str, samples: int, rounds: int, k: int, projection: str, store: Path) -> Any:
    """Time plain passes and collections in turn."""
    setting, (scheme, fold) = SETTINGS[name], PROJECTIONS[projection]
    data = setting.data(samples)
    collector = Collector(
        store / projection, setting.task, k, proj_type=scheme, fold=fold, model="net"
    )
    watch = Rounds(DataLoader(data, setting.batch_size), collector)
    # The first collection pays for what is set up once: hooks, masks, checks.
    module = fit(name, data, rounds + 1, 4, [collector, watch])
    parameters = sum(p.numel() for p in module.parameters())
    return watch.plain, watch.collected, parameters, len(data)


def memory(name: str, samples: int, k: int, collecting: bool, store: Path) -> float:
    """Megabytes that training holds at its peak, with collections or without."""
    setting = SETTINGS[name]
    collectors = [GradientCollector(store, setting.task, k, model="net")] if collecting else []
    data = setting.data(samples)
    with Measured() as measured:  # reading the data may have taken more
        fit(name, data, 2, None, collectors)
    return measured.before + measured.megabytes


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def measure(
    name: str, samples: int, processes: int, rounds: int, k: int, chosen: list[str]
) -> list[dict[str, Any]]:
    """Measure a setting: a row for each projection."""
    # Each in processes and folders of its own, as in use: beside another's collections, or while
    # the system still writes out theirs, the same ones took up to a fifth longer. In turns and more
    # than once, because from process to process, and from minute to minute, all rounds differ.
    timings: dict[str, list[Any]] = {projection: [] for projection in chosen}
    for _ in range(processes):
        for projection in chosen:
            with tempfile.TemporaryDirectory() as scratch:
                timings[projection].append(
                    apart(timed, name, samples, rounds, k, projection, Path(scratch))
                )
    with tempfile.TemporaryDirectory() as scratch, freed_memory_given_back():
        without = apart(memory, name, samples, k, False, Path(scratch))
        held = apart(memory, name, samples, k, True, Path(scratch) / "memory")
    peaks = {
        "peak_mb_without": without,
        "peak_mb_with": held,
        "memory_ratio": held / without,
        "most_memory": 1.15,
    }
    rows = []
    for projection in chosen:
        plains, collections, parameters, count = timings[projection][0]
        first = collections[0][0] / plains[0][0]
        plain = [times for run in timings[projection] for times in run[0][1:]]
        collected = [times for run in timings[projection] for times in run[1][1:]]
        wall, cpu = ([c[i] / p[i] for c, p in zip(collected, plain, strict=True)] for i in (0, 1))
        rows.append(
            {
                "setting": name,
                "projection": projection,
                "parameters": parameters,
                "samples": count,
                "proj_dim": k,
                "plain_seconds": statistics.median(seconds for seconds, _ in plain),
                "collect_seconds": statistics.median(s for s, _ in collected),
                "first": first,
                **spread(wall, cpu),
                "most": SETTINGS[name].most,
                **(peaks if projection == DEFAULT else {}),
            }
        )
    return rows


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--proj-dim", type=int, default=2048)
    parser.add_argument(
        "--projections", nargs="+", choices=list(PROJECTIONS), default=list(PROJECTIONS)
    )
    parser.add_argument("--rounds", type=int, default=3, help="that count, in each process")
    parser.add_argument("--processes", type=int, default=3, help="for each projection")
    parser.add_argument("--quick", action="store_true", help="the MLP, few samples")
    parser.add_argument("--out", type=Path, default=RESULTS / "callback.json")
    options = parser.parse_args()
    keep_freed_memory()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = []
    print(
        "setting          projection       of a plain pass   from     to  processor  at most"
        "   memory  at most"
    )
    for name in ["MLP"] if options.quick else options.settings:
        samples = 1000 if options.quick else SETTINGS[name].samples
        processes, rounds = (1, 2) if options.quick else (options.processes, options.rounds)
        for row in measure(name, samples, processes, rounds, options.proj_dim, options.projections):
            rows.append(row)
            print(
                f"{name:<16} {row['projection']:<16} {row['ratio']:>17.2f} {row['lowest']:>6.2f} "
                f"{row['highest']:>6.2f} {row['cpu_ratio']:>10.2f} {row['most']:>8.2f} "
                + "".join(
                    f"{row[key]:>9.2f}" for key in ("memory_ratio", "most_memory") if key in row
                ),
                flush=True,
            )
    if not options.quick:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        options.out.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
