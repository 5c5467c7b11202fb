"""Which samples of the data set each training batch holds.

A data loader's batch sampler runs in the training process, whatever workers there are, and batches
come out in the order of the lists of indices that it yields. So listening to it tells the indices
of every batch while the data set, the collation, the workers and the batches stay as they are, and
no random number is drawn. (Wrapping the data set would change what ``collate_fn`` and the module
are given.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from torch.utils.data import DataLoader, Sampler


class Pass(Iterator[Any]):
    """One pass over a batch sampler, which remembers what it has yielded.

    Args:
        batches: what the sampler yields.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._told: list[NDArray[np.int64]] = []

    def __next__(self) -> Any:
        indices = next(self._batches)
        try:
            # A copy, because a sampler may yield the same buffer again.
            self._told.append(np.array(indices, dtype=np.int64).reshape(-1))
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(
                "GradientCollector(mode='training') needs a batch sampler that yields lists of "
                f"indices, got {indices!r}"
            ) from error
        return indices

    def indices(self, number: int) -> NDArray[np.int64]:
        """Return the indices of a batch, counted from the beginning of the pass.

        Raises:
            MisconfigurationException: no such batch has been drawn.
        """
        if number >= len(self._told):
            raise MisconfigurationException(
                f"GradientCollector(mode='training'): batch {number} of the pass over the training "
                f"loader came although its batch sampler has yielded {len(self._told)} only, so "
                "its samples are unknown; what iterates over the training loader besides the "
                "Trainer?"
            )
        return self._told[number]


class RecordingBatchSampler(Sampler[Any]):
    """A batch sampler in front of another, which yields what that one yields and remembers it.

    Args:
        inner: the other.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        # Begun at once, as by the loader itself: random numbers may be drawn here.
        return Pass(iter(self.inner))

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


class Listener:
    """Listens to the batch samplers of a Trainer's loaders from when they are ready.

    Loaders are ready, and the first epoch's iterator is made, before any training hook runs; the
    strategy's ``process_dataloader`` is the last thing that sees them before.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer, self._strategy = trainer, trainer.strategy
        self._process = trainer.strategy.process_dataloader
        self._loaders: list[Any] = []
        self._active = True
        trainer.strategy.process_dataloader = self._ready  # type: ignore[method-assign,assignment]

    def _ready(self, loader: object) -> object:
        loader = self._process(loader)
        if not (self._active and self._trainer.training and isinstance(loader, DataLoader)):
            return loader
        if loader.batch_sampler is not None:
            if not isinstance(loader.batch_sampler, RecordingBatchSampler):
                _replace(loader, RecordingBatchSampler(loader.batch_sampler))
            self._loaders.append(loader)
        return loader

    def stop(self) -> None:
        """Leave the strategy and the loaders as they were found; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        if self._strategy.__dict__.get("process_dataloader") == self._ready:
            del self._strategy.__dict__["process_dataloader"]
            before: Any = self._process
            while isinstance(owner := getattr(before, "__self__", None), Listener):
                if owner._active:
                    self._strategy.process_dataloader = before  # type: ignore[method-assign]
                    break
                before = owner._process
        for loader in self._loaders:
            if isinstance(loader.batch_sampler, RecordingBatchSampler):
                _replace(loader, loader.batch_sampler.inner)
        self._loaders = []


def _replace(loader: DataLoader[Any], batch_sampler: Any) -> None:
    # Assigning is forbidden once a loader is made, because its other settings would not follow.
    loader.__dict__["batch_sampler"] = batch_sampler


def check_loader(loader: Any) -> None:
    """Refuse a training loader that cannot be listened to.

    Args:
        loader: the loader.

    Raises:
        MisconfigurationException: it is of such a kind.
    """
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            "GradientCollector needs a single torch DataLoader as training loader, got "
            f"{type(loader).__name__}"
        )
    if not isinstance(loader.batch_sampler, RecordingBatchSampler):
        raise MisconfigurationException(
            "GradientCollector(mode='training') needs a loader that batches samples itself "
            "(batch_size must not be None), to know which samples a batch holds"
        )
    if type(loader).__iter__ is not DataLoader.__iter__ or not getattr(loader, "in_order", True):
        raise MisconfigurationException(
            "GradientCollector(mode='training') needs batches in the order in which the sampler "
            f"draws them, which {type(loader).__name__} does not promise (in_order=False, or an "
            "__iter__ of its own)"
        )


def pass_in_use(trainer: pl.Trainer) -> Pass:
    """Return the pass over the training loader that the Trainer's batches come from.

    Not the one that was begun last: others may look into the loader, too.

    Args:
        trainer: the Trainer, in a training epoch.

    Raises:
        MisconfigurationException: its loader cannot be listened to.
    """
    check_loader(trainer.train_dataloader)
    fetcher: Any = trainer.fit_loop._data_fetcher
    (iterator,) = fetcher.combined_loader._iterator.iterators
    found = getattr(iterator, "_sampler_iter", None)
    if not isinstance(found, Pass):
        raise MisconfigurationException(
            "GradientCollector(mode='training') cannot see which samples a batch of a "
            f"{type(iterator).__name__} holds; use mode='checkpoint'"
        )
    return found
