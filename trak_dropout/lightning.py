"""`GradientCollector`: collects compressed per-sample gradients while a Lightning Trainer fits."""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler
from tqdm import tqdm
from trak.modelout_functions import AbstractModelOutput

from trak_dropout._checks import check_integer
from trak_dropout._safetensors import check_storable
from trak_dropout.attribution import (
    AttributionStore,
    Featurizer,
    inner_sampler,
    load_weights,
    preserved,
    sequential_loader,
    split_state,
    to_device,
)
from trak_dropout.gradients import BatchError
from trak_dropout.masks import DEFAULT_FOLD, check_scheme
from trak_dropout.outputs import resolve_task, task_name
from trak_dropout.projector import DropoutProjector, NonFiniteGradientError
from trak_dropout.store import MANIFEST, ManifestSaver, Store, StoreMismatchError, remove_store

_LOG = logging.getLogger(__name__)


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
        self._collection: _Collection | None = None
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
        if self.when == "checkpoint" and not heard and not _is_trial(trainer):
            rank_zero_warn(
                "GradientCollector(when='checkpoint') collects only if you call "
                "trainer.save_checkpoint: the Trainer has no checkpoint callback, or they all have "
                "save_weights_only=True, of which Lightning does not tell; use when='epoch', or "
                "add a ModelCheckpoint"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check data, model and store, and try one batch, before the first training step."""
        self._module, self._pending, self._collection = pl_module, None, None
        loader, size = self._training_data(trainer)
        # Tried without statistics: those of weighted dropout are taken when collecting begins.
        trial = self._featurizer(pl_module, "dropout")
        with self._undisturbed(pl_module):
            batch = to_device(pl_module, next(iter(loader)), pl_module.device)
            trial.features(batch, 0)
            trial.out_to_loss(batch)
        weights, transient = split_state(pl_module)
        check_storable(weights | transient)
        if _is_trial(trainer):
            return
        resumed = _position(trainer) > 0
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
        self._collection = _Collection(
            featurizer, saver, self.calibration_samples, self.calibrate_each
        )
        self._collection.abandon_after(_position(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect at the end of every n-th epoch."""
        self._collect_pending(trainer, pl_module)
        if self.when == "epoch" and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._collect(trainer, pl_module, _facts(trainer), None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that the Trainer saves a checkpoint.

        It is collected at the next hook: by then the file is safe, and other callbacks have put
        their weights into the checkpoint (averaged ones, for example). No training step lies
        between.
        """
        if self.when == "checkpoint" and trainer.training | trainer.validating:
            self._pending = (_facts(trainer), checkpoint)

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

    def _training_data(self, trainer: pl.Trainer) -> tuple[DataLoader[Any], int]:
        """The training loader, rebuilt in data-set order, and the number of samples."""
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise MisconfigurationException(
                "GradientCollector needs a single torch DataLoader as training loader, got "
                f"{type(loader).__name__}"
            )
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise MisconfigurationException(
                f"GradientCollector needs a training dataset with a length and an order, got "
                f"{type(dataset).__name__}; wrap it in a map-style dataset with __len__"
            )
        if len(dataset) == 0:
            raise MisconfigurationException("GradientCollector: the training dataset is empty")
        sampler = inner_sampler(loader)
        if isinstance(sampler, SubsetRandomSampler):
            raise MisconfigurationException(
                "GradientCollector takes the training dataset as a whole, but the loader samples "
                "a subset of it; give the loader torch.utils.data.Subset(dataset, indices)"
            )
        drawn = len(sampler) if isinstance(sampler, Sized) else len(dataset)
        if drawn < len(dataset) or trainer.num_training_batches < len(loader):
            rank_zero_warn(
                f"GradientCollector collects all {len(dataset)} samples of the training dataset, "
                "but the Trainer trains on fewer of them in an epoch (a sampler, "
                "limit_train_batches or overfit_batches): samples never trained on get scores, too"
            )
        try:
            return sequential_loader(loader, self.batch_size), len(dataset)
        except ValueError as error:
            raise MisconfigurationException(f"GradientCollector: {error}") from error

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
        loader, size = self._training_data(trainer)  # may have been reloaded
        changed = weights is not None and _differs(module, weights)
        with self._undisturbed(module, changed):
            if weights is not None and changed:
                load_weights(module, weights)
            progress = trainer.progress_bar_callback is not None
            collection.collect(module, loader, size, facts, progress)
        self.collect_seconds += time.perf_counter() - started

    @contextmanager
    def _undisturbed(self, module: pl.LightningModule, weights: bool = False) -> Iterator[None]:
        """Compute gradients in eval mode, and leave everything as it was found."""
        # A checkpoint may be saved from the validation loop, which runs in inference mode.
        with (
            isolate_rng(),
            torch.inference_mode(False),
            torch.enable_grad(),
            preserved(module, weights),
        ):
            random.seed(self.seed)
            np.random.seed(self.seed % 2**32)  # noqa: NPY002  # for data sets that use it
            torch.manual_seed(self.seed % 2**63)
            module.eval()
            yield


class _Collection:
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


def _position(trainer: pl.Trainer) -> int:
    """How many training batches have been begun: unlike global_step, for any optimizer."""
    return trainer.fit_loop.total_batch_idx + 1


def _facts(trainer: pl.Trainer) -> dict[str, Any]:
    """What the manifest says of a checkpoint."""
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "batches": _position(trainer),
    }


def _is_trial(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Lightning


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name].cpu()) for name, tensor in first.items()
    )


def _differs(module: pl.LightningModule, weights: dict[str, Any]) -> bool:
    """Whether the module's parameters or buffers are other than those of a state dict."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return any(
        name in weights and not torch.equal(tensor, weights[name].to(tensor.device))
        for name, tensor in tensors
    )


def _miscounted(given: int, size: int) -> str:
    return (
        f"the training loader's batches hold {given} samples, the training dataset {size}: "
        "collate_fn must neither drop nor add samples"
    )
