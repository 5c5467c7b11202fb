"""What is on disk: TRAK's own files, and beside them a manifest that makes them safe to reopen.

``ManifestSaver`` is the plug for TRAK's saver socket and writes; ``Store`` reads. A store is a
directory::

    metadata.json, id_<m>.json, experiments.json, scores/    as TRAK writes them
    <m>/grads.mmap, out_to_loss.mmap, features.mmap, _is_featurized.mmap    likewise
    <m>/weights.safetensors      the checkpoint's weights, where the Lightning callback collected
    <m>/transient.safetensors    its buffers outside the state dict
    statistics_<m>.safetensors    what weighted dropout draws by, for checkpoint m or "shared"
    manifest.json    how the features came about
    manifest.lock, experiments.lock    empty; whoever changes these files locks them

A plain ``TRAKer`` opens it, since the manifest lies beside its files and changes none of them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from trak.savers import MmapSaver

from trak_dropout._files import allocate_matrix, locked, remove_leftovers, replacing, write_json
from trak_dropout._html import as_bytes, describe_html
from trak_dropout._safetensors import load_tensors, save_tensors
from trak_dropout.masks import Layout
from trak_dropout.progress import PREFIX
from trak_dropout.projector import DropoutProjector
from trak_dropout.rowfile import IncompleteStoreError, RowFile, read_object
from trak_dropout.scaling import StorageScales
from trak_dropout.statistics import GradientStatistics

_LOG = logging.getLogger(__name__)
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_LOCK = "manifest.lock"
_EXPERIMENTS, _EXPERIMENTS_LOCK = "experiments.json", "experiments.lock"


class StoreMismatchError(ValueError):
    """A store on disk belongs to other settings than those given."""


@dataclass(frozen=True)
class StoreSettings:
    """Everything that must be the same for features to be comparable.

    Args:
        scheme: the projector's ``proj_type``.
        fold: coordinates summed into a column.
        seed: seed of the masks.
        proj_dim: number of columns.
        grad_dim: number of gradient coordinates.
        parameters: name and shape of each parameter in coordinate order; None when unknown.
        train_set_size: number of training samples (rows).
        dtype: storage type, ``"float32"`` or ``"float16"``.
        task: name of the model output function; None when unknown.
    """

    scheme: str
    fold: int
    seed: int
    proj_dim: int
    grad_dim: int
    parameters: tuple[tuple[str, tuple[int, ...]], ...] | None
    train_set_size: int
    dtype: str
    task: str | None = None

    @classmethod
    def of(
        cls, projector: DropoutProjector, train_set_size: int, dtype: str, task: str | None = None
    ) -> StoreSettings:
        """Return the settings under which a projector's output is stored."""
        layout = projector.layout
        return cls(
            scheme=projector.proj_type,
            fold=projector.fold,
            seed=projector.seed,
            proj_dim=projector.proj_dim,
            grad_dim=projector.grad_dim,
            parameters=None
            if layout is None
            else tuple(zip(layout.names, layout.shapes, strict=True)),
            train_set_size=train_set_size,
            dtype=dtype,
            task=task,
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StoreSettings:
        """Return the settings that a manifest holds."""
        parameters = content["parameters"]
        if parameters is not None:
            parameters = tuple((name, tuple(shape)) for name, shape in parameters)
        return cls(**{**content, "parameters": parameters})

    def differences(self, other: StoreSettings) -> list[str]:
        """Say how another's settings differ; what either leaves unknown does not count."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name} is {mine[name]!r} in the store, {theirs[name]!r} given"
            if name != "parameters"
            else _parameter_difference(mine[name], theirs[name])
            for name in mine
            if mine[name] != theirs[name] and None not in (mine[name], theirs[name])
        ]

    def projector(self, device: str | torch.device = "cpu") -> DropoutProjector:
        """Build a projector of these settings, with float32 output and without statistics."""
        layout = None
        if self.parameters is not None:
            names, shapes = zip(*self.parameters, strict=True)
            layout = Layout(names, shapes)
        return DropoutProjector(
            self.grad_dim,
            self.proj_dim,
            self.seed,
            self.scheme,
            device,
            fold=self.fold,
            layout=layout,
        )


class ManifestSaver(MmapSaver):
    """TRAK's saver with a manifest beside its files.

    Reopening a directory with anything different raises before anything is written. What storage
    cannot hold (NaN, infinities, float16 overflow, rows that float16 would turn to zero) is refused
    instead of stored. Processes that write checkpoints of their own may share a directory.

    Args:
        save_dir: the directory.
        metadata: TRAK's metadata.
        train_set_size: number of training samples.
        proj_dim: number of columns.
        load_from_save_dir: as for TRAK's savers.
        logging_level: as for TRAK's savers.
        use_half_precision: store float16 instead of float32.
        projector: the projector whose output is stored.
        task: name of the model output function, or what returns it; None when unknown.

    Raises:
        StoreMismatchError: the directory holds features of other settings, or features without
            a manifest, or the projector is not the one that ``metadata`` speaks of.
    """

    def __init__(
        self,
        save_dir: str | Path,
        metadata: dict[str, Any],
        train_set_size: int,
        proj_dim: int,
        load_from_save_dir: bool,
        logging_level: int,
        use_half_precision: bool,
        *,
        projector: DropoutProjector,
        task: str | Callable[[], str | None] | None = None,
    ) -> None:
        given = (proj_dim, metadata.get("JL matrix type"))
        if given != (projector.proj_dim, projector.proj_type):
            raise StoreMismatchError(
                f"TRAKer projects with (proj_dim, type) = {given}, but the saver was made for "
                f"{projector!r}; give TRAKer the projector and the saver of one plugin() call"
            )
        self.settings = StoreSettings.of(
            projector,
            train_set_size,
            "float16" if use_half_precision else "float32",
            task() if callable(task) else task,
        )
        root = Path(save_dir).resolve()
        self.manifest = _claim(root, self.settings)
        self._projector = projector
        _share_statistics(root, self.manifest, projector)
        # TRAK would write them, but not whole, or not at all without load_from_save_dir.
        for name, content in (("metadata.json", metadata), (_EXPERIMENTS, {})):
            if not _is_json(root / name):
                write_json(root / name, content)
        self._scales = (
            StorageScales(
                projector.grad_dim**0.5,
                _scales(self.manifest),
                self._choose_scale,
                _scales(self.manifest, "features_divided_by"),
                lambda model_id, by: self.describe(model_id, features_divided_by=by),
            )
            if use_half_precision
            else None
        )
        self._attach()
        super().__init__(
            save_dir=root,
            metadata=metadata,
            train_set_size=train_set_size,
            proj_dim=proj_dim,
            load_from_save_dir=load_from_save_dir,
            logging_level=logging_level,
            use_half_precision=use_half_precision,
        )

    def describe(self, model_id: int, **facts: Any) -> None:
        """Add facts about a checkpoint to the manifest.

        Args:
            model_id: the checkpoint.
            **facts: JSON values, such as ``epoch`` and ``global_step``.
        """
        with self._changing() as manifest:
            manifest["model_ids"].setdefault(str(model_id), {}).update(facts)

    def describe_run(self, **facts: Any) -> None:
        """Add facts about the run as a whole to the manifest.

        Args:
            **facts: JSON values.
        """
        with self._changing() as manifest:
            manifest["run"].update(facts)

    def save_weights(
        self, model_id: int, weights: Mapping[str, Tensor], transient: Mapping[str, Tensor]
    ) -> None:
        """Write a checkpoint's weights beside its features.

        Args:
            model_id: the checkpoint.
            weights: the model's state dict.
            transient: buffers that the state dict leaves out.

        Raises:
            TypeError: an entry has a dtype that cannot be stored.
        """
        if transient:
            save_tensors(_weights_file(self.save_dir, model_id, "transient"), transient)
        save_tensors(_weights_file(self.save_dir, model_id), weights)

    def load_current_store(self, model_id: int, *args: Any, **options: Any) -> None:
        """Open a checkpoint's files, as for TRAK's savers, and its rows with those of targets.

        Args:
            model_id: the checkpoint.
            *args: as for TRAK's savers.
            **options: as for TRAK's savers.

        Raises:
            FileNotFoundError: the experiment has no targets for this checkpoint.
        """
        super().load_current_store(model_id)
        if args or options:  # an experiment's; TRAK would leave another checkpoint's rows open
            super().load_current_store(model_id, *args, **options)
            self._complete_experiment(model_id)
        self._attach()  # another store may have used the projector since
        if self._scales is None:
            return
        self._scales.current = model_id
        done = self.current_store["is_featurized"]
        self.manifest = read_manifest(self.save_dir)  # another process may have written to it
        facts = self.manifest["model_ids"].get(str(model_id), {})
        if "rescaling" in facts:
            with self._changing() as manifest:  # once no process is at it any more
                facts = manifest["model_ids"].get(str(model_id), {})
                if facts.pop("rescaling", None) is not None:
                    # A crash left rows of two scales: they are computed again.
                    done[:] = 0
        if "scale" in facts:
            self._scales.factors[model_id] = facts["scale"]
        elif done.all():  # stores of earlier versions have no factors
            self._scales.factors.setdefault(model_id, 1.0)

    def _complete_experiment(self, model_id: int) -> None:
        """Make room for the scores of targets that `Store.write_targets` wrote."""
        name, opened = self.current_experiment_name, self.current_store
        targets, known = opened[f"{name}_grads"], self.experiments[name]["num_targets"]
        if targets is None or len(targets) != known:
            raise FileNotFoundError(
                f"exp_name={name!r} has {'no' if targets is None else len(targets)} targets for "
                f"model_id={model_id}, {known} in all: call start_scoring_checkpoint and score for "
                "it, or leave it out of model_ids"
            )
        if opened[f"{name}_scores"] is None:
            file, shape = _scores_file(self.save_dir, name), (self.train_set_size, len(targets))
            opened[f"{name}_scores"] = self._load(file, shape, "w+")

    def init_experiment(self, exp_name: str, num_targets: int, model_id: int) -> None:
        """Register targets, as for TRAK's savers; files of another number of them are made anew.

        Args:
            exp_name: the targets' experiment name.
            num_targets: how many there are.
            model_id: the checkpoint.
        """
        with locked(self.save_dir / _EXPERIMENTS_LOCK):
            for file, axis in (
                (_targets_file(self.save_dir, model_id, exp_name), 0),
                (_scores_file(self.save_dir, exp_name), 1),
            ):
                if file.is_file() and np.load(file, mmap_mode="r").shape[axis] != num_targets:
                    file.unlink()  # TRAK would open it as it is
            super().init_experiment(exp_name, num_targets, model_id)

    def save_scores(self, exp_name: str) -> None:
        """Note that scores are final, as for TRAK's savers, and keep what others registered.

        Args:
            exp_name: the targets' experiment name.
        """
        with locked(self.save_dir / _EXPERIMENTS_LOCK):
            others = read_object(self.save_dir / _EXPERIMENTS)
            self.experiments.update(
                {name: facts for name, facts in others.items() if name != exp_name}
            )
            super().save_scores(exp_name)

    def _attach(self) -> None:
        """Have the projector ask this store."""
        self._projector.scales = self._scales
        self._projector.settle = self._settle_statistics

    def _choose_scale(self, model_id: int, factor: float, before: float | None) -> None:
        """Record a checkpoint's factor before anything is stored with it."""
        written = self.current_store["is_featurized"][:] == 1
        if model_id != self.current_model_id or written.all():
            raise ValueError(
                f"gradients of targets for model_id={model_id} do not fit the float16 store: they "
                f"would need the factor {factor:g}, its training gradients have {before}; "
                "featurize again with use_half_precision=False"
            )
        with self._changing() as manifest:
            facts = manifest["model_ids"].setdefault(str(model_id), {})
            known = facts.get("scale", before)
            if known not in (before, factor):
                raise StoreMismatchError(
                    f"another process stores gradients of model_id={model_id} multiplied by "
                    f"{known:g}, this one would need {factor:g}; load the checkpoint again to take "
                    "that over, or featurize again with use_half_precision=False"
                )
            if known == before and written.any():
                self._rescale(facts, factor / (1.0 if before is None else before))
            facts["scale"] = factor

    def _rescale(self, facts: dict[str, Any], by: float) -> None:
        """Multiply the rows written so far; a crash meanwhile leaves a mark in the manifest."""
        facts["rescaling"] = by
        self._write_manifest()
        grads = self.current_store["grads"]
        for start in range(0, len(grads), 4096):
            rows = slice(start, start + 4096)
            before = np.asarray(grads[rows])
            after = (before.astype(np.float32) * by).astype(grads.dtype)
            lost = start + np.flatnonzero(before.any(1) & ~after.any(1))
            if len(lost):
                _LOG.warning(
                    "samples %s have gradients so small beside those of a later batch that float16 "
                    "stores zeros now; use_half_precision=False keeps them",
                    lost[:10].tolist(),
                )
            np.ndarray.__setitem__(grads, rows, after)
        grads.flush()
        del facts["rescaling"]

    def init_store(self, model_id: int) -> None:
        """Make a checkpoint's files, with room on the disk for its gradients.

        Args:
            model_id: the checkpoint.

        Raises:
            OSError: the disk has no room for them.
        """
        directory, rows = self.save_dir / str(model_id), self.train_set_size
        directory.mkdir(exist_ok=True)
        dtype = np.float16 if self.use_half_precision else np.float32
        allocate_matrix(directory / "grads.mmap", (rows, self.proj_dim), dtype)
        allocate_matrix(directory / "out_to_loss.mmap", (rows, 1), dtype)
        shape = (rows, self.proj_dim)  # TRAK fills it when features are finalized, if ever
        np.lib.format.open_memmap(directory / "features.mmap", "w+", dtype, shape)
        # Last, because with it an interrupted collection can be taken up.
        allocate_matrix(directory / "_is_featurized.mmap", (rows,), np.int32)
        self.load_current_store(model_id)

    def discard(self, model_id: int) -> None:
        """Delete the files of a checkpoint that could not be begun.

        Args:
            model_id: the checkpoint.
        """
        self.model_ids.pop(model_id, None)
        if self._scales is not None:
            self._scales.factors.pop(model_id, None)
        if str(model_id) in self.manifest["model_ids"]:  # else nothing is written to a full disk
            with self._changing() as manifest:
                manifest["model_ids"].pop(str(model_id), None)
        _remove_checkpoint(self.save_dir, str(model_id))

    def restart(self, model_id: int, factor: float) -> None:
        """Count no row of a checkpoint as written, and store its gradients with another factor.

        Args:
            model_id: the checkpoint, whose files are open.
            factor: as `StorageScales` chose it.
        """
        self.current_store["is_featurized"][:] = 0
        self.current_store["is_featurized"].flush()
        if self._scales is not None:
            self._scales.factors[model_id] = factor
        self.describe(model_id, scale=factor)

    def forget(self, model_id: int) -> None:
        """Delete a checkpoint's features; its number is not used again.

        Args:
            model_id: the checkpoint.
        """
        with self._changing() as manifest:
            manifest["model_ids"].pop(str(model_id), None)
            manifest["statistics"].pop(str(model_id), None)
            manifest["run"].setdefault("dropped", []).append(model_id)
        self.model_ids.pop(model_id, None)
        self.sweep()

    @property
    def dropped(self) -> list[int]:
        """The checkpoints whose features were deleted."""
        return list(self.manifest["run"].get("dropped", []))

    def sweep(self) -> None:
        """Delete what a process that died left half written or half deleted."""
        for model_id in self.dropped:
            _remove_checkpoint(self.save_dir, str(model_id))
        remove_leftovers(self.save_dir)
        for directory in self.save_dir.iterdir():  # also of one that is not in the manifest yet
            if directory.is_dir() and directory.name.isdigit():
                remove_leftovers(directory)

    def is_complete(self, model_id: int) -> bool:
        """Whether all training samples of a checkpoint are featurized."""
        return self.model_ids.get(model_id, {}).get("is_featurized") == 1

    def serialize_current_model_id_metadata(self, already_exists: bool = True) -> None:
        """Write TRAK's state of the current checkpoint, and statistics that are new.

        Args:
            already_exists: as for TRAK's savers.
        """
        self.save_statistics()
        model_id = self.current_model_id
        state = self.model_ids[model_id]
        done = int(self.current_store["is_featurized"].sum() == self.train_set_size)
        state["is_featurized"] = done
        if done or not already_exists:  # as TRAK does, but never half a file
            write_json(self.save_dir / f"id_{model_id}.json", {str(model_id): state})

    def save_statistics(self) -> None:
        """Write the statistics that the projector has and the store lacks.

        Raises:
            StoreMismatchError: the store has others, of another process for example.
        """
        saved = self.manifest["statistics"]
        known = self._projector.statistics
        if any(saved.get(_statistics_key(m)) != s.digest for m, s in known.items()):
            self._settle_statistics()

    def _settle_statistics(
        self, model_id: int | None = None, calibrate: Callable[[], None] | None = None
    ) -> None:
        """Have the same statistics in projector and store.

        Where neither has those of a checkpoint that is about to be projected, ``calibrate`` takes
        them; other processes wait and take them over.
        """
        projector = self._projector
        with self._changing() as manifest:
            _share_statistics(self.save_dir, manifest, projector)
            if model_id is not None and calibrate and not projector.calibrated(model_id):
                calibrate()
            saved = manifest["statistics"]
            for owner, statistics in projector.statistics.items():
                key = _statistics_key(owner)
                if key not in saved:
                    save_tensors(_statistics_file(self.save_dir, key), statistics.to_tensors())
                    saved[key] = statistics.digest

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """Change the manifest as it stands on disk; no other process does meanwhile."""
        with locked(self.save_dir / _LOCK):
            self.manifest = read_manifest(self.save_dir)
            yield self.manifest
            self._write_manifest()

    def _write_manifest(self) -> None:
        write_json(self.save_dir / MANIFEST, self.manifest)

    def _load(
        self, fname: Path, shape: tuple[int, ...], mode: str, dtype: Any = None
    ) -> np.memmap | None:
        array = super()._load(fname, shape, mode, dtype)
        return array if array is None or array.dtype.kind != "f" else array.view(_GuardedMemmap)


class _GuardedMemmap(np.memmap):
    """A memory map that refuses what its type cannot hold: NaN, infinities, vanishing rows."""

    def __setitem__(self, key: Any, value: Any) -> None:
        file = Path(str(self.filename))
        scores = file.parent.name == "scores"
        if scores and np.isnan(value).all():  # a mean of none, as TRAK passes over the others
            raise ValueError(
                f"{file.name} would be NaN: none of these checkpoints is finalized; call "
                "finalize_features before finalize_scores"
            )
        # Scores of a sample that are tiny beside others are as good as zero.
        super().__setitem__(key, storable(value, self.dtype, file.name, may_vanish=scores))


def storable(value: Any, dtype: np.dtype[Any], name: str, may_vanish: bool = False) -> NDArray[Any]:
    """Return rows as a type.

    Args:
        value: one row or several.
        dtype: the type.
        name: of the file, for messages.
        may_vanish: whether a row may turn to zero.

    Raises:
        ValueError: a row is NaN, infinite, or vanishes in that type.
    """
    given = np.atleast_2d(np.asarray(value))
    with np.errstate(over="ignore", under="ignore"):
        stored = given.astype(dtype, copy=False)
    problems = [(~np.isfinite(stored).all(axis=1), "NaN or infinite")]
    if stored is not given and not may_vanish:
        problems.append((given.any(axis=1) & ~stored.any(axis=1), "too small, so all zero,"))
    for rows, problem in problems:
        if rows.any():
            raise ValueError(
                f"rows {np.flatnonzero(rows)[:10].tolist()} of what is being written to "
                f"{name} are {problem} as {dtype}"
                + ("; use use_half_precision=False" if dtype == np.float16 else "")
            )
    return stored


class FeatureFiles:
    """Read access to a directory in TRAK's layout, whoever wrote it.

    Args:
        save_dir: the directory.

    Raises:
        FileNotFoundError: it holds nothing of TRAK's.
    """

    def __init__(self, save_dir: str | Path) -> None:
        self.save_dir = Path(save_dir).resolve()
        if not (self.save_dir / "metadata.json").is_file():
            raise FileNotFoundError(
                f"save_dir={str(self.save_dir)!r} holds no TRAK results (no metadata.json)"
            )

    @property
    def model_ids(self) -> list[int]:
        """The checkpoints all of whose training samples are featurized, ascending."""
        ids = []
        for file in self.save_dir.glob("id_*.json"):
            try:
                states = json.loads(file.read_text())
                ids += [int(m) for m, state in states.items() if state["is_featurized"] == 1]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise IncompleteStoreError(f"{file} is damaged: {error!r}") from error
        return sorted(ids)

    def choose(self, model_ids: Iterable[int] | None = None) -> list[int]:
        """Return the checkpoints asked for, or all complete ones.

        Args:
            model_ids: checkpoints; all complete ones when None.

        Returns:
            The checkpoints.

        Raises:
            IncompleteStoreError: one of them is not complete, or there is none.
            ValueError: ``model_ids`` is empty.
        """
        complete = self.model_ids
        chosen = complete if model_ids is None else list(dict.fromkeys(int(m) for m in model_ids))
        if model_ids is not None and not chosen:
            raise ValueError("model_ids is empty; name at least one checkpoint, or give None")
        absent = [m for m in chosen if m not in complete]
        if absent or not chosen:
            raise IncompleteStoreError(
                f"model_ids {absent} are not complete in {self.save_dir}; complete are {complete}"
                if absent
                else f"{self.save_dir} holds no completely featurized checkpoint"
            )
        return chosen

    def grads(self, model_id: int) -> NDArray[np.floating[Any]]:
        """Compressed training gradients, ``(n_train, proj_dim)``, memory-mapped read-only."""
        return self._open(model_id, "grads")

    def scale(self, model_id: int) -> float:
        """The factor that a checkpoint's stored gradients were multiplied by.

        A power of two, 1 unless they are stored in float16 and would not fit; see `scaling`.
        """
        if not (self.save_dir / MANIFEST).is_file():
            return 1.0
        return _scales(read_manifest(self.save_dir)).get(model_id, 1.0)

    def out_to_loss(self, model_id: int) -> NDArray[np.floating[Any]]:
        """Out-to-loss gradients, ``(n_train, 1)``, memory-mapped read-only."""
        return self._open(model_id, "out_to_loss")

    def file(self, model_id: int, name: str) -> RowFile:
        """Open one of a checkpoint's matrices to read it in parts.

        Args:
            model_id: the checkpoint.
            name: ``"grads"``, ``"features"``, ``"out_to_loss"``, or the name of an experiment with
                ``"_grads"``.

        Raises:
            IncompleteStoreError: it is missing, damaged or cut short.
        """
        found = RowFile(self.save_dir / str(model_id) / f"{name}.mmap")
        expected = {
            "grads": (self._metadata.get("train set size"), self._metadata.get("JL dimension")),
            "out_to_loss": (self._metadata.get("train set size"), 1),
        }.get(name, (None, None))
        if any(e is not None and e != f for e, f in zip(expected, found.shape, strict=True)):
            raise IncompleteStoreError(
                f"{found.file} has {found.shape[0]} rows and {found.shape[1]} columns, but the "
                f"store's metadata.json says {expected[0]} and {expected[1]}: it is another store's"
            )
        return found

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        """What TRAK writes of a store as a whole."""
        file = self.save_dir / "metadata.json"
        try:
            return dict(json.loads(file.read_text()))
        except (TypeError, ValueError) as error:
            raise IncompleteStoreError(f"{file} is damaged: {error}") from error

    def _open(self, model_id: int, name: str) -> NDArray[np.floating[Any]]:
        file = self.save_dir / str(model_id) / f"{name}.mmap"
        if not file.is_file():
            raise IncompleteStoreError(f"{file} does not exist: model_id={model_id} has no {name}")
        try:
            return np.load(file, mmap_mode="r")
        except (EOFError, ValueError) as error:
            raise IncompleteStoreError(f"{file} is damaged or cut short: {error}") from error


class Store(FeatureFiles):
    """Read access to a store with a manifest.

    Args:
        save_dir: the directory that a `ManifestSaver` or the Lightning callback wrote.

    Raises:
        FileNotFoundError: there is no manifest.
        StoreMismatchError: the manifest is of another format version.
    """

    def __init__(self, save_dir: str | Path) -> None:
        root = Path(save_dir).resolve()
        if not (root / MANIFEST).is_file():
            raise FileNotFoundError(
                f"save_dir={str(save_dir)!r} holds no store (no {MANIFEST}): "
                + (
                    "results of a plain TRAKer are read with TRAKer"
                    if (root / "metadata.json").is_file()
                    else "nothing has been collected there (fast_dev_run collects nothing)"
                )
            )
        super().__init__(save_dir)

    @property
    def model_ids(self) -> list[int]:
        """Complete checkpoints, without those that a resumed run went back behind.

        A block that mode ``"training"`` finished counts as complete although samples that took no
        part in training have no row.
        """
        known = self.manifest["model_ids"]
        finished = {int(m) for m, facts in known.items() if facts.get("finished")}
        found = finished.union(super().model_ids)
        return sorted(m for m in found if not known.get(str(m), {}).get("abandoned"))

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk."""
        return read_manifest(self.save_dir)

    @cached_property
    def settings(self) -> StoreSettings:
        """The settings under which the features came about."""
        return StoreSettings.from_json(self.manifest["settings"])

    @property
    def train_set_size(self) -> int:
        """Number of training samples (rows)."""
        return self.settings.train_set_size

    def projector(self, device: str | torch.device = "cpu") -> DropoutProjector:
        """Build the projector whose output the store holds.

        Args:
            device: where its results lie.

        Returns:
            A projector with the store's masks, and with its statistics where it has any.

        Raises:
            StoreMismatchError: statistics are missing, or not those of the manifest.
        """
        projector = self.settings.projector(device)
        manifest = self.manifest
        _share_statistics(self.save_dir, manifest, projector)
        if self.settings.dtype == "float16":
            projector.scales = StorageScales(projector.grad_dim**0.5, _scales(manifest))
        return projector

    def describe(self, model_id: int) -> dict[str, Any]:
        """What the manifest says of a checkpoint, such as its epoch and global step."""
        return dict(self.manifest["model_ids"].get(str(model_id), {}))

    def write_targets(self, model_id: int, exp_name: str, values: NDArray[Any]) -> None:
        """Keep compressed gradients of targets as TRAK's savers do.

        Args:
            model_id: the checkpoint.
            exp_name: the targets' experiment name.
            values: ``(n_targets, proj_dim)``.

        Raises:
            IncompleteStoreError: the file that names experiments is damaged.
            ValueError: a row is NaN, infinite, or vanishes in the store's type.
        """
        path = _targets_file(self.save_dir, model_id, exp_name)
        stored = storable(values, np.dtype(self.settings.dtype), path.name)
        with replacing(path) as file:
            np.lib.format.write_array(file, stored, allow_pickle=False)
        known = self.save_dir / _EXPERIMENTS
        with locked(self.save_dir / _EXPERIMENTS_LOCK):
            experiments = read_object(known) if known.is_file() else {}
            experiments[exp_name] = {
                "num_targets": len(values),
                "scores_path": str(_scores_file(self.save_dir, exp_name)),
                "scores_finalized": 0,
            }
            write_json(known, experiments)

    def remove_targets(self, exp_name: str) -> None:
        """Delete the compressed gradients of targets, of all checkpoints.

        Args:
            exp_name: the targets' experiment name.
        """
        for model_id in self.manifest["model_ids"].keys() | {str(m) for m in self.model_ids}:
            _targets_file(self.save_dir, int(model_id), exp_name).unlink(missing_ok=True)

    def weights(self, model_id: int) -> dict[str, Tensor]:
        """Return a checkpoint's weights.

        Args:
            model_id: the checkpoint.

        Returns:
            Name to tensor, on the CPU, as for ``load_state_dict``.

        Raises:
            IncompleteStoreError: the store holds no weights for it.
        """
        file = _weights_file(self.save_dir, model_id)
        if not file.is_file():
            raise IncompleteStoreError(
                f"{self.save_dir} holds no weights for model_id={model_id}: only the Lightning "
                "callback keeps them; score with TRAKer and your own checkpoints"
            )
        return load_tensors(file)

    def transient_buffers(self, model_id: int) -> dict[str, Tensor]:
        """Return a checkpoint's buffers that its state dict leaves out, by name."""
        file = _weights_file(self.save_dir, model_id, "transient")
        return load_tensors(file) if file.is_file() else {}

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"{type(self).__name__}({str(self.save_dir)!r}: {s.train_set_size} samples x "
            f"{s.proj_dim} columns, {s.scheme} fold {s.fold}, {s.dtype}, "
            f"model_ids {self.model_ids})"
        )

    def _repr_html_(self) -> str:
        s = self.settings
        each = s.train_set_size * s.proj_dim * np.dtype(s.dtype).itemsize
        facts = {
            "in": f"{self.save_dir}:",
            "samples": f"{s.train_set_size:,},",
            "columns": f"{s.proj_dim:,} of {s.grad_dim:,} coordinates,",
            "scheme": f"{s.scheme}, fold {s.fold}, seed {s.seed},",
            "task": f"{s.task or 'not recorded'},",
            "gradients of a checkpoint": f"{as_bytes(each)} as {s.dtype}",
        }
        complete, known = self.model_ids, self.manifest["model_ids"]
        ids = sorted({*complete, *map(int, known)})
        rows = [
            (m, *(known.get(str(m), {}).get(name, "-") for name in ("epoch", "global_step")),
             "yes" if m in complete else "no")
            for m in ids
        ]  # fmt: skip
        head = ("model_id", "epoch", "global step", "complete")
        return describe_html(type(self).__name__, facts, head, rows)


