"""Samples of a loader's data set, read as the loader reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch.utils.data import DataLoader


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
