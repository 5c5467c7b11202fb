"""Progress of a collection, shown the way the Trainer shows its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from tqdm import tqdm


@contextmanager
def progress_of(trainer: pl.Trainer, total: int, text: str) -> Iterator[Callable[[int], None]]:
    """Show a bar beside the Trainer's own, if it shows one.

    Args:
        trainer: the Trainer.
        total: number of samples.
        text: what is being done.

    Yields:
        A function to call with the number of samples that are done.
    """
    shown = trainer.progress_bar_callback
    if shown is None or getattr(shown, "is_disabled", False) or not trainer.is_global_zero:
        yield lambda count: None
    elif isinstance(shown, RichProgressBar):
        # Rich draws all its bars as one; another writer on the terminal would tear it.
        bars = shown.progress
        task = None if bars is None else bars.add_task(text, total=total)

        def advance(count: int) -> None:
            if bars is not None and task is not None:
                bars.update(task, advance=count)
                shown.refresh()

        try:
            yield advance
        finally:
            if bars is not None and task is not None:
                bars.remove_task(task)
    else:
        with tqdm(total=total, desc=text, unit="sample", leave=False) as bar:
            yield bar.update
