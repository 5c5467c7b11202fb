"""`GradientCollector`: collects compressed per-sample gradients while a Lightning Trainer fits."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
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
from trak_dropout.lightning.collection import Collection
from trak_dropout.lightning.data import training_data
from trak_dropout.lightning.position import describe_position, is_trial, position
from trak_dropout.lightning.undisturbed import differs, undisturbed
from trak_dropout.masks import DEFAULT_FOLD, check_scheme
from trak_dropout.outputs import resolve_task, task_name
from trak_dropout.projector import DropoutProjector
from trak_dropout.store import MANIFEST, ManifestSaver, Store, StoreMismatchError, remove_store


class GradientCollector(pl.Callback):
    """Collects compressed per-sample gradients of the training set at checkpoints of a fit.

    At each of them a pass over the training data, in data-set order, stores the compressed
    gradient of every sample and the weights themselves, as one more ``model_id`` of a store that
    a plain ``TRAKer`` opens too. Training goes on exactly as it would have: weights, buffers,
    modes and random states are as before. (A data set or module that keeps state of its own
    outside of these, such as a counter in ``forward``, sees the collecting passes.) Random
    augmentations are drawn from ``seed``, the same in every collection.

    Example::

        collector = GradientCollector("trak_store", task="image_classification", proj_dim=2048)
        Trainer(max_epochs=10, callbacks=[collector]).fit(module, loader)
        scores = collector.attribute(target_loader)  # (n_train, n_targets)

    Args:
        save_dir: directory of the store. One that holds an earlier run is refused, unless that
            run is being resumed.
        task: name of a TRAK task, or a model output function, for the LightningModule's
            ``forward``.
        proj_dim: number of columns of the compressed gradients.
        seed: seed of the masks and of augmentations while collecting.
        proj_type: the scheme, as for `DropoutProjector`.
        fold: coordinates summed into each column, as for `DropoutProjector`.
        grad_wrt: names of the parameters to take gradients of; all when None.
        when: ``"epoch"`` collects at the end of every ``every_n_epochs``-th epoch, before the
            module's own ``on_train_epoch_end``; ``"checkpoint"`` whenever the Trainer saves a
            checkpoint during the fit, right after it, at the weights that it holds. (Lightning
            tells callbacks nothing of checkpoints with ``save_weights_only=True``.)
        every_n_epochs: how often, with ``when="epoch"``.
        batch_size: samples in a batch while collecting; that of the training loader when None.
        calibration_samples: training samples, evenly spaced, of which weighted dropout takes its
            statistics at the first collection.
        calibrate_each: take statistics of its own for every checkpoint.
        use_half_precision: store float16 instead of float32.
        overwrite: delete the store of an earlier run in ``save_dir``, and nothing else there,
            when training starts anew.

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
        fold: int = DEFAULT_FOLD,
        grad_wrt: list[str] | None = None,
        when: Literal["epoch", "checkpoint"] = "epoch",
        every_n_epochs: int = 1,
        batch_size: int | None = None,
        calibration_samples: int = 512,
        calibrate_each: bool = False,
        use_half_precision: bool = False,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        try:
            self._output = resolve_task(task)
            check_scheme(proj_type)
            check_integer("proj_dim", proj_dim, minimum=1)
            check_integer("fold", fold, minimum=1)
            seed = check_integer("seed", seed)
            check_integer("every_n_epochs", every_n_epochs, minimum=1)
            check_integer("calibration_samples", calibration_samples, minimum=1)
            if batch_size is not None:
                batch_size = check_integer("batch_size", batch_size, minimum=1)
            if when not in ("epoch", "checkpoint"):
                raise ValueError(f"when must be 'epoch' or 'checkpoint', got {when!r}")
            if Path(save_dir).exists() and not Path(save_dir).is_dir():
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
        self.batch_size = batch_size
        self.calibration_samples = calibration_samples
        self.calibrate_each = calibrate_each
        self.use_half_precision = use_half_precision
        self.overwrite = overwrite
        self.collect_seconds = 0.0
        self._run = uuid.uuid4().hex
        self._pending: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._collection: Collection | None = None
        self._module: pl.LightningModule | None = None

    # --- hooks -----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this collector's state in a checkpoint: several collectors may run at once."""
        return self._generate_state_key(save_dir=str(self.save_dir))

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
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"GradientCollector collects on one process, the Trainer runs {trainer.world_size}"
                "; use devices=1"
            )
        heard = [c for c in trainer.checkpoint_callbacks if not getattr(c, "save_weights_only", 0)]
        if self.when == "checkpoint" and not heard and not is_trial(trainer):
            rank_zero_warn(
                "GradientCollector(when='checkpoint') collects only if you call "
                "trainer.save_checkpoint: the Trainer has no checkpoint callback, or they all have "
                "save_weights_only=True, of which Lightning does not tell; use when='epoch', or "
                "add a ModelCheckpoint"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check data, model and store, and try one batch, before the first training step."""
        self._module, self._pending, self._collection = pl_module, None, None
        loader, size = training_data(trainer, self.batch_size)
        # Tried without statistics: those of weighted dropout are taken when collecting begins.
        trial = self._featurizer(pl_module, "dropout")
        with undisturbed(pl_module, self.seed):
            batch = to_device(pl_module, next(iter(loader)), pl_module.device)
            trial.features(batch, 0)
            trial.out_to_loss(batch)
        weights, transient = split_state(pl_module)
        check_storable(weights | transient)
        if is_trial(trainer):
            return
        resumed = position(trainer) > 0
        self._claim(resumed)
        featurizer = self._featurizer(pl_module, self.proj_type)
        projector = featurizer.projector
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
            task=task_name(self.task),
        )
        saver.describe_run(id=self._run)
        self._collection = Collection(
            featurizer, saver, self.calibration_samples, self.calibrate_each
        )
        self._collection.abandon_after(position(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect at the end of every n-th epoch."""
        self._collect_pending(trainer, pl_module)
        if self.when == "epoch" and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._collect(trainer, pl_module, describe_position(trainer), None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that the Trainer saves a checkpoint.

        It is collected at the next hook: by then the file is safe, and other callbacks have put
        their weights into the checkpoint (averaged ones, for example). No training step lies
        between.
        """
        if self.when == "checkpoint" and trainer.training | trainer.validating:
            self._pending = (describe_position(trainer), checkpoint)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Collect what the last batch's checkpoint holds."""
        self._collect_pending(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect what the last epoch's checkpoint holds."""
        self._collect_pending(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect what the last checkpoint holds."""
        self._collect_pending(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect a checkpoint saved at the very end; say so if nothing was collected at all."""
        self._collect_pending(trainer, pl_module)
        if self._collection is not None and not self._collection.count:
            rank_zero_warn(
                f"GradientCollector has collected nothing in this fit: when={self.when!r}, "
                f"every_n_epochs={self.every_n_epochs}"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of loaders and open files."""
        if stage == "fit":
            self._collection = self._pending = None

    # --- afterwards ------------------------------------------------------------------------

    @property
    def store(self) -> AttributionStore:
        """The store, with the module that was trained.

        Raises:
            FileNotFoundError: nothing has been collected yet.
        """
        return AttributionStore(self.save_dir, self._module, self.task)

    @property
    def model_ids(self) -> list[int]:
        """The checkpoints collected completely."""
        return self.store.model_ids

    def attribute(
        self,
        loader: Iterable[Any],
        *,
        model_ids: Iterable[int] | None = None,
        damping: float | str = "auto",
        progress: bool = True,
    ) -> NDArray[np.float32]:
        """Score every training sample for every target.

        Args:
            loader: batches of targets, as the task takes them.
            model_ids: the checkpoints to average; all collected ones when None.
            damping: relative damping, as for `DampedScoreComputer`.
            progress: whether to show a progress bar.

        Returns:
            float32 ``(n_train, n_targets)``; see `AttributionStore.attribute`.
        """
        return self.store.attribute(loader, model_ids=model_ids, damping=damping, progress=progress)

    def self_influence(
        self, model_ids: Iterable[int] | None = None, damping: float | str = "auto"
    ) -> NDArray[np.float64]:
        """Compute the influence of each training sample on itself, ``(n_train,)``.

        Args:
            model_ids: the checkpoints to average; all collected ones when None.
            damping: relative damping.

        Returns:
            float64, high for samples whose label is likely wrong; see
            `trak_dropout.self_influence`.
        """
        return self.store.self_influence(model_ids, damping)

    # --- inside ----------------------------------------------------------------------------

    def _featurizer(self, module: pl.LightningModule, proj_type: str) -> Featurizer:
        projector = DropoutProjector.from_model(
            module,
            self.proj_dim,
            self.seed,
            proj_type,
            module.device,
            grad_wrt=self.grad_wrt,
            fold=self.fold,
        )
        return Featurizer(module, self._output, projector, self.grad_wrt)

    def _claim(self, resumed: bool) -> None:
        """Refuse a directory that holds another run's collections, or empty it when asked."""
        if not (self.save_dir / MANIFEST).is_file():
            return
        manifest = Store(self.save_dir).manifest
        if resumed and manifest["run"].get("id") == self._run:
            return
        held = len(manifest["model_ids"])
        if held and resumed:
            raise StoreMismatchError(
                f"save_dir={str(self.save_dir)!r} holds {held} collections of another run than the "
                "one that is being resumed (or it was moved: the checkpoint knows a collector by "
                "the absolute path of its save_dir); give another save_dir"
            )
        if held and not self.overwrite:
            raise StoreMismatchError(
                f"save_dir={str(self.save_dir)!r} holds {held} collections "
                "of an earlier run; give another save_dir, resume that run with "
                "fit(ckpt_path=...), or set overwrite=True to delete them"
            )
        remove_store(self.save_dir)

    def _collect_pending(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._pending is not None:
            (facts, checkpoint), self._pending = self._pending, None
            self._collect(trainer, module, facts, checkpoint.get("state_dict"))

    def _collect(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        facts: dict[str, Any],
        weights: dict[str, Any] | None,
    ) -> None:
        """Collect at weights, or at the module's own when None."""
        collection = self._collection
        if collection is None or trainer.interrupted:
            return
        started = time.perf_counter()
        loader, size = training_data(trainer, self.batch_size)  # may have been reloaded
        changed = weights is not None and differs(module, weights)
        with undisturbed(module, self.seed, changed):
            if weights is not None and changed:
                load_weights(module, weights)
            progress = trainer.progress_bar_callback is not None
            collection.collect(module, loader, size, facts, progress)
        self.collect_seconds += time.perf_counter() - started
