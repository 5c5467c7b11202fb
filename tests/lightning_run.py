"""A training run with a collector as a script, to be started in several processes or killed.

Everything random in it follows from the epoch, so that a resumed run passes the same weights.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from cases import Classifier, convnet, loader, train_set, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import distributed
from torch.utils.data import Dataset, RandomSampler

from trak_dropout.lightning import GradientCollector


class Epochwise(Classifier):
    """A network with dropout and batch norm whose random numbers start anew in each epoch."""

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.current_epoch)


class Noisy(Dataset):
    """Digits with noise from the global random state."""

    def __init__(self, n: int) -> None:
        self.samples = train_set(n)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        image, label = self.samples[index]
        return image + 0.1 * torch.randn(image.shape), label


class Kill(pl.Callback):
    """Kills a process in the middle of a collection."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        original, rank = pl_module.on_after_batch_transfer, self.rank

        def hook(batch: Any, dataloader_idx: int) -> Any:
            begun = trainer.fit_loop.total_batch_idx >= 0
            if begun and not pl_module.training and trainer.global_rank == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(batch, dataloader_idx)

        pl_module.on_after_batch_transfer = hook  # type: ignore[method-assign]


@atexit.register
def leave() -> None:
    """End the process group: spawned processes now and then abort at exit with one that is open."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def run(
    out: str,
    n: int = 103,
    collect: bool = True,
    kill_rank: int | None = None,
    sampler: bool = False,
    resume: bool = False,
    save: bool = False,
    collector: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Epochwise(convnet())
    data = Noisy(n)
    how = {"sampler": RandomSampler(data)} if sampler else {"shuffle": True}
    callbacks: list[pl.Callback] = []
    if collect:
        settings = {"proj_dim": 16, "batch_size": 10, **(collector or {})}
        callbacks.append(GradientCollector(Path(out) / "store", **settings))
    if kill_rank is not None:
        callbacks.append(Kill(kill_rank))
    if save:
        callbacks.append(ModelCheckpoint(Path(out) / "ckpt", save_last=True))
    runner = trainer(callbacks=callbacks, enable_checkpointing=save, **options)
    last = Path(out) / "ckpt" / "last.ckpt"
    path = last if resume and last.is_file() else None
    runner.fit(module, loader(data, 10, **how), ckpt_path=path)
    if runner.is_global_zero:
        torch.save(module.state_dict(), Path(out) / "weights.pt")


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
