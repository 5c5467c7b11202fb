"""What is in a store, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trak_dropout._files import checksum
from trak_dropout.rowfile import IncompleteStoreError, read_experiments, read_object
from trak_dropout.store import FORMAT_VERSION, Store
from trak_dropout.visits import VISITS, Visits

_ROWS = 4096


@dataclass
class CheckpointReport:
    """What a store holds of a checkpoint.

    Args:
        model_id: its number.
        state: ``"complete"``, ``"incomplete"`` or ``"abandoned"`` (set aside by a run that went
            back behind it).
        rows: featurized training samples.
        bytes: taken on the disk.
        facts: what the manifest says of it.
        problems: what is wrong with its files.
        notes: what is worth knowing.
    """

    model_id: int
    state: str
    rows: int
    bytes: int
    facts: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class StoreReport:
    """What a store holds.

    Args:
        save_dir: its directory.
        settings: the settings of all its features.
        run: what the manifest says of the run.
        bytes: taken on the disk by all files.
        experiments: number of targets of each experiment.
        checkpoints: a report of each checkpoint.
        problems: what is wrong with the store as a whole.
    """

    save_dir: str
    settings: dict[str, Any]
    run: dict[str, Any]
    bytes: int
    experiments: dict[str, int]
    checkpoints: list[CheckpointReport]
    problems: list[str]

    @property
    def all_problems(self) -> list[str]:
        """All problems, those of checkpoints with their number."""
        return self.problems + [
            f"model_id {c.model_id}: {text}" for c in self.checkpoints for text in c.problems
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "ok": not self.all_problems, "format_version": FORMAT_VERSION}

    def lines(self) -> list[str]:
        """Return the report as lines for a terminal."""
        s = self.settings
        complete = sum(c.state == "complete" for c in self.checkpoints)
        lines = [
            f"{self.save_dir}: {s['train_set_size']} samples x {s['proj_dim']} columns of "
            f"{s['grad_dim']} coordinates, {s['scheme']} fold {s['fold']}, seed {s['seed']}, "
            f"{s['dtype']}, {self.bytes / 1e6:.1f} MB",
            f"task {s['task']}; {complete} of {len(self.checkpoints)} checkpoints complete",
        ]
        if self.experiments:
            known = ", ".join(f"{name} ({n} targets)" for name, n in self.experiments.items())
            lines.append(f"experiments: {known}")
        if self.checkpoints:
            lines.append("  id  epoch    step  state       rows       MB  checkpoint file")
        for c in self.checkpoints:
            files = ", ".join(c.facts.get("checkpoints", [])) or "-"
            lines.append(
                f"{c.model_id:>4}  {c.facts.get('epoch', '-'):>5}  "
                f"{c.facts.get('global_step', '-'):>6}  {c.state:<10}  {c.rows:>5}  "
                f"{c.bytes / 1e6:>7.1f}  {files}"
            )
            lines += [f"      note: {text}" for text in c.notes]
        lines += [f"PROBLEM: {text}" for text in self.all_problems]
        return lines


def inspect_store(save_dir: str | Path, *, thorough: bool = False) -> StoreReport:
    """Look at a store without changing it.

    Args:
        save_dir: its directory.
        thorough: read every number, not only the files' beginnings: rows must be finite and as
            they were written.

    Returns:
        What is in it, and its problems.

    Raises:
        FileNotFoundError: there is no store.
        IncompleteStoreError: its manifest is damaged.
        StoreMismatchError: it is of another format version.
    """
    store = Store(save_dir)
    manifest = store.manifest
    problems: list[str] = []
    experiments: dict[str, int] = {}
    for name, read in (("metadata.json", read_object), ("experiments.json", read_experiments)):
        try:
            content = read(store.save_dir / name)
        except (OSError, ValueError) as error:
            problems.append(f"{name} cannot be read: {error}")
        else:
            experiments = content if name == "experiments.json" else experiments
    try:
        store.projector()
    except ValueError as error:
        problems.append(str(error))
    states = _states(store.save_dir, problems)
    known = {int(m): facts for m, facts in manifest["model_ids"].items()}
    checkpoints = [
        _checkpoint(store, m, states.get(m), known.get(m, {}), experiments, thorough)
        for m in sorted(states.keys() | known.keys())
    ]
    return StoreReport(
        str(store.save_dir),
        dict(manifest["settings"]),
        dict(manifest["run"]),
        _size(store.save_dir),
        experiments,
        checkpoints,
        problems,
    )


def _states(root: Path, problems: list[str]) -> dict[int, bool]:
    """Whether TRAK's files call each checkpoint complete."""
    states: dict[int, bool] = {}
    for file in root.glob("id_*.json"):
        try:
            content = json.loads(file.read_text())
            states |= {int(m): state["is_featurized"] == 1 for m, state in content.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{file.name} is damaged: {error}")
    return states


def _checkpoint(
    store: Store,
    model_id: int,
    complete: bool | None,
    facts: dict[str, Any],
    experiments: dict[str, int],
    thorough: bool,
) -> CheckpointReport:
    directory = store.save_dir / str(model_id)
    if facts.get("finished"):  # a block, where not every sample took part
        complete = True
    state = "abandoned" if facts.get("abandoned") else "complete" if complete else "incomplete"
    report = CheckpointReport(model_id, state, 0, _size(directory), facts)
    problems = report.problems
    n, k = store.settings.train_set_size, store.settings.proj_dim
    try:
        flags = np.load(directory / "_is_featurized.mmap")
        report.rows = int(np.count_nonzero(flags))
        if flags.shape != (n,):
            problems.append(f"_is_featurized.mmap has shape {flags.shape} instead of {(n,)}")
        elif complete and report.rows != (wanted_rows := facts.get("samples", n)):
            missing_rows = wanted_rows - report.rows
            problems.append(f"it is called complete, but {missing_rows} rows are missing")
    except (OSError, ValueError) as error:
        problems.append(f"_is_featurized.mmap cannot be read: {error}")
    if not complete:
        if complete is None:
            report.notes.append("collecting it was interrupted before the first row")
        else:
            report.notes.append(f"{report.rows} of {n} rows; a resumed run collects the rest")
        return report
    for name, width in (("grads", k), ("out_to_loss", 1)):
        wrong = list(_matrix(store, model_id, name, (n, width), thorough))
        wanted = facts.get("checksums", {}).get(name)
        if thorough and wanted and not wrong:
            found = checksum(directory / f"{name}.mmap")
            if found != wanted:
                wrong = [f"{name}.mmap has CRC-32 {found} instead of {wanted}: it has changed"]
        problems += wrong
    if facts.get("finished"):
        try:
            count = len(Visits.load(directory / VISITS))
            report.notes.append(f"{count} visits of {report.rows} of {n} samples")
            if count != facts["visits"]:
                problems.append(f"{VISITS} has {count} visits instead of {facts['visits']}")
        except IncompleteStoreError as error:
            problems.append(str(error))
    for name, targets in experiments.items():
        if (directory / f"{name}_grads.mmap").is_file():
            problems += _matrix(store, model_id, f"{name}_grads", (targets, k), thorough)
        else:
            report.notes.append(f"experiment {name!r} has no targets here")
    if (directory / "weights.safetensors").is_file():
        try:
            weights = store.weights(model_id)
            for name, shape in store.settings.parameters or ():
                if name not in weights or tuple(weights[name].shape) != shape:
                    problems.append(f"weights.safetensors lacks {name} {shape}")
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"weights.safetensors is damaged: {error}")
    elif facts:
        problems.append("weights.safetensors is missing")
    missing = [file for file in facts.get("checkpoints", []) if not Path(file).exists()]
    if missing:
        report.notes.append(f"checkpoint files are gone: {', '.join(missing)}")
    return report


def _matrix(
    store: Store, model_id: int, name: str, shape: tuple[int, int], thorough: bool
) -> Iterator[str]:
    """Say what is wrong with a matrix file."""
    try:
        file = store.file(model_id, name)
    except IncompleteStoreError as error:
        yield str(error)
        return
    if file.shape != shape or str(file.dtype) != store.settings.dtype:
        yield (
            f"{name}.mmap has shape {file.shape} and type {file.dtype} instead of {shape} and "
            f"{store.settings.dtype}"
        )
        return
    if thorough:
        for start in range(0, len(file), _ROWS):
            rows = file.rows(start, start + _ROWS)
            bad = (~rows.isfinite().all(1)).nonzero().flatten() + start
            if len(bad):
                yield f"{name}.mmap has NaN or infinite values in rows {bad[:10].tolist()}"
                return


def _size(directory: Path) -> int:
    """Bytes that files take on the disk, which holes do not."""
    taken = 0
    for file in directory.rglob("*"):
        if file.is_file():
            facts = file.stat()
            blocks = getattr(facts, "st_blocks", None)
            taken += facts.st_size if blocks is None else min(facts.st_size, 512 * blocks)
    return taken
