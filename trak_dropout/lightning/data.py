"""The training data of a Trainer, in the order of its data set."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from trak_dropout.attribution import inner_sampler, sequential_loader


def training_data(trainer: pl.Trainer, batch_size: int | None) -> tuple[DataLoader[Any], int]:
    """Return the training loader, rebuilt in data-set order, and the number of samples.

    Args:
        trainer: the Trainer whose loader it is.
        batch_size: samples in a batch; that of the loader when None.

    Raises:
        MisconfigurationException: the loader's samples have no known order or number.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            "GradientCollector needs a single torch DataLoader as training loader, got "
            f"{type(loader).__name__}"
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise MisconfigurationException(
            f"GradientCollector needs a training dataset with a length and an order, got "
            f"{type(dataset).__name__}; wrap it in a map-style dataset with __len__"
        )
    if len(dataset) == 0:
        raise MisconfigurationException("GradientCollector: the training dataset is empty")
    sampler = inner_sampler(loader)
    if isinstance(sampler, SubsetRandomSampler):
        raise MisconfigurationException(
            "GradientCollector takes the training dataset as a whole, but the loader samples "
            "a subset of it; give the loader torch.utils.data.Subset(dataset, indices)"
        )
    drawn = len(sampler) if isinstance(sampler, Sized) else len(dataset)
    if drawn < len(dataset) or trainer.num_training_batches < len(loader):
        rank_zero_warn(
            f"GradientCollector collects all {len(dataset)} samples of the training dataset, "
            "but the Trainer trains on fewer of them in an epoch (a sampler, "
            "limit_train_batches or overfit_batches): samples never trained on get scores, too"
        )
    try:
        return sequential_loader(loader, batch_size), len(dataset)
    except ValueError as error:
        raise MisconfigurationException(f"GradientCollector: {error}") from error