def remove_store(root: Path) -> None:
    """Delete the files of a store, and nothing else that lies in its directory.

    Args:
        root: the directory.
    """
    known = {file.stem.removeprefix("id_") for file in root.glob("id_*.json")}
    if _is_json(root / MANIFEST):
        known |= set(read_manifest(root)["model_ids"])
    for model_id in known:
        _remove_checkpoint(root, model_id)
    for folder in (root / "scores", *root.glob(f"{PREFIX}*")):
        shutil.rmtree(folder, ignore_errors=True)
    for file in [*root.glob("statistics_*.safetensors"), root / _EXPERIMENTS]:
        file.unlink(missing_ok=True)
    for name in ("metadata.json", MANIFEST, _LOCK, _EXPERIMENTS_LOCK):
        (root / name).unlink(missing_ok=True)


def _remove_checkpoint(root: Path, model_id: str) -> None:
    (root / f"id_{model_id}.json").unlink(missing_ok=True)
    _statistics_file(root, model_id).unlink(missing_ok=True)
    shutil.rmtree(root / model_id, ignore_errors=True)


def _targets_file(root: Path, model_id: int, exp_name: str) -> Path:
    return root / str(model_id) / f"{exp_name}_grads.mmap"


def _scores_file(root: Path, exp_name: str) -> Path:
    return root / "scores" / f"{exp_name}.mmap"


