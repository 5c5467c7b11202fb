"""From a store and a model to scores: what `TRAKer` does by hand, for stores that keep weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset
from tqdm import tqdm
from trak.modelout_functions import TASK_TO_MODELOUT, AbstractModelOutput

from trak_dropout.gradients import BatchError, DenseGradientComputer
from trak_dropout.outputs import resolve_task
from trak_dropout.projector import DropoutProjector
from trak_dropout.scoring import DampedScoreComputer, self_influence
from trak_dropout.store import Store, StoreMismatchError


class Featurizer:
    """Compressed per-sample gradients of a model, to the bit as ``TRAKer`` makes them.

    TRAKer divides projected gradients by the root of the number of coordinates; so does this.

    Args:
        model: the model; its current weights and buffers are used.
        task: the model output function.
        projector: the projector.
        grad_wrt: names of the parameters to take gradients of; all when None.
    """

    def __init__(
        self,
        model: nn.Module,
        task: AbstractModelOutput,
        projector: DropoutProjector,
        grad_wrt: Sequence[str] | None = None,
    ) -> None:
        self.projector = projector
        self._computer = DenseGradientComputer(
            model, task, projector.grad_dim, projector.dtype, projector.device, grad_wrt
        )
        self._normalize = torch.sqrt(torch.tensor(projector.grad_dim, dtype=torch.float32))

    def features(self, batch: Sequence[Tensor], model_id: int) -> Tensor:
        """Compute compressed gradients.

        Args:
            batch: what the task takes, on the model's device.
            model_id: the checkpoint that the model's weights are.

        Returns:
            ``(B, proj_dim)``, of the projector's dtype.

        Raises:
            BatchError: the task cannot take the batch.
            NonFiniteGradientError: a gradient is NaN or infinite.
        """
        grads = self.projector.project(self._computer.compute_per_sample_grad(batch), model_id)
        return grads.div_(self._normalize)

    def calibrate(self, batches: Iterable[Any], model_id: int | None = None) -> None:
        """Calibrate weighted dropout with the model's gradients.

        Args:
            batches: what the task takes, on the model's device.
            model_id: the checkpoint, for statistics of its own; None for all checkpoints.

        Raises:
            BatchError: the task cannot take a batch.
            ValueError: the gradients are all zero or not finite.
        """
        self.projector.calibrate(batches, model_id, compute=self._computer.compute_per_sample_grad)

    def out_to_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Compute out-to-loss gradients, ``(B, 1)``.

        Args:
            batch: as for `features`.

        Raises:
            BatchError: the task cannot take the batch.
        """
        return self._computer.compute_loss_grad(batch)


class AttributionStore(Store):
    """A store with the model whose training it records: it attributes new targets.

    Args:
        save_dir: the directory that the Lightning callback wrote.
        model: a model of the architecture that was trained; needed to attribute targets, not
            for self-influence.
        task: the model output function; needed when the store does not hold the name of one of
            TRAK's own.
    """

    def __init__(
        self,
        save_dir: str | Path,
        model: nn.Module | None = None,
        task: str | AbstractModelOutput | None = None,
    ) -> None:
        super().__init__(save_dir)
        self._model = model
        self._task = task

    def attribute(
        self,
        loader: Iterable[Any],
        model: nn.Module | None = None,
        *,
        model_ids: Iterable[int] | None = None,
        damping: float | str = "auto",
        progress: bool = True,
    ) -> NDArray[np.float32]:
        """Score every training sample for every target.

        Args:
            loader: batches of targets, as the task takes them. A shuffling ``DataLoader`` is
                read in the order of its data set.
            model: a model of the architecture that was trained, where none was given before.
                Its weights and mode are as before afterwards.
            model_ids: the checkpoints to average; all complete ones when None.
            damping: relative damping, as for `DampedScoreComputer`.
            progress: whether to show a progress bar.

        Returns:
            float32 ``(n_train, n_targets)``; positive where the training sample raises the
            target's output, such as the margin of its class. To the bit what ``TRAKer`` with
            the four plugs gives for the same checkpoints in float32.

        Raises:
            BatchError: the task cannot take the targets, or there are none.
            IncompleteStoreError: a checkpoint has not been collected completely.
            StoreMismatchError: the model's parameters are not those in the store.
            ValueError: no model or task is known.
        """
        model = self._model if model is None else model
        if model is None:
            raise ValueError("model is needed to compute the targets' gradients; none was given")
        task = resolve_task(self._resolved_task())
        chosen = self.choose(model_ids)
        device = next(model.parameters()).device
        projector = self.projector(device)
        layout = projector.layout
        featurizer = Featurizer(model, task, projector, None if layout is None else layout.names)
        computer = DampedScoreComputer(torch.float32, device, damping)
        targets = list(in_dataset_order(loader))
        if not targets:
            raise BatchError("loader: there are no targets in it")

        scores: Tensor | float = 0.0
        out_to_loss: Any = 0.0
        bar = tqdm(total=len(chosen) * len(targets), desc="Attributing", disable=not progress)
        with preserved(model), bar:
            model.eval()
            for model_id in chosen:
                load_weights(model, self.weights(model_id))
                rows = []
                for batch in targets:
                    rows.append(featurizer.features(to_device(model, batch, device), model_id))
                    bar.update()
                grads = torch.from_numpy(np.array(self.grads(model_id))).to(device)
                features = computer.get_x_xtx_inv(grads, computer.get_xtx(grads))
                if isinstance(scores, float):
                    scores = torch.zeros(len(grads), sum(map(len, rows)))
                computer.get_scores(features, torch.cat(rows), scores)
                out_to_loss = out_to_loss + self.out_to_loss(model_id).astype(np.float32)
        assert isinstance(scores, Tensor)
        return (scores.numpy() / float(len(chosen))) * (out_to_loss / float(len(chosen)))

    def self_influence(
        self, model_ids: Iterable[int] | None = None, damping: float | str = "auto"
    ) -> NDArray[np.float64]:
        """Compute the influence of each training sample on itself, ``(n_train,)``.

        Args:
            model_ids: the checkpoints to average; all complete ones when None.
            damping: relative damping.

        Returns:
            As `trak_dropout.self_influence`.
        """
        return self_influence(self, model_ids, damping)

    def _resolved_task(self) -> str | AbstractModelOutput:
        task = self.settings.task if self._task is None else self._task
        if task is None or (isinstance(task, str) and task not in TASK_TO_MODELOUT):
            raise ValueError(
                f"task is needed: {self.save_dir} was collected with the model output function "
                f"{task!r}, which cannot be built from its name; "
                "give it to open_store(..., task=...)"
            )
        return task


