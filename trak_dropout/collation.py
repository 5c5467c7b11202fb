"""Whether a collation leaves samples in the order in which it is given them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import default_collate

from trak_dropout._random import random_states_kept

TRIED = 16  # samples


class ReorderingError(ValueError):
    """A collation puts samples in an order of its own."""


def check_collation(
    collate_fn: Callable[[Any], Any], read: Callable[[Callable[[Any], Any]], Iterable[bool]]
) -> None:
    """Refuse a collation that puts samples in an order of its own, if that can be told.

    Args:
        collate_fn: the collation.
        read: reads `TRIED` samples, collated by what it is given.

    Raises:
        ReorderingError: what is computed for a sample would be taken for another's.
    """
    if collate_fn is not default_collate and any(read(Reorders(collate_fn))):
        name = getattr(collate_fn, "__qualname__", type(collate_fn).__qualname__)
        raise ReorderingError(
            f"collate_fn ({name}) reorders samples, so that what belongs to one would be taken for "
            "another's: samples given in reverse order do not come out in reverse order. "
            "Sort within the model instead (enforce_sorted=False of pack_padded_sequence does), or "
            "give a loader whose collate_fn keeps their order"
        )


class Reorders:
    """A collation that tells of another one whether it puts samples in an order of its own.

    Nothing is concluded where the other one fails on these samples, is random in its own way, or
    returns no tensor with a row for each sample.

    Args:
        collate_fn: the other one; it is given copies of the samples.
    """

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self._collate = collate_fn

    def __call__(self, samples: Sequence[Any]) -> bool:
        """Collate samples as they are, in reverse order, and the first one several times."""
        count = len(samples)
        try:
            given, again = self._tensors(samples), self._tensors(samples)
            back, same = self._tensors(samples[::-1]), self._tensors([samples[0]] * count)
            if not all(torch.equal(*pair) for pair in zip(given, again, strict=True)):
                return False
            told = [_told(*parts, count) for parts in zip(given, back, same, strict=True)]
        except Exception:  # a pass collates other batches, and tells of what fails there
            return False
        # By the tensors that tell most samples apart: few labels may lie as if in order.
        most = max((distinct for distinct, _ in told), default=0)
        return most > 1 and (most, True) not in told

    def _tensors(self, samples: Sequence[Any]) -> list[Tensor]:
        """What a batch consists of, from the same random states each time."""
        with random_states_kept(cuda=False):
            return list(_parts(self._collate([copy.deepcopy(sample) for sample in samples])))


def _parts(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, list | tuple | Mapping) and not isinstance(batch, PackedSequence):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _parts(part)


def _told(given: Tensor, back: Tensor, same: Tensor, count: int) -> tuple[int, bool]:
    """How many samples a tensor tells apart, zero for none, and whether it has them in order.

    Args:
        given: of samples.
        back: of the same ones, given in reverse order.
        same: of the first one only.
        count: of samples.
    """
    found = 0, False
    for d in range(given.ndim if given.shape == back.shape else 0):
        if given.numel() and given.shape[d] == count and same.shape[d : d + 1] == (count,):
            rows, reverse, equal = (_rows(part, d) for part in (given, back, same))
            # A row for each sample: not so with positions, for example.
            if len(set(equal)) == 1 and Counter(rows) == Counter(reverse):
                found = max(found, (len(set(rows)), rows == reverse[::-1]))
    return found


def _rows(part: Tensor, d: int) -> list[bytes]:
    """What lies at each place of a dimension."""
    rows = part.detach().cpu().movedim(d, 0).reshape(part.shape[d], -1).contiguous()
    return [row.tobytes() for row in rows.view(torch.uint8).numpy()]
