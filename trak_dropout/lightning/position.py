"""Where a Trainer stands."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl


def position(trainer: pl.Trainer) -> int:
    """How many training batches have been begun: unlike global_step, for any optimizer."""
    return trainer.fit_loop.total_batch_idx + 1


def describe_position(trainer: pl.Trainer) -> dict[str, Any]:
    """What the manifest says of a checkpoint; to be called in all processes."""
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "batches": position(trainer),
        "metrics": {
            name: value if math.isfinite(value) else str(value)  # JSON has no NaN
            for name, value in ((n, float(v)) for n, v in trainer.callback_metrics.items())
        },
    }


def is_trial(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which must leave nothing behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Lightning
