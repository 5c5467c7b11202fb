"""From a store and a model to scores: what `TRAKer` does by hand, for stores that keep weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm
from trak.modelout_functions import TASK_TO_MODELOUT, AbstractModelOutput

from trak_dropout._checks import check_model
from trak_dropout._random import random_states_kept
from trak_dropout.curvature import check_curvature, row_factors
from trak_dropout.gradients import BatchError, FactoredGradientComputer
from trak_dropout.outputs import resolve_task, task_name
from trak_dropout.projector import DropoutProjector, NonFiniteGradientError
from trak_dropout.reading import in_dataset_order
from trak_dropout.scoring import DampedScoreComputer, check_damping
from trak_dropout.store import Store, StoreMismatchError
from trak_dropout.streaming import self_influence


class Featurizer:
    """Compressed per-sample gradients of a model, as ``TRAKer`` makes them, up to rounding.

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
        self._model = model
        self._computer = FactoredGradientComputer(
            model, task, projector.grad_dim, projector.dtype, projector.device, grad_wrt
        )
        self._normalize = torch.sqrt(torch.tensor(projector.grad_dim, dtype=torch.float32))

    def reload(self) -> None:
        """Take up the model's parameters and buffers, which may be other tensors than before."""
        self._computer.load_model_params(self._model)

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
        projector = self.projector
        if projector.calibrated(model_id):
            device = next(self._model.parameters()).device
            rows = self._computer.compute_into(batch, projector.shares(model_id, device))
            rows = projector.finish(rows, model_id)
        else:  # these gradients calibrate
            rows = projector.project(self._computer.compute_per_sample_grad(batch), model_id)
        return rows.div_(self._normalize)

    def bytes_per_sample(self, batch: Sequence[Tensor]) -> float:
        """Return what a sample of the last batch takes; see `FactoredGradientComputer`."""
        return self._computer.bytes_per_sample(batch)

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
            NonFiniteGradientError: one is NaN or infinite.
        """
        values = self._computer.compute_loss_grad(batch)
        bad = torch.nonzero(~torch.isfinite(values[:, 0])).flatten().tolist()
        if bad:
            raise NonFiniteGradientError(
                f"out-to-loss gradients of samples {bad[:10]} of the batch are NaN or infinite", bad
            )
        return values


class AttributionStore(Store):
    """A store with the model whose training it records: it attributes new targets.

    Args:
        save_dir: the directory that the Lightning callback wrote.
        model: a model of the architecture that was trained, whose submodule is found where
            gradients were collected of one; needed to attribute targets, not for self-influence.
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
        damping: float | str | Sequence[float | str] = "auto",
        curvature: str = "output",
        progress: bool = True,
    ) -> NDArray[np.float32]:
        """Score every training sample for every target.

        Args:
            loader: batches of targets, as the task takes them. A shuffling ``DataLoader`` is
                read in the order of its data set.
            model: a model of the architecture that was trained, where none was given before.
                Its weights and mode are as before afterwards, and so are random states.
            model_ids: the checkpoints to average; all complete ones when None.
            damping: relative damping, as for `DampedScoreComputer`; several in a list share the
                gradients and the Gram matrix.
            curvature: ``"output"``, as TRAK has it, or ``"loss"``: which gradients the inverted
                matrix is made of, see `trak_dropout.curvature`.
            progress: whether to show a progress bar.

        Returns:
            float32 ``(n_train, n_targets)``; positive where the training sample raises the
            target's output, such as the margin of its class. To the bit what ``TRAKer`` with
            the four plugs gives for the same checkpoints in float32. With several dampings
            ``(len(damping), n_train, n_targets)``, which agree with single ones to rounding.

        Raises:
            BatchError: the task cannot take the targets, or there are none.
            IncompleteStoreError: a checkpoint has not been collected completely.
            ReorderingError: the loader's ``collate_fn`` puts targets in an order of its own.
            StoreMismatchError: the model's parameters are not those in the store.
            TypeError: ``model`` is no module.
            ValueError: no model or task is known, or ``curvature`` is unknown.
        """
        check_curvature(curvature)
        chosen = self.choose(model_ids)
        one: float | str = "auto"
        dampings: list[float | str] | None = None
        if isinstance(damping, str | int | float | np.generic):
            one = check_damping(damping)
        elif not (dampings := [check_damping(value) for value in damping]):
            raise ValueError("damping is an empty list; give at least one value")
        scores: Tensor | float = 0.0
        out_to_loss: Any = 0.0
        for model_id, targets in self._featurized(loader, model, chosen, progress):
            computer = DampedScoreComputer(torch.float32, targets.device, one)
            grads = torch.from_numpy(np.array(self.grads(model_id))).to(targets.device)
            slopes = self.out_to_loss(model_id).astype(np.float32)
            factors = None
            if curvature == "loss":
                norms = torch.linalg.vector_norm(grads, dim=1, dtype=torch.float64)
                factors = row_factors(norms.cpu(), torch.from_numpy(slopes[:, 0]))
                factors = factors.to(grads.device, torch.float32).unsqueeze(1)
                grads = grads * factors
            gram = computer.get_xtx(grads)
            if isinstance(scores, float):
                shape = (len(grads), len(targets))
                scores = torch.zeros(shape if dampings is None else (len(dampings), *shape))
            if dampings is None:
                features = computer.get_x_xtx_inv(grads, gram)
                features = features if factors is None else features / factors
                computer.get_scores(features, targets, scores)
            else:
                for value, total in zip(dampings, scores, strict=True):
                    found = computer.scores(grads, gram, targets, value)
                    total += (found if factors is None else found / factors).to(total)
            out_to_loss = out_to_loss + slopes
        assert isinstance(scores, Tensor)
        return (scores.numpy() / float(len(chosen))) * (out_to_loss / float(len(chosen)))

    def add_targets(
        self,
        exp_name: str,
        loader: Iterable[Any],
        model: nn.Module | None = None,
        *,
        model_ids: Iterable[int] | None = None,
        progress: bool = True,
    ) -> int:
        """Compute the targets' compressed gradients and keep them, for `top_influences`.

        Files are TRAK's own, as ``TRAKer.start_scoring_checkpoint`` and ``score`` leave them.

        Args:
            exp_name: a name for these targets; those it stood for before are replaced.
            loader: batches of targets, as for `attribute`.
            model: as for `attribute`.
            model_ids: the checkpoints; all complete ones when None.
            progress: whether to show a progress bar.

        Returns:
            The number of targets.

        Raises:
            BatchError: the task cannot take the targets, or there are none.
            IncompleteStoreError: a checkpoint has not been collected completely.
            StoreMismatchError: the model's parameters are not those in the store.
            ValueError: no model or task is known, ``exp_name`` is no plain name, or a gradient does
                not fit the store's type.
        """
        if not exp_name or Path(exp_name).name != exp_name:
            raise ValueError(f"exp_name must be a plain name, got {exp_name!r}")
        count = 0
        self.remove_targets(exp_name)  # of checkpoints that are not among these now, too
        for model_id, targets in self._featurized(loader, model, self.choose(model_ids), progress):
            self.write_targets(model_id, exp_name, targets.cpu().numpy())
            count = len(targets)
        return count

    def _featurized(
        self,
        loader: Iterable[Any],
        model: nn.Module | None,
        chosen: Sequence[int],
        progress: bool,
    ) -> Iterator[tuple[int, Tensor]]:
        """Compressed gradients of targets at each checkpoint, ``(n_targets, proj_dim)``."""
        owner = self._model if model is None else model
        if owner is None:
            raise ValueError("model is needed to compute the targets' gradients; none was given")
        check_model(owner)
        model = self._part_of(owner)
        task = resolve_task(self._resolved_task())
        device = next(model.parameters()).device
        projector = self.projector(device)
        layout = projector.layout
        featurizer = Featurizer(model, task, projector, None if layout is None else layout.names)
        with random_states_kept():  # a loader draws a seed whenever it is read
            targets = list(in_dataset_order(loader))
        if not targets:
            raise BatchError("loader: there are no targets in it")
        bar = tqdm(total=len(chosen) * len(targets), desc="Attributing", disable=not progress)
        with preserved(model), bar:
            model.eval()
            for model_id in chosen:
                load_weights(model, self.weights(model_id) | self.transient_buffers(model_id))
                featurizer.reload()
                rows = []
                for i, batch in enumerate(targets):
                    try:
                        given = to_device(owner, batch, device, loader=0)
                        with own_precision(owner):
                            rows.append(featurizer.features(given, model_id))
                    except NonFiniteGradientError as error:
                        raise NonFiniteGradientError(
                            f"targets, batch {i}: {error}", error.samples
                        ) from error
                    bar.update()
                features = torch.cat(rows)
                if not len(features):
                    raise BatchError("loader: there are no targets in its batches")
                yield model_id, features

    def _part_of(self, model: nn.Module) -> nn.Module:
        """The submodule that gradients were collected of, where it is the whole module's."""
        name = self.manifest["run"].get("model")
        if name is None or not _has_transfer_hooks(model):
            return model
        try:
            return whole(model.get_submodule(name))
        except AttributeError:  # it is that part itself
            return model

    def self_influence(
        self,
        model_ids: Iterable[int] | None = None,
        damping: float | str = "auto",
        *,
        curvature: str = "output",
    ) -> NDArray[np.float64]:
        """Compute the influence of each training sample on itself, ``(n_train,)``.

        Args:
            model_ids: the checkpoints to average; all complete ones when None.
            damping: relative damping.
            curvature: as for `attribute`.

        Returns:
            As `trak_dropout.self_influence`.
        """
        return self_influence(self, model_ids, damping, curvature=curvature)

    def _resolved_task(self) -> str | AbstractModelOutput:
        recorded = self.settings.task
        if self._task is not None:
            if recorded is not None and task_name(self._task) != recorded:
                raise StoreMismatchError(
                    f"task is {recorded!r} in the store at {self.save_dir}, "
                    f"{task_name(self._task)!r} given: their gradients are not comparable"
                )
            return self._task
        if recorded is None:
            raise ValueError(
                f"{self.save_dir} was not written by the Lightning callback, so it holds neither "
                "task nor weights; score its targets with TRAKer and your own checkpoints"
            )
        if recorded not in TASK_TO_MODELOUT:
            raise ValueError(
                f"task is needed: {self.save_dir} was collected with the model output function "
                f"{recorded!r}, which cannot be built from its name; "
                "give it to open_store(..., task=...)"
            )
        return recorded


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


