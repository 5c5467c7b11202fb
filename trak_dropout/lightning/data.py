"""The samples that become rows of the store, in an order that never changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from trak_dropout.collation import TRIED, ReorderingError, check_collation
from trak_dropout.reading import batch_size_of, inner_sampler, sequential_loader, spaced

# A larger batch costs less for each sample, until it no longer fits a processor's cache.
_MOST_SAMPLES = 256
_MOST_BYTES = 8 << 20
_LEAST_BATCHES = 16  # so that processes have their share, and an interruption costs little


class TrainingData:
    """A loader's samples in the order of its data set, in batches that are always the same.

    A batch holds the same samples whatever process reads it and wherever a pass begins, and what
    is random in a sample depends on the seed and its index alone. So a row is the same to the bit
    in one process and in many, and after an interruption. (Of a data set with ``__getitems__``,
    and of an iterable one, random numbers start anew for each batch.)

    Args:
        loader: the loader whose data set, collation and workers to use.
        seed: what random augmentations start from.
        batch_size: samples in a batch; that of the loader when None.
        size: the number of samples of an iterable data set without ``__len__``.
        indices: which samples to take, in this order; all when None.
        at_once: how many of such batches may be joined, as `comfortable` says.

    Raises:
        MisconfigurationException: the samples have no known order or number.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        batch_size: int | None = None,
        size: int | None = None,
        indices: Sequence[int] | None = None,
        at_once: int = 1,
    ) -> None:
        try:
            sequential_loader(loader)  # checks that it can be read in order
        except ValueError as error:
            raise MisconfigurationException(f"GradientCollector: {error}") from error
        self.loader, self.seed = loader, seed
        self.batch_size = batch_size or batch_size_of(loader)
        self.at_once = max(1, min(at_once, _MOST_SAMPLES // self.batch_size))
        self.is_stream = isinstance(loader.dataset, IterableDataset)
        held = len(loader.dataset) if isinstance(loader.dataset, Sized) else size
        if held is None or (not self.is_stream and not isinstance(loader.dataset, Sized)):
            raise MisconfigurationException(
                "GradientCollector needs a training dataset with a length and an order, got "
                f"{type(loader.dataset).__name__}; give it __len__, or say how many samples an "
                "IterableDataset has with train_set_size"
            )
        if size is not None and size != held:
            raise MisconfigurationException(
                f"GradientCollector: train_set_size={size} was given, but the training dataset "
                f"has {held} samples"
            )
        self._samples = _chosen(loader.dataset, held, indices, self.is_stream)
        self.size = held if indices is None else len(indices)
        if self.size == 0:
            raise MisconfigurationException("GradientCollector: the training dataset is empty")

    def comfortable(self, bytes_per_sample: float) -> int:
        """Return how many of the loader's batches are best taken at once.

        Args:
            bytes_per_sample: of a sample, and of what layers return for it.
        """
        if self.is_stream:
            return 1
        most = min(_MOST_SAMPLES, _MOST_BYTES // max(bytes_per_sample, 1.0))
        most = min(most, self.size // _LEAST_BATCHES)
        return max(1, int(most // self.batch_size))

    def unfinished(self, done: NDArray[np.bool_]) -> list[int]:
        """Return the numbers of the batches that hold a sample which is not done.

        Args:
            done: which samples are, ``(size,)``.
        """
        starts = np.arange(0, self.size, self.batch_size)
        return np.flatnonzero(np.logical_and.reduceat(done, starts) == 0).tolist()

    def shares(self, batches: Sequence[int], count: int) -> list[list[int]]:
        """Divide batches among processes, with all others that may be joined with one of them.

        So a row is the same to the bit wherever a pass begins, and in any number of processes.

        Args:
            batches: their numbers.
            count: of processes.
        """
        groups = sorted({number // self.at_once for number in batches})
        return [self._members(part) for part in np.array_split(np.array(groups, int), count)]

    def _members(self, groups: NDArray[np.int_]) -> list[int]:
        """The batches of groups that may be joined."""
        total = -(-self.size // self.batch_size)
        spans = (range(g * self.at_once, (g + 1) * self.at_once) for g in groups.tolist())
        return [number for span in spans for number in span if number < total]

    def joined(self, batches: Iterable[tuple[int, Any]]) -> Iterator[tuple[list[int], Any]]:
        """Join neighboring batches of tensors that are alike in all but their samples.

        Each has been collated and prepared by itself, so that a sample is what it is without this.

        Args:
            batches: numbers, and what they hold.

        Yields:
            Numbers, and what these batches hold together.
        """
        waiting: list[tuple[int, Any]] = []
        for number, batch in batches:
            if waiting and not self._alike(waiting[0], (number, batch)):
                yield _together(waiting)
                waiting = []
            waiting.append((number, batch))
            # Not only when the next one is there: it may be read with other random states.
            if (number + 1) % self.at_once == 0:
                yield _together(waiting)
                waiting = []
        if waiting:
            yield _together(waiting)

    def _alike(self, first: tuple[int, Any], second: tuple[int, Any]) -> bool:
        """Whether two batches can be joined."""
        (number, batch), (other, parts) = first, second
        if not all(isinstance(given, list | tuple) for given in (batch, parts)):
            return False
        return len(batch) == len(parts) and all(
            type(a) is type(b) is Tensor
            and a.layout == b.layout == torch.strided
            and a.ndim > 0 < b.ndim
            and (a.shape[1:], a.dtype, a.device) == (b.shape[1:], b.dtype, b.device)
            and (len(a), len(b)) == (len(self.rows(number)), len(self.rows(other)))
            for a, b in zip(batch, parts, strict=True)
        )

    def read(self, batches: Sequence[int] | None = None) -> Iterator[tuple[int, Any]]:
        """Read batches as the loader's collation makes them.

        Args:
            batches: their numbers, ascending; all when None.

        Yields:
            The number of a batch and the batch. Random states are set for it.
        """
        every = range(-(-self.size // self.batch_size))
        wanted = every if batches is None else batches
        if not wanted:
            return
        if not self.is_stream:
            groups = [range(b * self.batch_size, self._stop(b)) for b in wanted]
            for number, batch in zip(wanted, self._loader(groups), strict=False):
                set_random_states(self.seed, number)
                yield number, batch
            return
        ahead, stream = set(wanted), iter(self._loader(None))
        for number in range(wanted[-1] + 1):
            set_random_states(self.seed, number)
            batch = next(stream, None)
            if batch is None:
                return
            if number in ahead:
                set_random_states(self.seed, number)
                yield number, batch

    def some(self, count: int) -> Iterator[Any]:
        """Read about ``count`` samples, evenly spaced (of an iterable data set the first ones)."""
        if self.is_stream:
            yield from (batch for _, batch in self.read(range(-(-count // self.batch_size))))
            return
        spaced, size = self._spaced(count), self.batch_size
        yield from self._loader([spaced[i : i + size] for i in range(0, len(spaced), size)])

    def check_collation(self) -> None:
        """Try on a few samples whether collation leaves them in their order.

        Raises:
            MisconfigurationException: it does not, so that rows would be those of other samples.
        """
        if not self.is_stream and self.batch_size > 1:
            some = [self._spaced(TRIED)]
            try:
                check_collation(self.loader.collate_fn, lambda collate: self._loader(some, collate))
            except ReorderingError as error:
                raise MisconfigurationException(f"GradientCollector: {error}") from error

    def rows(self, number: int) -> range:
        """Return the rows of the store that a batch becomes."""
        return range(number * self.batch_size, self._stop(number))

    def _stop(self, number: int) -> int:
        return min(self.size, (number + 1) * self.batch_size)

    def _spaced(self, count: int) -> list[int]:
        return spaced(min(count, self.size), self.size)

    def _loader(
        self,
        groups: Sequence[Sequence[int]] | None,
        collate_fn: Callable[[Any], Any] | None = None,
    ) -> DataLoader[Any]:
        loader = self.loader
        how: dict[str, Any] = {"batch_size": self.batch_size}
        dataset: Any = self._samples
        if groups is not None:
            how = {"batch_sampler": groups}
            dataset = _Seeded(dataset, self.seed, loader.dataset)
        return DataLoader(
            dataset,
            collate_fn=collate_fn or loader.collate_fn,
            # Several workers would give a stream's samples in turns, each with batches of its own.
            num_workers=min(loader.num_workers, 1) if self.is_stream else loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            pin_memory=loader.pin_memory,
            **how,
        )


def trainers_data(trainer: pl.Trainer) -> DataLoader[Any]:
    """Return a Trainer's training loader.

    Args:
        trainer: the Trainer.

    Raises:
        MisconfigurationException: it has several or another kind of loader, or one that draws a
            part of the data set whose order nobody knows.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            "GradientCollector needs a single torch DataLoader as training loader, got "
            f"{type(loader).__name__}; give it one as dataloader="
        )
    if isinstance(_users_sampler(loader), SubsetRandomSampler):
        raise MisconfigurationException(
            "GradientCollector takes the training dataset as a whole, but the loader samples "
            "a subset of it; give the loader torch.utils.data.Subset(dataset, indices), or the "
            "collector indices="
        )
    return loader


def warn_of_untrained(trainer: pl.Trainer, loader: DataLoader[Any]) -> None:
    """Say so where the Trainer does not train on every sample of a loader's data set.

    Args:
        trainer: the Trainer.
        loader: its training loader.
    """
    if not isinstance(loader.dataset, Sized) or isinstance(loader.dataset, IterableDataset):
        return
    sampler = inner_sampler(loader)
    drawn = len(sampler) if isinstance(sampler, Sized) else len(loader.dataset)
    drawn *= getattr(sampler, "num_replicas", 1)
    if drawn < len(loader.dataset) or trainer.num_training_batches < len(loader):
        rank_zero_warn(
            f"GradientCollector collects all {len(loader.dataset)} samples of the training "
            "dataset, but the Trainer trains on fewer of them in an epoch (a sampler, "
            "limit_train_batches or overfit_batches): samples never trained on get scores, too"
        )


def set_random_states(seed: int, number: int) -> None:
    """Set the random states of Python, NumPy and torch from a seed and a number.

    Args:
        seed: the seed.
        number: not negative.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    mixed ^= mixed >> 31
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002  # for data sets that use it
    torch.default_generator.manual_seed(mixed % 2**63)  # torch.manual_seed queues calls for CUDA
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(mixed % 2**63)


def _together(batches: list[tuple[int, Any]]) -> tuple[list[int], Any]:
    numbers, held = [number for number, _ in batches], [batch for _, batch in batches]
    if len(held) == 1:
        return numbers, held[0]
    return numbers, [torch.cat(parts) for parts in zip(*held, strict=True)]


class _Seeded(Dataset[Any]):
    """A data set whose randomness depends on a seed and the index alone.

    In a worker, ``get_worker_info().dataset`` is this one: attributes are the user's data set's.

    Args:
        dataset: the samples to read.
        seed: the seed.
        users: the data set that the user knows, of which they may be a part.
    """

    def __init__(self, dataset: Any, seed: int, users: Any) -> None:
        self.__dict__.update(_Seeded__dataset=dataset, _Seeded__seed=seed, _Seeded__users=users)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_Seeded__") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # such as what pickle looks for
        return getattr(self.__users, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__users, name, value)

    def __len__(self) -> int:
        return len(self.__users)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        set_random_states(self.__seed, indices[0])
        inner = _without_subsets(self.__dataset)
        if callable(getattr(inner, "__getitems__", None)):
            return self.__dataset.__getitems__(list(indices))
        if type(inner) is TensorDataset:  # nothing is random in it
            return [self.__dataset[index] for index in indices]
        samples = []
        for index in indices:
            set_random_states(self.__seed, index)
            samples.append(self.__dataset[index])
        return samples

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]


def _without_subsets(dataset: Any) -> Any:
    """The data set that has the samples; `Subset` only passes on."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _chosen(dataset: Any, held: int, indices: Sequence[int] | None, is_stream: bool) -> Any:
    if indices is None:
        return dataset
    if is_stream:
        raise MisconfigurationException(
            "GradientCollector: indices were given, but an IterableDataset has none"
        )
    outside = [i for i in indices if not 0 <= i < held]
    if outside:
        raise MisconfigurationException(
            f"GradientCollector: indices {outside[:5]} are outside of the training dataset, which "
            f"has {held} samples"
        )
    return Subset(dataset, indices)


def _users_sampler(loader: DataLoader[Any]) -> Any:
    """Return the sampler that the user gave, also where Lightning put a distributed one around."""
    sampler = inner_sampler(loader)
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