def open_store(
    save_dir: str | Path,
    model: nn.Module | None = None,
    task: str | AbstractModelOutput | None = None,
) -> AttributionStore:
    """Open a store that a `ManifestSaver` or the Lightning callback wrote.

    Args:
        save_dir: its directory.
        model: a model of the architecture that was trained, to attribute targets with.
        task: the model output function, where the store does not hold the name of one of
            TRAK's own.

    Returns:
        The store.

    Raises:
        FileNotFoundError: there is no store.
        StoreMismatchError: it is of another format version.
    """
    return AttributionStore(save_dir, model, task)


def in_dataset_order(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader over the same data that does not shuffle.

    Args:
        loader: a ``DataLoader``, or any iterable of batches.

    Returns:
        Batches in data-set order where it is a ``DataLoader`` that shuffles, else the loader.
    """
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
        return sequential_loader(loader)
    return loader


def sequential_loader(
    loader: DataLoader[Any], batch_size: int | None = None, at_most: int | None = None
) -> DataLoader[Any]:
    """Return a loader over a loader's data set, in its order.

    Args:
        loader: the loader whose data set, collation and workers to use.
        batch_size: samples in a batch; that of the loader when None.
        at_most: where the data set has more samples, take this many, evenly spaced.

    Returns:
        The loader.

    Raises:
        ValueError: the loader gives what its data set holds, without batching.
    """
    if loader.batch_sampler is None:
        raise ValueError(
            "the loader does not batch (batch_size=None), so its data set's items are batches "
            "and have no order of samples; use a data set of samples"
        )
    own = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
    dataset: Any = loader.dataset
    if at_most is not None and len(dataset) > at_most:
        dataset = Subset(dataset, np.linspace(0, len(dataset) - 1, at_most).astype(int).tolist())
    return DataLoader(
        dataset,
        batch_size=batch_size or own,
        shuffle=False,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def to_device(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """Move a batch to a device, through a LightningModule's transfer hooks where it has them.

    Args:
        model: the model that will take the batch.
        batch: what a loader gave.
        device: where the model is.

    Returns:
        The batch on the device.
    """
    if hasattr(model, "transfer_batch_to_device"):
        module: Any = model
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, device, 0)
        return module.on_after_batch_transfer(batch, 0)
    if isinstance(batch, list | tuple):
        return [part.to(device) if isinstance(part, Tensor) else part for part in batch]
    return batch


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model's parameters and buffers, in place.

    Args:
        model: the model.
        weights: name to tensor, as a state dict; further entries are ignored.

    Raises:
        StoreMismatchError: a parameter is missing or has another shape.
    """
    wanted = dict(model.named_parameters())
    for name, parameter in wanted.items():
        if name not in weights or weights[name].shape != parameter.shape:
            found = tuple(weights[name].shape) if name in weights else "missing"
            raise StoreMismatchError(
                f"model has parameter {name} {tuple(parameter.shape)}, which in the store's "
                f"weights is {found}; give a model of the architecture that was trained"
            )
    with torch.no_grad():
        for name, tensor in [*wanted.items(), *model.named_buffers()]:
            if name in weights:
                tensor.copy_(weights[name])


@contextmanager
def preserved(model: nn.Module, weights: bool = True) -> Iterator[None]:
    """Leave a model's buffers, train or eval modes and weights as they were found.

    Args:
        model: the model.
        weights: whether the parameters will be changed, too; they are copied then.
    """
    modes = {module: module.training for module in model.modules()}
    tensors = [*model.named_buffers(), *(model.named_parameters() if weights else [])]
    before = {name: tensor.detach().clone() for name, tensor in tensors}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors:
                tensor.copy_(before[name])
        for module, mode in modes.items():
            module.training = mode
