"""Where a Trainer stands."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


def position(trainer: pl.Trainer) -> int:
    """How many training batches have been begun: unlike global_step, for any optimizer."""
    return trainer.fit_loop.total_batch_idx + 1


def describe_position(trainer: pl.Trainer) -> dict[str, Any]:
    """What the manifest says of a checkpoint."""
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "batches": position(trainer),
    }


def is_trial(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which must leave nothing behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Lightning
