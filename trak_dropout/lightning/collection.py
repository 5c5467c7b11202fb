"""A pass over the training data that becomes one model_id of a store."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from torch.utils.data import DataLoader
from tqdm import tqdm

from trak_dropout.attribution import Featurizer, sequential_loader, split_state, to_device
from trak_dropout.gradients import BatchError
from trak_dropout.projector import NonFiniteGradientError
from trak_dropout.store import ManifestSaver, Store


class Collection:
    """Passes over the training data, each written to the store as one model_id."""

    def __init__(
        self,
        featurizer: Featurizer,
        saver: ManifestSaver,
        calibration_samples: int,
        calibrate_each: bool,
    ) -> None:
        self._featurizer = featurizer
        self._saver = saver
        self._calibration_samples = calibration_samples
        self._calibrate_each = calibrate_each
        self.count = 0

    def abandon_after(self, position: int) -> None:
        """Set aside what was collected after the position from which the run is resumed."""
        for model_id, facts in self._saver.manifest["model_ids"].items():
            if facts["batches"] > position and not facts.get("abandoned"):
                self._saver.describe(int(model_id), abandoned=True)

    def collect(
        self,
        module: pl.LightningModule,
        loader: DataLoader[Any],
        size: int,
        facts: dict[str, Any],
        progress: bool,
    ) -> None:
        """Store weights and compressed gradients at a checkpoint.

        What a resumed run collected before, at the same weights, is taken up again. Complete
        collections are never written over.

        Args:
            module: the module, in eval mode.
            loader: the training data, in its order.
            size: number of training samples.
            facts: what the manifest says of the checkpoint; ``batches`` is its position.
            progress: whether to show a progress bar.
        """
        started = time.perf_counter()
        saver = self._saver
        if size != saver.train_set_size:
            raise MisconfigurationException(
                f"GradientCollector: the training dataset has {size} samples now, it had "
                f"{saver.train_set_size} when training started"
            )
        self.count += 1
        weights, transient = split_state(module)
        model_id = self._model_id(facts["batches"], weights)
        if saver.is_complete(model_id):
            saver.describe(model_id, abandoned=False)
            return
        saver.register_model_id(model_id, True)
        saver.describe(model_id, **facts, abandoned=False)
        saver.save_weights(model_id, weights, transient)
        self._featurizer.reload()
        self._calibrate(module, loader, model_id)
        store = saver.current_store
        done = 0
        bar = tqdm(
            total=size,
            desc=f"Collecting gradients, checkpoint {model_id}",
            unit="sample",
            leave=False,
            disable=not progress,
        )
        with bar:
            for raw in loader:
                batch = to_device(module, raw, module.device)
                try:
                    grads = self._featurizer.features(batch, model_id)
                    out_to_loss = self._featurizer.out_to_loss(batch)
                except NonFiniteGradientError as error:
                    samples = [done + i for i in error.samples]
                    raise NonFiniteGradientError(
                        f"training samples {samples[:10]}: {error}", samples
                    ) from error
                if done + len(grads) > size:
                    raise BatchError(_miscounted(done + len(grads), size))
                rows = slice(done, done + len(grads))
                store["grads"][rows] = grads.cpu().numpy()
                store["out_to_loss"][rows] = out_to_loss.float().cpu().numpy()
                store["is_featurized"][rows] = 1
                done = rows.stop
                bar.update(len(grads))
        if done != size:
            raise BatchError(_miscounted(done, size))
        for name in ("grads", "out_to_loss", "is_featurized"):
            store[name].flush()
        saver.serialize_current_model_id_metadata()
        saver.describe(model_id, seconds=round(time.perf_counter() - started, 3))

    def _calibrate(
        self, module: pl.LightningModule, loader: DataLoader[Any], model_id: int
    ) -> None:
        """Take the statistics that weighted dropout needs, unless the store has them."""
        projector, owner = self._featurizer.projector, model_id if self._calibrate_each else None
        if projector.proj_type == "weighted_dropout" and owner not in projector.statistics:
            some = sequential_loader(loader, at_most=self._calibration_samples)
            self._featurizer.calibrate(
                (to_device(module, batch, module.device) for batch in some), owner
            )
            self._saver.save_statistics()

    def _model_id(self, batches: int, weights: dict[str, torch.Tensor]) -> int:
        """The model_id for a position: that of an interrupted or equal collection, or a new one."""
        known = self._saver.manifest["model_ids"]
        for model_id, facts in known.items():
            if facts["batches"] == batches and (
                not self._saver.is_complete(int(model_id))
                or _equal(Store(self._saver.save_dir).weights(int(model_id)), weights)
            ):
                return int(model_id)
        return len(known)


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name].cpu()) for name, tensor in first.items()
    )


def _miscounted(given: int, size: int) -> str:
    return (
        f"the training loader's batches hold {given} samples, the training dataset {size}: "
        "collate_fn must neither drop nor add samples"
    )
