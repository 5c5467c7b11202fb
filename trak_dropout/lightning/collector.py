"""`GradientCollector`: collects compressed per-sample gradients while a Lightning Trainer fits."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from errno import ENOSPC
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trak.modelout_functions import AbstractModelOutput

from trak_dropout._checks import check_integer
from trak_dropout._safetensors import check_storable
from trak_dropout.attribution import (
    AttributionStore,
    Featurizer,
    load_weights,
    split_state,
    to_device,
)
from trak_dropout.lightning.checkpoints import ObservedCheckpointIO, observe_checkpoints
from trak_dropout.lightning.collection import Collection
from trak_dropout.lightning.data import TrainingData, trainers_data, warn_of_untrained
from trak_dropout.lightning.lock import StoreLock
from trak_dropout.lightning.position import describe_position, is_trial, position
from trak_dropout.lightning.processes import Processes, check_strategy
from trak_dropout.lightning.progress import progress_of
from trak_dropout.lightning.subject import (
    OWN_LOSS,
    own_loss,
    parameter_names,
    submodule,
    submodule_weights,
)
from trak_dropout.lightning.targets import check_targets, target_loaders, try_targets
from trak_dropout.lightning.training import TrainingRows
from trak_dropout.lightning.undisturbed import differs, undisturbed
from trak_dropout.masks import DEFAULT_FOLD, check_scheme
from trak_dropout.outputs import resolve_task, task_name
from trak_dropout.projector import DropoutProjector
from trak_dropout.store import (
    MANIFEST,
    ManifestSaver,
    Store,
    StoreMismatchError,
    read_manifest,
    remove_store,
)

_LOG = logging.getLogger(__name__)
MOMENTS = ("epoch", "step", "checkpoint", "train_end")


class GradientCollector(pl.Callback):
    """Collects compressed per-sample gradients of the training set at checkpoints of a fit.

    At each of them a pass over the training data, in data-set order, stores the compressed
    gradient of every sample and the weights themselves, as one more ``model_id`` of a store that
    a plain ``TRAKer`` opens too. Training goes on exactly as it would have: weights, buffers,
    modes and random states are as before. (A data set or module that keeps state of its own
    outside of these, such as a counter in ``forward``, sees the collecting passes.)

    Under DDP every process computes and writes a part of the rows. A run that was killed goes on
    where it stopped, also in the middle of a collection, when it is resumed with
    ``fit(ckpt_path=...)``.

    Example::

        collector = GradientCollector("trak_store", task="image_classification", proj_dim=2048)
        Trainer(max_epochs=10, callbacks=[collector]).fit(module, loader)
        scores = collector.attribute(target_loader)  # (n_train, n_targets)

    Args:
        save_dir: directory of the store. One that holds an earlier run is refused, unless that
            run is being resumed. One run at a time may collect into it.
        task: name of a TRAK task, a model output function, or ``"loss"`` for minus the loss
            function that the module has as ``loss_fn``, ``criterion`` or ``loss``, called on what
            ``forward`` returns and the target.
        proj_dim: number of columns of the compressed gradients.
        seed: seed of the masks.
        proj_type: the scheme, as for `DropoutProjector`.
        fold: coordinates summed into each column, as for `DropoutProjector`; its default when
            None, and 1 in mode ``"training"``, where more would slow down every step.
        grad_wrt: names of the parameters to take gradients of, or patterns such as
            ``"encoder.*.weight"``; all when None, frozen ones too, but in mode ``"training"`` those
            that are trained.
        when: one or several of ``"epoch"``, at the end of every ``every_n_epochs``-th epoch, before
            the module's own ``on_train_epoch_end``; ``"step"``, after every
            ``every_n_train_steps``-th optimizer step; ``"train_end"``; and ``"checkpoint"``,
            whenever the Trainer saves a checkpoint during the fit, right after it, at the weights
            that it holds. (Lightning tells callbacks nothing of checkpoints with
            ``save_weights_only=True``.) When None, ``"step"`` where ``every_n_train_steps`` is
            given, else ``"epoch"``.
        every_n_epochs: how often, with ``"epoch"``.
        every_n_train_steps: how often, with ``"step"``.
        batch_size: samples in a batch while collecting. When None, that of the training loader,
            several of whose batches are joined (to at most 256 samples) where samples are small.
        calibration_samples: training samples, evenly spaced, of which weighted dropout takes its
            statistics at the first collection; in mode ``"training"``, by steps of a copy of the
            module before the first.
        calibrate_each: take statistics of its own for every checkpoint, or for every epoch.
        use_half_precision: store float16 instead of float32.
        overwrite: delete the store of an earlier run in ``save_dir``, and nothing else there,
            when training starts anew.
        adopt: go on in the store of an earlier run as if it were this one's. What was collected at
            the weights that this run passes is taken up, the rest set aside. For jobs that start
            anew by themselves when they die before the first checkpoint.
        dataloader: the loader whose data set to collect over, in its order; the Trainer's training
            loader when None.
        train_set_size: number of samples of an iterable data set without ``__len__``.
        indices: which samples of the data set become rows, in this order; all when None.
        model: name of the submodule to take gradients of, with the task's batches as its input;
            the whole module when None.
        targets: ``"val"``, ``"test"`` or ``"predict"``, or several of them, for the loaders of
            that name, or loaders by name: their samples' compressed gradients are kept at each
            checkpoint, as experiments that `top_influences` and ``trak-dropout score`` read
            without a model.
        drop_deleted: when a checkpoint file is deleted (``save_top_k``), delete the features that
            were collected with it, too.
        augmentation_seed: where random augmentations start from, the same in every collection;
            ``seed`` when None.
        mode: ``"checkpoint"`` for passes over the training data at the weights of that moment;
            ``"training"`` for rows from the training backward itself, one for each sample of each
            batch at the weights of that very step, in a block for each epoch. There, rows are minus
            the gradient of the training loss (see docs/training_mode), and ``when`` and what else
            concerns passes has no meaning.
        reduction: in mode ``"training"``, whether the training loss is the mean or the sum of the
            samples' losses; ``"auto"`` finds out.
        self_check: in mode ``"training"``, compare rows with plain autograd on single samples
            before training begins, and their sums with the weights' gradients now and then.
        log: log ``collector/samples_per_second`` and ``collector/share_of_time`` after each
            collection to the Trainer's loggers.

    Raises:
        MisconfigurationException: an argument has the wrong type or is out of range.
    """

    def __init__(
        self,
        save_dir: str | Path,
        task: str | AbstractModelOutput = "image_classification",
        proj_dim: int = 4096,
        seed: int = 0,
        proj_type: str = "dropout",
        fold: int | None = None,
        grad_wrt: str | list[str] | None = None,
        when: str | list[str] | None = None,
        every_n_epochs: int = 1,
        batch_size: int | None = None,
        calibration_samples: int = 512,
        calibrate_each: bool = False,
        use_half_precision: bool = False,
        overwrite: bool = False,
        *,
        every_n_train_steps: int | None = None,
        adopt: bool = False,
        dataloader: Any = None,
        train_set_size: int | None = None,
        indices: list[int] | None = None,
        model: str | None = None,
        targets: str | list[str] | dict[str, Any] | None = None,
        drop_deleted: bool = False,
        augmentation_seed: int | None = None,
        log: bool = True,
        mode: Literal["checkpoint", "training"] = "checkpoint",
        reduction: Literal["auto", "mean", "sum"] = "auto",
        self_check: bool = True,
    ) -> None:
        super().__init__()
        try:
            if mode not in ("checkpoint", "training"):
                raise ValueError(f"mode must be 'checkpoint' or 'training', got {mode!r}")
            if reduction not in ("auto", "mean", "sum"):
                raise ValueError(f"reduction must be 'auto', 'mean' or 'sum', got {reduction!r}")
            fold = (DEFAULT_FOLD if mode == "checkpoint" else 1) if fold is None else fold
            if mode == "training":
                meant_for_passes = {
                    "when": when,
                    "every_n_train_steps": every_n_train_steps,
                    "batch_size": batch_size,
                    "dataloader": dataloader,
                    "train_set_size": train_set_size,
                    "indices": indices,
                    "targets": targets,
                    "use_half_precision": use_half_precision or None,
                }
                refused = [name for name, value in meant_for_passes.items() if value is not None]
                if refused:
                    raise ValueError(
                        f"{', '.join(refused)} cannot be used with mode='training', which takes "
                        "rows of float32 from the training batches as they come"
                    )
            self._output = None if task == OWN_LOSS else resolve_task(task)
            check_scheme(proj_type)
            check_integer("proj_dim", proj_dim, minimum=1)
            check_integer("fold", fold, minimum=1)
            seed = check_integer("seed", seed)
            check_integer("every_n_epochs", every_n_epochs, minimum=1)
            check_integer("calibration_samples", calibration_samples, minimum=1)
            for name, value in (
                ("batch_size", batch_size),
                ("every_n_train_steps", every_n_train_steps),
                ("train_set_size", train_set_size),
            ):
                if value is not None:
                    check_integer(name, value, minimum=1)
            if augmentation_seed is not None:
                check_integer("augmentation_seed", augmentation_seed)
            if indices is not None:
                indices = [check_integer("indices", i, minimum=0) for i in indices]
            if dataloader is not None and not isinstance(dataloader, DataLoader):
                raise TypeError(f"dataloader must be a torch DataLoader, got {dataloader!r}")
            check_targets(targets)
            if overwrite and adopt:
                raise ValueError("overwrite and adopt exclude each other")
            self._moments = _moments(when, every_n_train_steps)
            if os.path.exists(save_dir) and not os.path.isdir(save_dir):
                raise ValueError(f"save_dir={str(save_dir)!r} is no directory")
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"GradientCollector: {error}") from error
        self.save_dir = Path(save_dir).resolve()
        self.task = task
        self.proj_dim = proj_dim
        self.seed = seed
        self.proj_type = proj_type
        self.fold = fold
        self.grad_wrt = grad_wrt
        self.when = when
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.batch_size = batch_size
        self.calibration_samples = calibration_samples
        self.calibrate_each = calibrate_each
        self.use_half_precision = use_half_precision
        self.overwrite = overwrite
        self.adopt = adopt
        self.dataloader = dataloader
        self.train_set_size = train_set_size
        self.indices = indices
        self.model = model
        self.targets = targets
        self.drop_deleted = drop_deleted
        self.augmentation_seed = seed if augmentation_seed is None else augmentation_seed
        self.log_metrics = log
        self.mode = mode
        self.reduction = reduction
        self.self_check = self_check
        self.collect_seconds = 0.0
        self._key = self._generate_state_key(save_dir=str(self.save_dir))  # asked at every hook
        self._run = uuid.uuid4().hex
        self._started = 0.0
        self._pending: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._files: tuple[int, list[str]] = (-1, [])
        self._last_step = 0
        self._collection: Collection | None = None
        self._lock: StoreLock | None = None
        self._observer: ObservedCheckpointIO | None = None
        self._module: pl.LightningModule | None = None
        self._at_once = 1
        self._rows: TrainingRows | None = None
        if mode == "training":
            self._rows = TrainingRows(
                self._projector,
                model,
                grad_wrt,
                reduction,
                self_check,
                calibration_samples,
                calibrate_each,
            )

    # --- hooks -----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this collector's state in a checkpoint: several collectors may run at once."""
        return self._key

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know: which run's store this is."""
        return {"run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the run of a checkpoint.

        Args:
            state_dict: what `state_dict` returned.
        """
        self._run = state_dict["run"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before training starts."""
        if stage != "fit":
            return
        check_strategy(trainer)
        if self._rows is not None:
            self._rows.setup(trainer, pl_module)
            return
        heard = [c for c in trainer.checkpoint_callbacks if not getattr(c, "save_weights_only", 0)]
        if "checkpoint" in self._moments and not heard and not is_trial(trainer):
            rank_zero_warn(
                "GradientCollector(when='checkpoint') collects only if you call "
                "trainer.save_checkpoint: the Trainer has no checkpoint callback, or they all have "
                "save_weights_only=True, of which Lightning does not tell; use when='epoch', or "
                "add a ModelCheckpoint"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check data, model and store, and try one batch, before the first training step."""
        if self._rows is not None:
            self._open_training(trainer, pl_module, self._rows)
            return
        self._open(trainer, pl_module)
        self._finish_interrupted(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Collect after every n-th optimizer step."""
        step, last = trainer.global_step, self._last_step
        self._last_step = step
        if "step" in self._moments and self._rows is None:
            assert self.every_n_train_steps is not None
            if step // self.every_n_train_steps > last // self.every_n_train_steps:
                self._collect(trainer, pl_module, describe_position(trainer), None)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect at the end of every n-th epoch."""
        if self._rows is not None:
            self._rows.on_train_epoch_end(trainer)
            return
        self._collect_pending(trainer, pl_module)
        if "epoch" in self._moments and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._collect(trainer, pl_module, describe_position(trainer), None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that the Trainer saves a checkpoint.

        It is collected at the next hook: by then the file is safe, and other callbacks have put
        their weights into the checkpoint (averaged ones, for example). No training step lies
        between.

        Args:
            trainer: the Trainer.
            pl_module: the module.
            checkpoint: what it is about to save.
        """
        if self._rows is not None:
            self._rows.on_save_checkpoint()
        elif "checkpoint" in self._moments and trainer.training | trainer.validating:
            self._pending = (describe_position(trainer), checkpoint)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Collect what the last batch's checkpoint holds."""
        if self._rows is not None:
            self._rows.on_train_batch_start(trainer, pl_module, batch_idx)
            return
        self._collect_pending(trainer, pl_module)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """In mode ``"training"``, expect the gradients of the batch."""
        if self._rows is not None:
            self._rows.on_before_backward(trainer, loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In mode ``"training"``, take the rows of the batch."""
        if self._rows is not None:
            self._rows.on_after_backward(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """In mode ``"training"``, note the learning rate."""
        if self._rows is not None:
            self._rows.on_before_optimizer_step(optimizer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect what the last epoch's checkpoint holds."""
        self._collect_pending(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect what the last checkpoint holds, and the weights at the end."""
        if self._rows is not None:
            self._rows.on_train_epoch_end(trainer)
            return
        self._collect_pending(trainer, pl_module)
        if "train_end" in self._moments:
            self._collect(trainer, pl_module, describe_position(trainer), None)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect a checkpoint saved at the very end; say so if nothing was collected at all."""
        if self._rows is not None:
            return
        if self._collection is None and position(trainer) and not is_trial(trainer):
            # A run that was killed after its last epoch does not start to train again.
            self._open(trainer, pl_module)
            self._finish_interrupted(trainer, pl_module)
            if "train_end" in self._moments:
                self._collect(trainer, pl_module, describe_position(trainer), None)
            return
        self._collect_pending(trainer, pl_module)
        if self._collection is not None and not self._collection.count:
            rank_zero_warn(
                f"GradientCollector has collected nothing in this fit: when={self.when!r}, "
                f"every_n_epochs={self.every_n_epochs}, "
                f"every_n_train_steps={self.every_n_train_steps}"
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of the store; what is in it can be taken up again."""
        if self._rows is not None:
            self._rows.on_exception()
        self._close(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of loaders and open files."""
        if stage == "fit":
            self._close(trainer)

    # --- afterwards ------------------------------------------------------------------------

    @property
    def store(self) -> AttributionStore:
        """The store, with the module that was trained.

        Raises:
            FileNotFoundError: nothing has been collected yet.
        """
        return self._store(self._module)

    @property
    def model_ids(self) -> list[int]:
        """The checkpoints collected completely."""
        return self.store.model_ids

    def attribute(
        self,
        loader: Iterable[Any],
        model: nn.Module | None = None,
        *,
        model_ids: Iterable[int] | None = None,
        damping: float | str = "auto",
        curvature: str = "output",
        progress: bool = True,
    ) -> NDArray[np.float32]:
        """Score every training sample for every target.

        Args:
            loader: batches of targets, as for training.
            model: the module that was trained, or its submodule that gradients were taken of;
                needed only after ``ddp_spawn``, which trains in other processes than the one that
                called ``fit``.
            model_ids: the checkpoints to average; all collected ones when None.
            damping: relative damping, as for `DampedScoreComputer`.
            curvature: ``"output"`` or ``"loss"``, as for `AttributionStore.attribute`.
            progress: whether to show a progress bar.

        Returns:
            float32 ``(n_train, n_targets)``; see `AttributionStore.attribute`.
        """
        part = self.model is not None and not isinstance(model, pl.LightningModule)
        if model is None or (part and self._module is not None):  # whose hooks prepare batches
            model = self._module
        return self._store(model).attribute(
            loader,
            model_ids=model_ids,
            damping=damping,
            curvature=curvature,
            progress=progress,
        )

    def self_influence(
        self,
        model_ids: Iterable[int] | None = None,
        damping: float | str = "auto",
        *,
        curvature: str = "output",
    ) -> NDArray[np.float64]:
        """Compute the influence of each training sample on itself, ``(n_train,)``.

        Args:
            model_ids: the checkpoints to average; all collected ones when None.
            damping: relative damping.
            curvature: as for `attribute`.

        Returns:
            float64, high for samples whose label is likely wrong; see
            `trak_dropout.self_influence`.
        """
        return self.store.self_influence(model_ids, damping, curvature=curvature)

    # --- inside ----------------------------------------------------------------------------

    def _store(self, module: nn.Module | None) -> AttributionStore:
        task = self.task
        if task == OWN_LOSS:
            if self._output is None and module is not None:  # another process has trained it
                self._output = own_loss(module)
            return AttributionStore(self.save_dir, module, self._output)
        return AttributionStore(self.save_dir, module, task)

    def _open(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check data, model and store, try one batch, and claim the store."""
        self._module, self._pending, self._collection = module, None, None
        resumed_from = [] if trainer.ckpt_path is None else [str(trainer.ckpt_path)]
        self._files, self._last_step = (position(trainer), resumed_from), trainer.global_step
        self._started, self.collect_seconds = time.perf_counter(), 0.0
        self._at_once = 1
        processes = Processes(trainer)
        with processes.together():
            if self.task == OWN_LOSS:
                self._output = own_loss(module)
            model = submodule(module, self.model)
            data = self._data(trainer)
            if data.is_stream and processes.count > 1:
                raise MisconfigurationException(
                    "GradientCollector cannot tell which samples of an IterableDataset each of "
                    f"{processes.count} processes gets; give it a map-style dataset as dataloader="
                )
            if self.dataloader is None:
                warn_of_untrained(trainer, data.loader)
            # Tried without statistics: those of weighted dropout are taken when collecting begins.
            trial = self._featurizer(module, model, "dropout")
            with undisturbed(module, self.augmentation_seed):
                data.check_collation()
                _, first = next(data.read([0]))
                batch = to_device(module, first, module.device)
                trial.features(batch, 0)
                trial.out_to_loss(batch)
                if self.batch_size is None:
                    self._at_once = data.comfortable(trial.bytes_per_sample(batch))
                try_targets(
                    target_loaders(trainer, self.targets),
                    lambda raw, loader: trial.features(
                        to_device(module, raw, module.device, loader), 0
                    ),
                )
            weights, transient = split_state(model)
            check_storable(weights | transient)
        processes.same("the number of training samples", data.size)
        processes.same("batch_size", data.batch_size)
        if is_trial(trainer):
            return
        featurizer = self._featurizer(module, model, self.proj_type)
        saver = None

        def claim() -> str:
            nonlocal saver
            need = sum(tensor.nbytes for tensor in weights.values())
            saver = self._claim(position(trainer) > 0, featurizer.projector, data.size, need)
            return self._run

        self._run = processes.agree(claim)

        def at_once() -> int:
            assert saver is not None
            # A run that is resumed goes on as it began: what layers return may have changed.
            known = saver.manifest["run"].get("batches_at_once")
            if known is None:
                saver.describe_run(batches_at_once=self._at_once)
            return self._at_once if known is None else int(known)

        if self.batch_size is None:
            self._at_once = processes.agree(at_once)
        self._collection = Collection(
            self.save_dir,
            featurizer,
            processes,
            data.size,
            saver,
            self.calibration_samples,
            self.calibrate_each,
        )
        if saver is not None:
            self._collection.abandon_after(position(trainer))
            self._observer = observe_checkpoints(trainer, self._on_saving, self._on_removing)

    def _open_training(
        self, trainer: pl.Trainer, module: pl.LightningModule, rows: TrainingRows
    ) -> None:
        """Mode ``"training"``: check, try a step, and claim the store."""
        self._module, processes = module, Processes(trainer)
        if self.task == OWN_LOSS:
            self._output = own_loss(module)
        weights, transient = split_state(submodule(module, self.model))
        check_storable(weights | transient)
        need = sum(tensor.nbytes for tensor in weights.values())

        def claim(projector: DropoutProjector, size: int) -> ManifestSaver:
            return self._claim(position(trainer) > 0, projector, size, need)

        rows.on_train_start(trainer, module, self.save_dir, claim, processes)
        self._run = processes.agree(lambda: self._run)

    def _close(self, trainer: pl.Trainer) -> None:
        if self._rows is not None:
            self._rows.stop()
        if self._observer is not None:
            self._observer.stop(trainer)
        if self._lock is not None:
            self._lock.release()
        self._collection = self._pending = self._observer = self._lock = None

    def _data(self, trainer: pl.Trainer) -> TrainingData:
        return TrainingData(
            trainers_data(trainer) if self.dataloader is None else self.dataloader,
            self.augmentation_seed,
            self.batch_size,
            self.train_set_size,
            self.indices,
            self._at_once,
        )

    def _featurizer(
        self, module: pl.LightningModule, model: nn.Module, proj_type: str
    ) -> Featurizer:
        assert self._output is not None
        names = parameter_names(model, self.grad_wrt)
        projector = self._projector(model, names, proj_type)
        return Featurizer(model, self._output, projector, names)

    def _projector(
        self, model: nn.Module, names: Sequence[str] | None, proj_type: str | None = None
    ) -> DropoutProjector:
        return DropoutProjector.from_model(
            model,
            self.proj_dim,
            self.seed,
            proj_type or self.proj_type,
            next(model.parameters()).device,
            grad_wrt=names,
            fold=self.fold,
        )

    def _claim(
        self, resumed: bool, projector: DropoutProjector, size: int, weight_bytes: int
    ) -> ManifestSaver:
        """Lock the directory, refuse one that holds another run's collections, and open it."""
        try:
            self._lock = StoreLock(self.save_dir)
        except PermissionError as error:
            raise PermissionError(
                error.errno,
                f"save_dir={str(self.save_dir)!r} cannot be written to ({error.strerror}); "
                "give GradientCollector another one",
            ) from error
        self._admit(resumed)
        row = (projector.proj_dim + 1) * (2 if self.use_half_precision else 4) + 4
        need, free = size * row + weight_bytes, shutil.disk_usage(self.save_dir).free
        if need > free:
            raise OSError(
                ENOSPC,
                f"save_dir={str(self.save_dir)!r} has {free / 1e6:.1f} MB of free space, a single "
                f"collection takes {need / 1e6:.1f} MB ({size} samples x {projector.proj_dim} "
                "columns, and the weights); make room, or use a smaller proj_dim or "
                "use_half_precision",
            )
        assert self._output is not None
        saver = ManifestSaver(
            save_dir=self.save_dir,
            metadata={
                "JL dimension": projector.proj_dim,
                "JL matrix type": projector.proj_type,
                "train set size": size,
            },
            train_set_size=size,
            proj_dim=projector.proj_dim,
            load_from_save_dir=True,
            logging_level=logging.WARNING,
            use_half_precision=self.use_half_precision,
            projector=projector,
            task=task_name(self._output if self.task == OWN_LOSS else self.task),
        )
        subject = {
            "mode": "training" if self.mode == "training" else None,
            "model": self.model,
            "indices": _digest(self.indices),
        }
        known = saver.manifest["run"]
        for name, value in subject.items():
            if "id" in known and known.get(name) != value:
                raise StoreMismatchError(
                    f"{self.save_dir} was written with other settings: {name} is "
                    f"{known.get(name)!r} in the store, {value!r} given. Give the same, or another "
                    "save_dir"
                )
        saver.describe_run(id=self._run, **subject)
        saver.sweep()
        return saver

    def _admit(self, resumed: bool) -> None:
        """Refuse a directory that holds another run's collections, or empty it when asked."""
        if not (self.save_dir / MANIFEST).is_file():
            return
        manifest = read_manifest(self.save_dir)
        if resumed and manifest["run"].get("id") == self._run:
            return
        held = len(manifest["model_ids"])
        if self.adopt:
            self._run = manifest["run"].get("id", self._run)
            return
        if held and resumed:
            raise StoreMismatchError(
                f"save_dir={str(self.save_dir)!r} holds {held} collections of another run than the "
                "one that is being resumed (or it was moved: the checkpoint knows a collector by "
                "the absolute path of its save_dir); give another save_dir, or set adopt=True to "
                "go on in it"
            )
        if held and not self.overwrite:
            raise StoreMismatchError(
                f"save_dir={str(self.save_dir)!r} holds {held} collections "
                "of an earlier run; give another save_dir, resume that run with "
                "fit(ckpt_path=...), set adopt=True to go on in it, or set overwrite=True to "
                "delete them"
            )
        remove_store(self.save_dir)

    # In the process that writes checkpoints, which is the first one.

    def _on_saving(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            self._tie(checkpoint, path)
        except OSError as error:  # raised again when collecting: the checkpoint comes first
            _LOG.error("GradientCollector: %s (%s is saved nevertheless)", error, path)

    def _tie(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Note where a checkpoint goes, and register it if it is to be collected."""
        collection, module = self._collection, self._module
        if collection is None or module is None:
            return
        at, metrics = position(module.trainer), {}
        if self._pending is not None and self._pending[1] is checkpoint:
            facts = self._pending[0]
            metrics = facts["metrics"]
            # Registered before the file exists: a run resumed from it finds what to collect.
            model = submodule(module, self.model)
            weights, transient = split_state(model)
            held = submodule_weights(module, model, checkpoint["state_dict"])
            weights = {n: held.get(n, t).detach().to(t.dtype) for n, t in weights.items()}
            collection.register(facts, weights, transient)
        # Saved before it is collected, from the validation loop for example.
        self._files = (at, [*(self._files[1] if self._files[0] == at else []), str(path)])
        collection.checkpoint_saved(at, str(path), metrics)

    def _on_removing(self, path: Path) -> None:
        if self._collection is not None:
            self._collection.checkpoint_removed(str(path), self.drop_deleted)

    # In all processes.

    def _finish_interrupted(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Go on with a collection in the middle of which a run was killed that is resumed here."""
        collection = self._collection
        if collection is None:
            return
        at = position(trainer)
        model_id = Processes(trainer).agree(lambda: collection.interrupted_at(at))
        if model_id is not None:
            store = Store(self.save_dir)
            weights = store.weights(model_id) | store.transient_buffers(model_id)
            facts = describe_position(trainer) | store.describe(model_id)
            self._collect_at(trainer, module, facts, weights)

    def _collect_pending(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._pending is not None:
            (facts, checkpoint), self._pending = self._pending, None
            self._collect(trainer, module, facts, checkpoint.get("state_dict"))

    def _collect(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        facts: dict[str, Any],
        weights: Mapping[str, Any] | None,
    ) -> None:
        """Collect at a checkpoint's weights, or at the module's own when None."""
        if weights is not None:
            weights = submodule_weights(module, submodule(module, self.model), weights)
        self._collect_at(trainer, module, facts, weights)

    def _collect_at(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        facts: dict[str, Any],
        weights: Mapping[str, Any] | None,
    ) -> None:
        collection = self._collection
        if collection is None or trainer.interrupted:
            return
        started = time.perf_counter()
        at, files = self._files
        facts = {"checkpoints": files if at == facts["batches"] else [], **facts}
        processes, model = Processes(trainer), submodule(module, self.model)
        with processes.together():
            data = self._data(trainer)  # may have been reloaded
            if data.size != (size := collection.train_set_size):
                raise MisconfigurationException(
                    f"GradientCollector: the training dataset has {data.size} samples now, it had "
                    f"{size} when training started"
                )
            targets = target_loaders(trainer, self.targets)
            changed = weights is not None and differs(model, weights)
        with undisturbed(module, self.augmentation_seed, changed):
            if weights is not None and changed:
                load_weights(model, weights)
            # Running statistics differ between processes that trained on different samples.
            processes.take_over(dict(model.named_buffers()))
            text = f"Collecting gradients, epoch {facts['epoch']}"
            with progress_of(trainer, -(-data.size // processes.count), text) as progress:
                _, computed = collection.collect(module, model, data, facts, targets, progress)
        seconds = time.perf_counter() - started
        self.collect_seconds += seconds
        if self.log_metrics and computed:
            share = self.collect_seconds / (time.perf_counter() - self._started)
            for logger in trainer.loggers:
                logger.log_metrics(
                    {
                        "collector/samples_per_second": computed / seconds,
                        "collector/share_of_time": share,
                    },
                    step=trainer.fit_loop.epoch_loop._batches_that_stepped,
                )


def _moments(when: str | list[str] | None, every_n_train_steps: int | None) -> frozenset[str]:
    if when is None:
        when = "epoch" if every_n_train_steps is None else "step"
    given = [when] if isinstance(when, str) else list(when)
    if not given or not set(given) <= set(MOMENTS):
        raise ValueError(
            f"when must be one or several of {', '.join(map(repr, MOMENTS))}, got {when!r}"
        )
    if ("step" in given) != (every_n_train_steps is not None):
        raise ValueError(
            "when='step' and every_n_train_steps belong together, got "
            f"when={when!r} and every_n_train_steps={every_n_train_steps!r}"
        )
    return frozenset(given)


def _digest(indices: list[int] | None) -> str | None:
    return None if indices is None else hashlib.sha256(json.dumps(indices).encode()).hexdigest()
