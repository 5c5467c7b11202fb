"""Random states that come back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning.utilities.seed import isolate_rng


@contextmanager
def random_states_kept(cuda: bool = True) -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch as they were found.

    Lightning's ``isolate_rng`` does not where the block raises.

    Args:
        cuda: also those of CUDA, which a forked process cannot use.
    """
    failure: BaseException | None = None
    with isolate_rng(include_cuda=cuda):
        try:
            yield
        except BaseException as error:  # raised again below
            failure = error
    if failure is not None:
        raise failure
