"""Work on the rows of a matrix, shared by the processes that Lightning Fabric launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

_MESSAGE_BYTES = 2048


class RankError(RuntimeError):
    """Another process of the same computation has failed."""


class Shards:
    """Which rows are this process's, and what it does together with the others.

    Args:
        fabric: a Lightning ``Fabric`` that has been launched, in every process; None for a single
            process.
        n: number of rows.
    """

    def __init__(self, fabric: Any, n: int) -> None:
        self._fabric = fabric if fabric is not None and fabric.world_size > 1 else None
        self.rank: int = self._fabric.global_rank if self._fabric else 0
        self.world: int = self._fabric.world_size if self._fabric else 1
        self.start = n * self.rank // self.world
        self.stop = n * (self.rank + 1) // self.world

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of all processes' tensors, the same in each of them."""
        if not self._fabric:
            return values
        summed = values.to(self._fabric.device, copy=True)
        distributed.all_reduce(summed)
        return summed.to(values.device)

    def all(self, values: Tensor) -> list[Tensor]:
        """Return all processes' tensors, by rank; they have the same shape."""
        if not self._fabric:
            return [values]
        own = values.to(self._fabric.device).contiguous()
        found = [torch.empty_like(own) for _ in range(self.world)]
        distributed.all_gather(found, own)
        return [part.to(values.device) for part in found]

    def joined(self, values: Tensor) -> Tensor:
        """Put one column for each row together from all processes' own rows.

        Args:
            values: ``(..., own rows)``.

        Returns:
            ``(..., n)``, the same in each process.
        """
        if not self._fabric:
            return values
        sizes = torch.stack(self.all(torch.tensor(values.shape[-1]))).tolist()
        padded = torch.nn.functional.pad(values, (0, max(sizes) - values.shape[-1]))
        found = self.all(padded)
        return torch.cat([part[..., :size] for part, size in zip(found, sizes, strict=True)], -1)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Do something that may fail in one process; if it does, it fails in all of them.

        Raises:
            RankError: another process has failed, with its rank and message.
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self._fabric:
            text = "" if error is None else f"{type(error).__name__}: {error}"
            written = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
            for rank, found in enumerate(self.all(torch.tensor(list(written)))):
                message = bytes(found.tolist()).rstrip(b"\0").decode(errors="replace")
                if message and error is None:
                    raise RankError(f"process {rank} of {self.world} failed: {message}")
        if error is not None:
            raise error