def _weights_file(root: Path, model_id: int, kind: str = "weights") -> Path:
    return root / str(model_id) / f"{kind}.safetensors"


def read_manifest(root: Path) -> dict[str, Any]:
    """Return the manifest of a store.

    Args:
        root: its directory.

    Raises:
        IncompleteStoreError: the manifest is damaged.
        StoreMismatchError: it is of another format version.
    """
    content = read_object(root / MANIFEST)
    if content.get("format_version") != FORMAT_VERSION:
        raise StoreMismatchError(
            f"{root / MANIFEST} has format_version {content.get('format_version')}, this version "
            f"of trak_dropout reads {FORMAT_VERSION}"
        )
    sections = ("settings", "statistics", "run", "model_ids")
    missing = [name for name in sections if not isinstance(content.get(name), dict)]
    if missing:
        raise IncompleteStoreError(f"{root / MANIFEST} is damaged: it lacks {', '.join(missing)}")
    try:
        StoreSettings.from_json(content["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise IncompleteStoreError(
            f"{root / MANIFEST} is damaged: its settings cannot be read: {error!r}"
        ) from error
    return content


def _claim(root: Path, settings: StoreSettings) -> dict[str, Any]:
    """Read and check the manifest of a directory, or write one where there is none."""
    file = root / MANIFEST
    if not file.is_file():
        if any(root.glob("id_*.json")):
            raise StoreMismatchError(
                f"{root} holds TRAK features without a {MANIFEST}, so seed and scheme of their "
                "projection are unknown; give another save_dir"
            )
        with locked(root / _LOCK):
            if not file.is_file():  # another process may have begun meanwhile
                head = {"format_version": FORMAT_VERSION, "settings": asdict(settings)}
                write_json(file, {**head, "statistics": {}, "run": {}, "model_ids": {}})
    manifest = read_manifest(root)
    differences = StoreSettings.from_json(manifest["settings"]).differences(settings)
    if differences:
        raise StoreMismatchError(
            f"{root} was written with other settings: {'; '.join(differences)}. "
            "Give the same settings, or another save_dir"
            + (" (dtype is TRAKer's use_half_precision)" if "dtype is" in str(differences) else "")
        )
    return manifest


def _scales(manifest: Mapping[str, Any], fact: str = "scale") -> dict[int, float]:
    """A number of each checkpoint that has it."""
    known = manifest["model_ids"].items()
    return {int(model_id): facts[fact] for model_id, facts in known if fact in facts}


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _statistics_key(model_id: int | None) -> str:
    return "shared" if model_id is None else str(model_id)


def _statistics_file(root: Path, key: str) -> Path:
    return root / f"statistics_{key}.safetensors"


def _share_statistics(root: Path, manifest: dict[str, Any], projector: DropoutProjector) -> None:
    """Give a projector the statistics of a store, or check that it has the same."""
    given = {_statistics_key(m): s.digest for m, s in projector.statistics.items()}
    for key, digest in manifest["statistics"].items():
        if key in given and given[key] != digest:
            raise StoreMismatchError(
                f"statistics ({key}) of weighted dropout are {digest} in the store at {root}, "
                f"{given[key]} given: masks would differ. Give a projector that is not "
                "calibrated; it takes over the store's. Of several processes one calibrates, "
                "before the others open the store"
            )
        if key not in given:
            file = _statistics_file(root, key)
            if not file.is_file():
                raise StoreMismatchError(f"{root} has lost its statistics: {file} is missing")
            statistics = GradientStatistics.from_tensors(load_tensors(file))
            if statistics.digest != digest:
                raise StoreMismatchError(f"{file} does not hold the statistics of the manifest")
            projector.set_statistics(statistics, None if key == "shared" else int(key))
    if projector.proj_type != "weighted_dropout" or manifest["statistics"]:
        return
    if any(np.load(file, mmap_mode="r").any() for file in root.glob("*/_is_featurized.mmap")):
        raise StoreMismatchError(
            f"{root} holds features of weighted dropout without the statistics of their masks; "
            "they cannot be used, give another save_dir"
        )


def _parameter_difference(mine: Any, theirs: Any) -> str:
    for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            return f"parameter {i} is {a[0]} {tuple(a[1])} in the store, {b[0]} {tuple(b[1])} given"
    return f"the store has {len(mine)} parameters, the model given {len(theirs)}"
