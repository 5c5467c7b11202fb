"""Random states that come back whatever happens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_states_kept(cuda: bool = True) -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch as they were found.

    Args:
        cuda: also those of CUDA, which a forked process cannot use.
    """
    devices = range(torch.cuda.device_count()) if cuda else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