def to_device(model: nn.Module, batch: Any, device: torch.device, loader: int | None = None) -> Any:
    """Move a batch to a device, as Lightning would where the model is a LightningModule.

    That is through the transfer hooks of the module or of its Trainer's data module, and with the
    input conversion of the Trainer's precision.

    Args:
        model: the model that will take the batch.
        batch: what a loader gave.
        device: where the model is.
        loader: the number of a target loader; None for the training data. Hooks are given it, and
            a Trainer that validates: many augment while it trains.

    Returns:
        The batch on the device.
    """
    if _has_transfer_hooks(model):
        module: Any = model
        trainer, number = module._trainer, loader or 0
        with nullcontext() if loader is None or trainer is None else _validating(trainer):
            batch = module._on_before_batch_transfer(batch, number)
            batch = module._apply_batch_transfer_handler(batch, device, number)
        return batch if trainer is None else trainer.precision_plugin.convert_input(batch)
    if callable(getattr(batch, "to", None)):  # a tensor, or what Hugging Face's tokenizers return
        return batch.to(device)
    return tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, batch)


def _has_transfer_hooks(model: nn.Module) -> bool:
    """Whether a model is a LightningModule."""
    return hasattr(model, "_apply_batch_transfer_handler")


@contextmanager
def _validating(trainer: Any) -> Iterator[None]:
    """Have a Trainer say that it validates."""
    before = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = before


