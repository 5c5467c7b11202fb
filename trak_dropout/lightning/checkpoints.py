"""Knowing which checkpoint files a Trainer writes and deletes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins import CheckpointIO


class ObservedCheckpointIO(CheckpointIO):
    """Passes everything on to a Trainer's own checkpoint plugin, and tells of it first.

    Lightning tells callbacks of a checkpoint's content, not of its file nor of its deletion.

    Args:
        inner: the plugin that does the work.
        saving: called with content and file before one is written.
        removing: called with a file before it is deleted.
    """

    def __init__(
        self,
        inner: CheckpointIO,
        saving: Callable[[dict[str, Any], Path], None],
        removing: Callable[[Path], None],
    ) -> None:
        self._inner = inner
        self._saving: Callable[[dict[str, Any], Path], None] | None = saving
        self._removing: Callable[[Path], None] | None = removing

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kw: Any) -> None:
        """Tell of a checkpoint and write it."""
        if self._saving is not None:
            self._saving(checkpoint, Path(path))
        self._inner.save_checkpoint(checkpoint, path, *args, **kw)

    def load_checkpoint(self, *args: Any, **kw: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        return self._inner.load_checkpoint(*args, **kw)

    def remove_checkpoint(self, path: Any) -> None:
        """Tell of a deletion and delete."""
        if self._removing is not None:
            self._removing(Path(path))
        self._inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Pass on."""
        self._inner.teardown()

    def stop(self, trainer: pl.Trainer) -> None:
        """Tell of nothing any more, and leave the Trainer its own plugin.

        Args:
            trainer: the Trainer that observed with this.
        """
        self._saving = self._removing = None
        outermost = trainer.strategy.checkpoint_io
        # Observers of other collectors may lie around this one; the last one to stop unwraps all.
        while isinstance(outermost, ObservedCheckpointIO) and outermost._saving is None:
            outermost = outermost._inner
        trainer.strategy.checkpoint_io = outermost


def observe_checkpoints(
    trainer: pl.Trainer,
    saving: Callable[[dict[str, Any], Path], None],
    removing: Callable[[Path], None],
) -> ObservedCheckpointIO:
    """Be told of the checkpoints that a Trainer writes and deletes, in the process that does it.

    Args:
        trainer: the Trainer.
        saving: called with content and file before one is written.
        removing: called with a file before it is deleted.

    Returns:
        What must be stopped in the end.
    """
    observer = ObservedCheckpointIO(trainer.strategy.checkpoint_io, saving, removing)
    trainer.strategy.checkpoint_io = observer
    return observer
