"""A pass over the training data that becomes one model_id of a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from trak_dropout._files import checksum
from trak_dropout.attribution import Featurizer, split_state, to_device
from trak_dropout.gradients import BatchError
from trak_dropout.lightning.calibration import take_over_statistics
from trak_dropout.lightning.data import TrainingData
from trak_dropout.lightning.processes import Processes
from trak_dropout.lightning.rows import RowWriter, featurized, row_writer
from trak_dropout.lightning.targets import TargetLoader
from trak_dropout.projector import NonFiniteGradientError
from trak_dropout.rowfile import IncompleteStoreError
from trak_dropout.scaling import StorageScales
from trak_dropout.store import ManifestSaver, Store


class Collection:
    """Passes over the training data, each written to the store as one model_id.

    Every process computes and writes rows of its own; the first one writes everything else.

    Args:
        root: directory of the store.
        featurizer: what computes compressed gradients.
        processes: the Trainer's processes.
        train_set_size: number of training samples, for the life of the store.
        saver: the store's writer, in the first process.
        calibration_samples: samples of which weighted dropout takes statistics.
        calibrate_each: take statistics of its own for every checkpoint.
    """

    def __init__(
        self,
        root: Path,
        featurizer: Featurizer,
        processes: Processes,
        train_set_size: int,
        saver: ManifestSaver | None,
        calibration_samples: int,
        calibrate_each: bool,
    ) -> None:
        self._root = root
        self._featurizer = featurizer
        self._processes = processes
        self.train_set_size = train_set_size
        self._optional_saver = saver
        self._calibration_samples = calibration_samples
        self._calibrate_each = calibrate_each
        self.count = 0

    @property
    def _saver(self) -> ManifestSaver:
        assert self._optional_saver is not None  # of the first process only
        return self._optional_saver

    # --- in the first process only ---------------------------------------------------------

    def abandon_after(self, position: int) -> None:
        """Set aside what was collected after the position from which the run is resumed."""
        for model_id, facts in self._saver.manifest["model_ids"].items():
            if facts.get("batches", -1) > position and not facts.get("abandoned"):
                self._saver.describe(int(model_id), abandoned=True)

    def interrupted_at(self, position: int) -> int | None:
        """Return the checkpoint whose collection at a position was begun and not ended, if any."""
        for key, facts in self._saver.manifest["model_ids"].items():
            model_id = int(key)
            here = facts.get("batches") == position and not facts.get("abandoned")
            if here and not self._saver.is_complete(model_id) and self._is_intact(model_id):
                return model_id
        return None

    def collected_at(self, position: int) -> int | None:
        """Return the checkpoint that was registered at a position last, if there is one."""
        ids = [
            int(model_id)
            for model_id, facts in self._saver.manifest["model_ids"].items()
            if facts.get("batches") == position and not facts.get("abandoned")
        ]
        return max(ids, default=None)

    def register(
        self, facts: Mapping[str, Any], weights: dict[str, Tensor], transient: dict[str, Tensor]
    ) -> int:
        """Make room for a checkpoint and keep its weights.

        What a resumed run collected before, at the same weights, is taken up again; what is
        complete is never written over.

        Args:
            facts: what the manifest says of the checkpoint; ``batches`` is its position.
            weights: the model's state dict.
            transient: its buffers outside of that.

        Returns:
            The model_id.

        Raises:
            OSError: the disk has no room for it; earlier collections are as they were.
        """
        saver, begun = self._saver, None
        for key, known in saver.manifest["model_ids"].items():
            model_id = int(key)
            if known.get("batches") != facts["batches"]:
                continue
            complete = saver.is_complete(model_id)
            if (complete or self._is_intact(model_id)) and _equal(
                Store(self._root).weights(model_id), weights
            ):
                if known.get("abandoned"):
                    saver.describe(model_id, abandoned=False)
                return model_id
            if not complete:
                begun = model_id
        model_id = self._next_id() if begun is None else begun
        directory = self._root / str(model_id)
        # Rows of an interrupted collection at other weights must not count as done.
        (directory / "_is_featurized.mmap").unlink(missing_ok=True)
        try:
            saver.save_weights(model_id, weights, transient)
            saver.register_model_id(model_id, True)
        except OSError as error:
            saver.discard(model_id)
            raise OSError(
                error.errno,
                f"no room to collect checkpoint {model_id}: {error.strerror}. Earlier collections "
                "are as they were; make room, or use a smaller proj_dim or use_half_precision",
                str(directory),
            ) from error
        saver.describe(model_id, **facts, abandoned=False)
        return model_id

    def describe(self, model_id: int, **facts: Any) -> None:
        """Add facts about a checkpoint to the manifest."""
        self._saver.describe(model_id, **facts)

    def checkpoint_saved(self, position: int, path: str, metrics: Mapping[str, Any]) -> None:
        """Tie the collection at a position to a file, which then holds no other checkpoint."""
        at = self.collected_at(position)
        for key, facts in self._saver.manifest["model_ids"].items():
            files = [file for file in facts.get("checkpoints", []) if file != path]
            if int(key) == at:
                files.append(path)
                self._saver.describe(at, metrics={**facts.get("metrics", {}), **metrics})
            if files != facts.get("checkpoints", []):
                self._saver.describe(int(key), checkpoints=files)

    def checkpoint_removed(self, path: str, drop: bool) -> None:
        """Note that a file is deleted; drop the features of a checkpoint that has no other."""
        for key, facts in list(self._saver.manifest["model_ids"].items()):
            if path in facts.get("checkpoints", []):
                files = [file for file in facts["checkpoints"] if file != path]
                if drop and not files:
                    self._saver.forget(int(key))
                else:
                    self._saver.describe(int(key), checkpoints=files)

    # --- in all processes ------------------------------------------------------------------

    def collect(
        self,
        module: pl.LightningModule,
        model: nn.Module,
        data: TrainingData,
        facts: Mapping[str, Any],
        targets: Mapping[str, TargetLoader],
        progress: Callable[[int], None],
    ) -> tuple[int, int]:
        """Store weights and compressed gradients at a checkpoint.

        Args:
            module: the module, whose hooks prepare batches.
            model: it or its submodule whose gradients are taken, in eval mode.
            data: the training data.
            facts: what the manifest says of the checkpoint; ``batches`` is its position.
            targets: loaders of targets by the name of their experiment.
            progress: called with a number of samples when they are done.

        Returns:
            The model_id, and how many samples were computed now (by all processes).

        Raises:
            BatchError: the batches do not hold the samples that the data set has.
            CollectionError: another process failed.
            NonFiniteGradientError: a gradient is NaN or infinite.
            OSError: the disk is full, or the like.
        """
        started = time.perf_counter()
        self.count += 1
        self._featurizer.reload()

        def begin() -> tuple[int, bool]:
            model_id = self.register(facts, *split_state(model))
            complete = self._saver.is_complete(model_id)
            if not complete:
                self._saver.load_current_store(model_id)
                self._calibrate(module, data, model_id)
            return model_id, complete

        model_id, complete = self._processes.agree(begin)
        if complete:
            return model_id, 0
        too_large: float | None = None
        while True:  # a second time only where float16 could not hold a gradient
            batches, factor = self._processes.agree(
                lambda: self._left_to_do(module, data, model_id, too_large)  # noqa: B023
            )
            with self._processes.together():
                take_over_statistics(self._featurizer.projector, self._root, self._processes)
                self._fix_scale(model_id, factor)
                mine = data.shares(batches, self._processes.count)[self._processes.rank]
                with row_writer(self._root / str(model_id)) as writer:
                    needed = self._featurize(module, data, model_id, mine, writer, progress)
            too_large = self._processes.least(needed)
            if too_large is None:
                break

        def finish() -> None:
            self._keep_targets(module, model_id, targets)
            self._complete(model_id, started)

        self._processes.agree(finish)
        return model_id, sum(len(data.rows(number)) for number in batches)

    # --- inside ----------------------------------------------------------------------------

    def _featurize(
        self,
        module: pl.LightningModule,
        data: TrainingData,
        model_id: int,
        batches: list[int],
        writer: RowWriter,
        progress: Callable[[int], None],
    ) -> float | None:
        """Write rows; returns the factor that float16 needs, where the one it has is too large."""
        done = 0
        read = data.read(batches)
        prepared = ((number, to_device(module, raw, module.device)) for number, raw in read)
        for numbers, batch in data.joined(prepared):
            rows = range(data.rows(numbers[0]).start, data.rows(numbers[-1]).stop)
            try:
                grads = self._featurizer.features(batch, model_id)
                out_to_loss = self._featurizer.out_to_loss(batch)
            except _TooLargeError as error:
                return error.factor
            except NonFiniteGradientError as error:
                samples = [rows.start + i for i in error.samples]
                raise NonFiniteGradientError(
                    f"training samples {samples[:10]}: {error}", samples
                ) from error
            if len(grads) != len(rows):
                raise BatchError(
                    f"batch {numbers[0]} of the training data holds {len(grads)} samples instead "
                    f"of {len(rows)}, so rows would not belong to samples: collate_fn must neither "
                    "drop nor add samples, and a dataset must have the length that it states"
                )
            writer.write(rows.start, grads, out_to_loss)
            progress(len(rows))
            done += len(numbers)
        if done != len(batches):
            raise BatchError(
                f"the training data ended after {done} of {len(batches)} batches; a dataset must "
                f"hold the {data.size} samples that it states (or that train_set_size says)"
            )
        return None

    def _left_to_do(
        self,
        module: pl.LightningModule,
        data: TrainingData,
        model_id: int,
        too_large: float | None,
    ) -> tuple[list[int], float | None]:
        """Return the batches that are not written, and the factor for float16 storage."""
        saver, projector = self._saver, self._featurizer.projector
        if too_large is not None:
            saver.restart(model_id, too_large)
        factor = saver.manifest["model_ids"][str(model_id)].get("scale")
        if factor is None and projector.scales is not None:
            # The first batch chooses it, wherever a pass begins and whoever reads that batch.
            _, batch = next(data.read([0]))
            self._featurizer.features(to_device(module, batch, module.device), model_id)
            factor = projector.scales.factors.get(model_id, 1.0)
        return data.unfinished(featurized(self._root / str(model_id))), factor

    def _fix_scale(self, model_id: int, factor: float | None) -> None:
        """Store gradients with the factor that all processes use, or with none."""
        projector = self._featurizer.projector
        projector.scales = None
        if factor is not None:
            projector.scales = StorageScales(
                projector.grad_dim**0.5, {model_id: factor}, _raise_too_large
            )

    def _calibrate(self, module: pl.LightningModule, data: TrainingData, model_id: int) -> None:
        """Take the statistics that weighted dropout needs, unless the store has them."""
        projector, owner = self._featurizer.projector, model_id if self._calibrate_each else None
        if projector.proj_type == "weighted_dropout" and owner not in projector.statistics:
            some = data.some(self._calibration_samples)
            self._featurizer.calibrate(
                (to_device(module, batch, module.device) for batch in some), owner
            )
            self._saver.save_statistics()

    def _keep_targets(
        self, module: pl.LightningModule, model_id: int, targets: Mapping[str, TargetLoader]
    ) -> None:
        for name, (number, loader) in targets.items():
            given = (to_device(module, batch, module.device, number) for batch in loader)
            rows = [self._featurizer.features(batch, model_id).cpu() for batch in given]
            if not rows:
                raise BatchError(f"targets {name!r}: there are none in the loader")
            Store(self._root).write_targets(model_id, name, torch.cat(rows).numpy())

    def _complete(self, model_id: int, started: float) -> None:
        directory = self._root / str(model_id)
        missing = np.flatnonzero(~featurized(directory))
        if len(missing):
            raise IncompleteStoreError(f"rows {missing[:10].tolist()} of {directory} are missing")
        self._saver.describe(
            model_id,
            seconds=round(time.perf_counter() - started, 3),
            checksums={
                name: checksum(directory / f"{name}.mmap") for name in ("grads", "out_to_loss")
            },
        )
        self._saver.load_current_store(model_id)
        self._saver.serialize_current_model_id_metadata()

    def _is_intact(self, model_id: int) -> bool:
        """Whether an interrupted collection can go on where it stopped."""
        directory = self._root / str(model_id)
        try:
            RowWriter(directory).close()
            Store(self._root).weights(model_id)
        except (IncompleteStoreError, ValueError):
            return False
        return len(featurized(directory)) == self.train_set_size

    def _next_id(self) -> int:
        return max([-1, *map(int, self._saver.manifest["model_ids"]), *self._saver.dropped]) + 1


class _TooLargeError(ArithmeticError):
    """A gradient does not fit float16 with the factor that was chosen."""

    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        self.factor = factor


def _raise_too_large(model_id: int, factor: float, before: float | None) -> None:
    raise _TooLargeError(factor)


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name].cpu()) for name, tensor in first.items()
    )
