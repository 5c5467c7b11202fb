"""Runs of a model for other gradients than those of the training step that may be under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_aside: list[bool] = []  # no ContextVar: activation checkpoints may run again in other threads


@contextmanager
def run_aside() -> Iterator[None]:
    """Run models for other gradients; what listens to training steps does not listen."""
    _aside.append(True)
    try:
        yield
    finally:
        _aside.pop()


def running_aside() -> bool:
    """Whether a model runs for other gradients."""
    return bool(_aside)
