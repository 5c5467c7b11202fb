"""Mode ``"training"``: rows from the training backward itself, in a block for each epoch."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from trak_dropout._files import checksum
from trak_dropout.attribution import split_state
from trak_dropout.gradients import FactorError
from trak_dropout.gradients.intake import Shares
from trak_dropout.gradients.live import CallLayout, LiveGradients, NoRuleError, Reduction
from trak_dropout.lightning.blocks import (
    BlockWriter,
    goes_on,
    keep_others,
    merge,
    rows_of,
    set_aside,
)
from trak_dropout.lightning.calibration import calibrate_by_steps, take_over_statistics
from trak_dropout.lightning.order import Listener, Pass, check_loader, pass_in_use
from trak_dropout.lightning.position import is_trial, position
from trak_dropout.lightning.processes import Processes
from trak_dropout.lightning.subject import parameter_names, submodule
from trak_dropout.lightning.tryout import TryoutError, try_training_step
from trak_dropout.projector import DropoutProjector
from trak_dropout.store import ManifestSaver
from trak_dropout.visits import NOT_STORED, VISITS, Batch, Visits

_LOG = logging.getLogger(__name__)
ROWS = "minus the gradient of the training loss"
_BATCHES_HELD, _BYTES_HELD = 1024, 2**24

Claim = Callable[[DropoutProjector, int], ManifestSaver]
"""Opens the store, in the first process, for a projector's rows of so many samples."""


