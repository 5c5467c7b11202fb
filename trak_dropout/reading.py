"""Samples of a loader's data set, read as the loader reads them, in the data set's order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trak_dropout._random import random_states_kept
from trak_dropout.collation import TRIED, ReorderingError, check_collation

_LOG = logging.getLogger(__name__)


def in_dataset_order(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader over the same data that does not shuffle.

    Args:
        loader: a ``DataLoader``, or any iterable of batches.

    Returns:
        Batches in data-set order where it is a ``DataLoader`` that shuffles, else the loader.

    Raises:
        ReorderingError: its ``collate_fn`` puts samples in an order of its own.
        ValueError: it draws random samples, so that nobody could tell which came in which order.
    """
    if not isinstance(loader, DataLoader):
        return loader
    check_order_known(loader)
    check_order_kept(loader)
    shuffles = isinstance(inner_sampler(loader), RandomSampler)
    return sequential_loader(loader) if shuffles else loader


def inner_sampler(loader: DataLoader[Any]) -> Any:
    """Return the sampler that draws single samples, also where a batch sampler holds it."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def sequential_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader over a loader's data set, in its order.

    Args:
        loader: the loader whose data set, collation and workers to use.

    Returns:
        The loader.

    Raises:
        ValueError: the loader does not batch, or has an ``__iter__`` of its own.
    """
    if loader.batch_sampler is None:
        raise ValueError(
            "the loader does not batch (batch_size=None), so its data set's items are batches "
            "and have no order of samples; use a data set of samples"
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"the loader's class {type(loader).__name__} has an __iter__ of its own, which a pass "
            "in data-set order would leave out; move what it does into collate_fn or into the "
            "module's on_after_batch_transfer"
        )
    return DataLoader(
        loader.dataset,
        batch_size=batch_size_of(loader),
        shuffle=False,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Return how many samples a loader puts into a batch, 32 if its batch sampler does not tell."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32


def check_order_known(loader: DataLoader[Any]) -> None:
    """Refuse a loader that draws samples in an order that nobody knows afterwards.

    Args:
        loader: the loader.

    Raises:
        ValueError: it does.
    """
    sampler = inner_sampler(loader)
    if isinstance(sampler, SubsetRandomSampler | WeightedRandomSampler):
        raise ValueError(
            f"loader draws its samples with a {type(sampler).__name__}, so their order is unknown; "
            "give a loader over torch.utils.data.Subset(dataset, indices) without a sampler"
        )


def check_order_kept(loader: Any) -> None:
    """Refuse a loader whose collation puts samples in an order of its own, if that can be told.

    A few samples of its data set are read for that; random states are as before.

    Args:
        loader: a ``DataLoader``; of anything else nothing can be told.

    Raises:
        ReorderingError: it does.
    """
    if (
        not isinstance(loader, DataLoader)
        or loader.batch_sampler is None
        or loader.batch_size == 1
        or isinstance(loader.dataset, IterableDataset)
        or type(loader).__iter__ is not DataLoader.__iter__
    ):
        return

    def read(collate: Callable[[Any], Any]) -> Iterable[bool]:
        held = len(loader.dataset)  # type: ignore[arg-type]
        return read_groups(loader, [spaced(min(TRIED, held), held)], collate)

    try:
        with random_states_kept():
            check_collation(loader.collate_fn, read)
    except ReorderingError:
        raise
    except Exception as error:  # in samples that nobody may ever read
        _LOG.info("whether collate_fn keeps the order of samples could not be told: %s", error)


def spaced(count: int, size: int) -> list[int]:
    """Return indices of samples from all over a data set of that size."""
    return np.linspace(0, size - 1, count).astype(int).tolist()


def read_groups(
    loader: Any, groups: Iterable[list[int]], collate_fn: Callable[[Any], Any]
) -> Iterable[Any]:
    """Read samples, given by their indices, into batches.

    Where the loader has workers, in a worker: a data set may open its files, or begin to count,
    when it is read first, and be forked after that.

    Args:
        loader: the loader.
        groups: the indices of each batch.
        collate_fn: makes a batch of samples.
    """
    return DataLoader(
        loader.dataset,
        batch_sampler=groups,
        collate_fn=collate_fn,
        num_workers=min(1, loader.num_workers),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
