"""Influences of a task: all of them, a block of rows at a time, or those of a sample."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _tasks import Task
from torch import Tensor, nn
from tqdm import tqdm
from trak.modelout_functions import ImageClassificationModelOutput

from trak_dropout import DampedScoreComputer, DropoutProjector
from trak_dropout.attribution import Featurizer

BATCH = 250
ROWS = 1000  # of a block of influences


class Clock:
    """Processor seconds, and seconds by the wall clock, of named parts."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add a block's time to a part's."""
        started = time.process_time(), time.perf_counter()
        yield
        self.cpu[part] = self.cpu.get(part, 0.0) + time.process_time() - started[0]
        self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - started[1]

    def rows(self) -> dict[str, dict[str, float]]:
        """As it stands in results."""
        return {"cpu": self.cpu, "wall": self.wall}


class Gradients(NamedTuple):
    """Of a checkpoint: compressed ones ``(n, k)``, out-to-loss ``(n, 1)``, targets' ``(m, k)``."""

    train: Tensor
    out_to_loss: Tensor
    targets: Tensor


class Truth(NamedTuple):
    """Influences on some of the targets ``(n, some)``, and which; the mean over all, ``(n,)``."""

    values: np.ndarray
    columns: np.ndarray
    means: np.ndarray

    def block(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Influences of some training samples on some targets, all of which must be kept."""
        places = np.searchsorted(self.columns, columns)
        assert np.array_equal(self.columns[places], columns)
        return self.values[np.ix_(rows, places)]


def gradients(
    task: Task,
    models: list[nn.Module],
    k: int,
    clock: Clock,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> list[Gradients]:
    """Compressed gradients at each checkpoint, of all samples and targets or of some."""
    train = [part if rows is None else part[rows] for part in task.train]
    targets = [part if columns is None else part[columns] for part in task.targets]
    found = []
    for model_id, model in enumerate(models):
        with clock("gradients"):
            projector = DropoutProjector.from_model(model, k, 0)
            featurizer = Featurizer(model, ImageClassificationModelOutput(), projector)
            weights = torch.empty(len(train[0]), 1)
            sides = [torch.empty(len(data[0]), k) for data in (train, targets)]
            for side, data in zip(sides, (train, targets), strict=True):
                starts = range(0, len(side), BATCH)
                for start in tqdm(starts, f"gradients, checkpoint {model_id}", leave=False):
                    some = slice(start, start + BATCH)
                    batch = [part[some] for part in data]
                    side[some] = featurizer.features(batch, model_id)
                    if data is train:
                        weights[some] = featurizer.out_to_loss(batch)
        found.append(Gradients(sides[0], weights, sides[1]))
    return found


def sampled(found: list[Gradients], damping: float | str, n: int, clock: Clock) -> np.ndarray:
    """Influences ``(r, c)`` of a sample, with the Gram matrix of its rows alone for that of n."""
    computer = DampedScoreComputer(damping=damping)
    total, weight = torch.zeros(()), torch.zeros(())
    for grads, factors, targets in found:
        with clock("gram"):
            gram = computer.get_xtx(grads)
        with clock("solve"):
            factor = computer.decompose(gram, *grads.shape)
            if grads.shape[1] > len(grads):
                scores = computer.solve(factor, targets, grads.double()).T
            else:
                scores = grads.double() @ computer.solve(factor, targets).T
        total, weight = total + scores, weight + factors
    # The Gram matrix of a sample stands for one n / r times as large.
    return (total * weight * (len(found[0].train) / n / len(found) ** 2)).float().numpy()


def every(
    found: list[Gradients],
    damping: float | str,
    columns: np.ndarray,
    clock: Clock,
    others: dict[float | str, np.ndarray],
) -> tuple[Truth, dict[float | str, Truth], dict[str, float]]:
    """All influences, row block by row block.

    Args:
        found: of all training samples and targets.
        damping: relative damping.
        columns: the targets on which influences are kept.
        clock: for the computation at this damping.
        others: further dampings, and the targets for which alone scores are computed at them.

    Returns:
        The influences; those at other dampings; and what relative damping each stands for.
    """
    n, k = found[0].train.shape
    m = len(found[0].targets)
    computer = DampedScoreComputer(damping=damping)
    solved, more = [], {value: [] for value in others}
    relative = {str(value): 0.0 for value in (damping, *others)}
    for grads, _, targets in tqdm(found, "Gram matrices", leave=False):
        with clock("gram"):
            gram = computer.get_xtx(grads)
        with clock("solve"):
            factor = computer.decompose(gram, n, k)
            solved.append(computer.solve(factor, targets).float())
        for value, some in others.items():
            factor = computer.decompose(gram, n, k, damping=value)
            more[value].append(computer.solve(factor, targets[some]).float())
        mean = float(gram.trace()) / k
        for value in (damping, *others):
            relative[str(value)] += computer.ridge(gram, n, k, value) / mean / len(found)
    weights = sum(part.out_to_loss for part in found) / len(found) ** 2

    def streamed(right: list[Tensor], kept: np.ndarray, clock: Clock) -> Truth:
        values, means = np.empty((n, len(kept)), dtype=np.float32), np.empty(n)
        for start in tqdm(range(0, n, ROWS), "influences", leave=False):
            rows = slice(start, start + ROWS)
            with clock("product"):
                block = found[0].train[rows] @ right[0].T
                for part, solution in zip(found[1:], right[1:], strict=True):
                    block.addmm_(part.train[rows], solution.T)
                block *= weights[rows]
                means[rows] = block.mean(1).numpy()
            values[rows] = block[:, torch.from_numpy(kept)].numpy()
        return Truth(values, kept, means)

    assert solved[0].shape == (m, k)
    truth = streamed(solved, columns, clock)
    rest = {}
    for value, some in others.items():
        here = streamed(more[value], np.arange(len(some)), Clock())
        rest[value] = here._replace(columns=some)
    return truth, rest, relative


def kept(file: Path, truth: Truth | None = None) -> Truth | None:
    """Keep influences in a file, or read what was kept, if anything was."""
    if truth is not None:
        fresh = file.with_name(f"new-{file.name}")
        np.savez(fresh, **truth._asdict())
        fresh.replace(file)
        return truth
    return Truth(**np.load(file)) if file.is_file() else None