class TrainingRows:
    """Takes rows from training batches and writes them, in a block for each epoch.

    Training goes on as it would have, to the bit. Its methods are called at the hooks of the same
    names.

    Args:
        projector: makes the projector for the parameters of a model that it is given, of another
            scheme where one is named.
        part: the submodule whose gradients are taken, by name; the module itself when None.
        grad_wrt: names or patterns of its parameters; all that are trained when None.
        reduction: whether the loss is the mean or the sum of the samples' losses; ``"auto"`` to
            find out.
        self_check: compare rows with plain autograd, before training begins and now and then.
        calibration_samples: samples of which weighted dropout takes statistics.
        calibrate_each: take statistics of its own for every epoch.
    """

    def __init__(
        self,
        projector: Callable[..., DropoutProjector],
        part: str | None,
        grad_wrt: str | Sequence[str] | None,
        reduction: Reduction | str,
        self_check: bool,
        calibration_samples: int,
        calibrate_each: bool,
    ) -> None:
        self._make_projector, self._part, self._grad_wrt = projector, part, grad_wrt
        self._reduction, self._self_check = reduction, self_check
        self._calibration_samples, self._calibrate_each = calibration_samples, calibrate_each
        self._listener: Listener | None = None
        self._live: LiveGradients | None = None
        self._saver: ManifestSaver | None = None
        self._block: _Block | None = None
        self._pass: Pass | None = None

    # --- hooks -----------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse what cannot work, and begin to listen to the order of samples."""
        self.stop()
        if not module.automatic_optimization:
            raise MisconfigurationException(
                "GradientCollector(mode='training') needs automatic optimization: with manual "
                "optimization nothing tells which backward is that of the training loss; use "
                "mode='checkpoint'"
            )
        compiled = getattr(module, "_compiler_ctx", None) is not None or any(
            hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
            for part in module.modules()
        )
        if compiled:
            raise MisconfigurationException(
                "GradientCollector(mode='training') cannot look into a module that torch.compile "
                "compiles; train it as it is, or use mode='checkpoint'"
            )
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                "GradientCollector(mode='training') cannot know which samples a training_step that "
                "takes dataloader_iter reads; take batch, or use mode='checkpoint'"
            )
        self._listener = Listener(trainer)

    def on_train_start(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        root: Path,
        claim: Claim,
        processes: Processes,
    ) -> None:
        """Check module and data, try a step, and open the store."""
        loader: Any = trainer.train_dataloader
        check_loader(loader)
        size = _size_of(loader)
        self._root, self._processes, self._size = root, processes, size
        with processes.together():
            self._model = submodule(module, self._part)
            self._names = self._trained()
            self._projector = self._make_projector(self._model, self._names)
            # Tried without statistics: those of weighted dropout are taken when an epoch begins.
            trial = self._make_projector(self._model, self._names, "dropout")
            shares = trial.shares(0, module.device)
            self._layouts, reduction = self._try(trainer, module, shares)
        processes.same("the reduction of the loss", reduction)
        processes.same("the number of training samples", size)
        if is_trial(trainer):
            return
        self._live = LiveGradients(
            self._model,
            shares,
            self._names,
            layouts=self._layouts,
            reduction=reduction,
            check=self._self_check,
        )
        self._mean = reduction == "mean"
        self._scale_down = -1.0 / math.sqrt(self._projector.grad_dim)
        self._position = position(trainer)

        def open_store() -> None:
            self._saver = claim(self._projector, size)
            meets = [
                name
                for name, part in module.named_modules()
                if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training
            ]
            self._saver.describe_run(
                mode="training", rows=ROWS, reduction=reduction, batch_statistics=meets
            )
            for model_id, facts in self._saver.manifest["model_ids"].items():
                if facts.get("batches", -1) > self._position and not facts.get("abandoned"):
                    self._saver.describe(int(model_id), abandoned=True)

        processes.agree(open_store)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch_idx: int
    ) -> None:
        """Announce a batch."""
        if self._live is None:
            return
        epoch = trainer.current_epoch
        if self._block is None or self._block.epoch != epoch:
            self._finish_block(trainer)
            self._pass = pass_in_use(trainer)
            size = _size_of(trainer.train_dataloader)
            if size != self._size:
                raise MisconfigurationException(
                    f"GradientCollector(mode='training'): the training dataset has {size} samples "
                    f"in epoch {epoch}, {self._size} when training started; reload one of the "
                    "same size, or collect into another save_dir"
                )
            # A run that is resumed within an epoch counts on, but its loader begins anew.
            self._first_batch = batch_idx if position(trainer) == self._position + 1 else 0
            self._open_block(trainer, module)
        assert self._pass is not None
        self._indices = self._pass.indices(batch_idx - self._first_batch)
        self._step = trainer.global_step
        self._live.begin(len(self._indices))

    def on_before_backward(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Announce its backward."""
        if self._live is None or self._block is None:
            return
        scale: float | Tensor = 1 / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            one = torch.ones((), device=loss.device)
            scale = scale * scaler.scale(one)  # on the device: reading it would wait
        try:
            self._live.expect(scale)
        except RuntimeError as error:
            raise MisconfigurationException(
                "GradientCollector(mode='training') needs one backward for each batch, but the "
                "optimizer (such as LBFGS) or the module asked for another; use mode='checkpoint'"
            ) from error

    def on_after_backward(self, trainer: pl.Trainer) -> None:
        """Take the batch's rows."""
        if self._live is None or self._block is None:
            return
        rows = self._live.end().mul_(self._scale_down)
        count = len(self._indices)
        share = 1 / (trainer.accumulate_grad_batches * trainer.world_size)
        batch = Batch(
            index=self._indices,
            batch=position(trainer),
            step=self._step,
            rank=trainer.global_rank,
            share=share / count if self._mean else share,
            learning_rate=_learning_rates(trainer.optimizers[0]),
        )
        self._block.add(batch, rows)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Note the learning rate of the step that the last batches take part in."""
        if self._block is not None:
            self._block.stepped(_learning_rates(optimizer))

    def on_train_epoch_end(self, trainer: pl.Trainer) -> None:
        """Complete the epoch's block."""
        self._finish_block(trainer)

    def on_save_checkpoint(self) -> None:
        """Bring to disk what a run that is resumed from this checkpoint will not see again."""
        if self._block is not None:
            self._block.sync()

    def on_exception(self) -> None:
        """Bring rows to disk: a checkpoint may be saved after this, and resumed from."""
        if self._block is not None and not self._block.failed:
            try:
                self._block.sync()
            except OSError as error:  # the exception that ended the fit comes first
                _LOG.error("GradientCollector: the last rows could not be written: %s", error)

    def stop(self) -> None:
        """Take hooks off the module and the loader, and close files; what is written stays."""
        if self._live is not None:
            self._live.stop()
        if self._listener is not None:
            self._listener.stop()
        if self._block is not None:
            self._block.close()
        self._live = self._listener = self._block = self._saver = self._pass = None

    # --- inside ----------------------------------------------------------------------------

    def _trained(self) -> list[str]:
        """Names of the parameters to take gradients of."""
        trained = [name for name, weight in self._model.named_parameters() if weight.requires_grad]
        chosen = parameter_names(self._model, self._grad_wrt)
        frozen = sorted(set(chosen or ()) - set(trained))
        if frozen:
            raise MisconfigurationException(
                f"GradientCollector(mode='training'): grad_wrt names {', '.join(frozen[:10])}, "
                "which training does not change (requires_grad is False)"
            )
        return trained if chosen is None else chosen

    def _try(
        self, trainer: pl.Trainer, module: pl.LightningModule, shares: Shares
    ) -> tuple[Mapping[str, Sequence[CallLayout]] | None, Reduction]:
        """Learn where layers have their samples, and how the loss is reduced."""
        given: Any = None if self._reduction == "auto" else self._reduction
        try:
            layouts, found = try_training_step(
                trainer, module, self._part, shares, self._names, self._self_check
            )
        except TryoutError as error:
            if given is None:
                raise MisconfigurationException(
                    "GradientCollector(mode='training') could not compare rows beforehand: "
                    f"{error}. Where every layer has its samples in the first dimension, say what "
                    "the training loss is of their losses: reduction='mean' or 'sum'"
                ) from error
            rank_zero_warn(
                f"GradientCollector(mode='training') could not compare rows beforehand: {error}. "
                "It takes the first dimension of every layer's tensors for the samples, and the "
                f"loss for their {given}; sums over samples are still checked"
            )
            return None, given
        except NoRuleError as error:
            raise MisconfigurationException(
                f"GradientCollector(mode='training'): {error}. To leave them out: grad_wrt="
                f"{[name for name in self._names if name not in set(error.parameters)]}"
            ) from error
        except FactorError as error:
            raise MisconfigurationException(
                f"GradientCollector(mode='training'): {error}. Where that is meant, self_check="
                "False takes what comes through each sample's own inputs and output gradients"
            ) from error
        if found is not None and given not in (None, found):
            raise MisconfigurationException(
                f"GradientCollector(reduction={given!r}): the training loss is the {found} of the "
                "samples' losses"
            )
        if found is None and given is None:
            rank_zero_warn(
                "GradientCollector(mode='training', self_check=False): rows do not tell whether "
                "the training loss is the mean or the sum of the samples' losses; it is taken for "
                "the mean. Give reduction='mean' or 'sum'"
            )
        return layouts, found or given or "mean"

    def _open_block(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin the block of an epoch, or go on with it where a resumed run does."""
        assert self._live is not None
        self._refuse_unfrozen()
        epoch, after, columns = trainer.current_epoch, self._position, self._projector.proj_dim

        def begin() -> tuple[int, str | None, bool]:
            assert self._saver is not None
            known = self._saver.manifest["model_ids"]
            ids = [int(m) for m, facts in known.items() if facts.get("epoch") == epoch]
            model_id = ids[-1] if ids else max([-1, *map(int, known), *self._saver.dropped]) + 1
            earlier, again = set_aside(self._root / str(model_id), self._processes.count)
            if not again:
                with _room(self._root / str(model_id)):
                    self._saver.register_model_id(model_id, True)
            else:
                self._saver.load_current_store(model_id)
                self._saver.current_model_id = model_id
                directory, count = self._root / str(model_id), self._processes.count
                keep_others(directory, self._size, columns, count, after)
            self._saver.describe(model_id, epoch=epoch, mode="training", finished=False)
            return model_id, None if earlier is None else str(earlier), again

        model_id, earlier, again = self._processes.agree(begin)
        self._calibrate(trainer, module, model_id if self._calibrate_each else None)
        with self._processes.together():
            directory, rank = self._root / str(model_id), self._processes.rank
            kept = None
            if again and (directory / f"visits.{rank}.part").is_file():
                kept = Visits.load(directory / f"visits.{rank}.part")
                kept = kept[kept.batch <= after]
            elif again:
                kept = Visits.none()
            writer = BlockWriter(directory, self._size, columns, rank, kept)
            self._block = _Block(
                epoch, model_id, writer, columns, None if earlier is None else Path(earlier)
            )
            if earlier is not None and not again:
                before = Visits.load(Path(earlier) / VISITS)
                mine = before.rank % self._processes.count == rank  # there may have been more
                before = before[mine & (before.batch <= after)]
                writer.add(before, rows_of(Path(earlier), before))
                writer.sync()
            self._live.shares = self._projector.shares(model_id, module.device)
            self._live.start()

    def _calibrate(
        self, trainer: pl.Trainer, module: pl.LightningModule, owner: int | None
    ) -> None:
        """Take the statistics that weighted dropout needs, unless the store has them."""
        projector, saver, of = self._projector, self._saver, (self._model, self._names)
        if projector.proj_type != "weighted_dropout":
            return
        if self._processes.agree(lambda: owner not in projector.statistics):
            with self._processes.together():  # in all, because a step may talk to the others
                try:
                    calibrate_by_steps(
                        projector if self._processes.is_first else self._make_projector(*of),
                        owner,
                        trainer,
                        module,
                        self._part,
                        self._layouts,
                        self._calibration_samples,
                    )
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    raise MisconfigurationException(
                        "GradientCollector(mode='training', proj_type='weighted_dropout') could "
                        f"not calibrate with training steps: {error}; use another proj_type"
                    ) from error

            def keep() -> None:
                assert saver is not None
                saver.save_statistics()

            self._processes.agree(keep)
        with self._processes.together():
            take_over_statistics(projector, self._root, self._processes)

    def _refuse_unfrozen(self) -> None:
        """Raise where parameters are trained that were not when training started."""
        fresh = [
            name
            for name, weight in self._model.named_parameters()
            if weight.requires_grad and name not in set(self._names)
        ]
        if fresh and self._grad_wrt is None:
            raise MisconfigurationException(
                f"GradientCollector(mode='training'): {', '.join(fresh[:10])} were frozen when "
                "training started and are trained now; name the parameters to collect in grad_wrt"
            )

    def _finish_block(self, trainer: pl.Trainer) -> None:
        """Complete the block that is open, if any."""
        block = self._block
        if block is None or trainer.interrupted:
            return
        with self._processes.together():
            block.sync()
            block.close()

        def finish() -> None:
            saver = self._saver
            assert saver is not None
            directory = self._root / str(block.model_id)
            visits = merge(directory)
            if not len(visits) and block.earlier is None:  # such as a pass for batch statistics
                saver.forget(block.model_id)
                return
            stored = np.zeros(self._size, bool)
            stored[visits.index[visits.place != NOT_STORED]] = True
            saver.load_current_store(block.model_id)
            saver.current_store["is_featurized"][:] = stored
            saver.current_store["out_to_loss"][:] = stored[:, None]
            for name in ("is_featurized", "out_to_loss"):
                saver.current_store[name].flush()
            saver.save_weights(block.model_id, *split_state(self._model))
            saver.serialize_current_model_id_metadata()
            lost = int((visits.place == NOT_STORED).sum())
            saver.describe(
                block.model_id,
                global_step=trainer.global_step,
                batches=position(trainer),
                visits=len(visits),
                samples=int(stored.sum()),
                not_finite=lost,
                finished=True,
                abandoned=False,
                checksums={
                    name: checksum(directory / f"{name}.mmap") for name in ("grads", "out_to_loss")
                },
            )
            if block.earlier is not None:
                if goes_on(block.earlier, directory):
                    shutil.rmtree(block.earlier)
                else:
                    rank_zero_warn(
                        f"GradientCollector: epoch {block.epoch} went another way than before; "
                        f"what was collected then is kept in {block.earlier}"
                    )
            if lost:
                rank_zero_warn(
                    f"GradientCollector: gradients of {lost} training samples of epoch "
                    f"{block.epoch} were NaN or infinite and are not stored (a loss scale that was "
                    "too large, or training that diverges)"
                )

        self._processes.agree(finish)
        self._block = None
        self._refuse_unfrozen()  # such as in the middle of the epoch


class _Block:
    """The block under way; rows wait on their device until there are enough to be worth reading.

    Args:
        epoch: whose.
        model_id: its number in the store.
        writer: where rows go.
        columns: of the rows.
        earlier: what was collected of this epoch before, if anything.
    """

    def __init__(
        self, epoch: int, model_id: int, writer: BlockWriter, columns: int, earlier: Path | None
    ) -> None:
        self.epoch, self.model_id, self.earlier = epoch, model_id, earlier
        self._writer, self._width = writer, 4 * columns
        self._rows: list[Tensor] = []
        self._batches: list[Batch] = []
        self._since_step = 0
        self._held = 0
        self.failed = False

    def add(self, batch: Batch, rows: Tensor) -> None:
        """Take a batch's rows."""
        size = len(self._writer.seen)
        if len(batch.index) and not 0 <= batch.index.min() <= batch.index.max() < size:
            outside = batch.index[(batch.index < 0) | (batch.index >= size)]
            raise MisconfigurationException(
                f"GradientCollector(mode='training'): the sampler drew {outside[:5].tolist()}, the "
                f"training dataset has {size} samples"
            )
        self._rows.append(rows)
        self._batches.append(batch)
        self._since_step += 1
        self._held += len(batch.index) * self._width
        if len(self._rows) >= _BATCHES_HELD or self._held >= _BYTES_HELD:
            self._flush(len(self._rows) - self._since_step or len(self._rows))

    def stepped(self, learning_rate: Sequence[float]) -> None:
        """Note the learning rate of the optimizer step that follows."""
        for batch in self._batches[len(self._batches) - self._since_step :]:
            batch.learning_rate = learning_rate
        self._since_step = 0

    def sync(self) -> None:
        """Bring everything to disk."""
        self._flush(len(self._rows))
        with self._writing():
            self._writer.sync()

    def close(self) -> None:
        """Close files; rows that wait are dropped."""
        self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What failed once is not tried again: rows may be written in part."""
        self.failed = True
        with _room(self._writer.directory):
            yield
        self.failed = False

    def _flush(self, count: int) -> None:
        """Write the rows of the first batches."""
        if count:
            rows = torch.cat(self._rows[:count]).float().cpu().numpy()
            with self._writing():
                self._writer.add(Visits.of(self._batches[:count]), rows)
        self._rows, self._batches = self._rows[count:], self._batches[count:]
        self._since_step = min(self._since_step, len(self._rows))
        self._held = sum(len(batch.index) * self._width for batch in self._batches)


@contextmanager
def _room(directory: Path) -> Iterator[None]:
    """Say what can be done where a disk is full."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"no room for the rows of an epoch: {error.strerror}. Earlier epochs are as they were; "
            "make room, use a smaller proj_dim, or another save_dir",
            str(directory),
        ) from error


def _learning_rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _size_of(loader: Any) -> int:
    """The number of samples of a map-style data set."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) or not len(dataset):
        raise MisconfigurationException(
            "GradientCollector(mode='training') needs a training dataset with a length and an "
            f"index for each sample, got {type(dataset).__name__}; wrap it in a map-style dataset"
        )
    return len(dataset)