def own_precision(model: nn.Module) -> AbstractContextManager[Any]:
    """Let a model create tensors of the type that they have in training.

    Under Lightning's ``"bf16-true"`` and ``"64-true"`` a forward finds another default type.

    Args:
        model: the model; nothing is changed unless it is a LightningModule that has a Trainer.
    """
    trainer: Any = getattr(model, "_trainer", None)
    return nullcontext() if trainer is None else trainer.precision_plugin.tensor_init_context()


def whole(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model's parameters and buffers, in place.

    Args:
        model: the model.
        weights: name to tensor, as a state dict; further entries are ignored.

    Raises:
        StoreMismatchError: a parameter is missing, or one or a buffer has another shape.
    """
    parameters = dict(model.named_parameters())
    tensors = {**parameters, **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if name not in weights and name not in parameters:
            continue
        found = weights[name].shape if name in weights else None
        if found != tensor.shape:
            raise StoreMismatchError(
                f"model has {name} {tuple(tensor.shape)}, which in the store's weights is "
                f"{'missing' if found is None else tuple(found)}; "
                "give a model of the architecture that was trained"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in weights:
                tensor.copy_(weights[name])


def split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a model's state dict, and the buffers that it leaves out.

    Args:
        model: the model; a ``state_dict`` method of its own is passed over, as it may leave out
            parameters.

    Returns:
        Tensors of the state dict, and non-persistent buffers, by name; not copied.
    """
    state = nn.Module.state_dict(model)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in model.named_buffers() if name not in tensors}
    return tensors, rest


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
