"""How good scores are: mislabel detection, retrieval, linear datamodeling score."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def mislabel_auc(self_influence: ArrayLike, flipped: ArrayLike) -> float:
    """Area under the ROC curve of finding flipped labels by their score.

    Args:
        self_influence: a score for each sample, ``(n,)``; higher means more suspect.
        flipped: whether the sample's label is wrong, ``(n,)``.

    Returns:
        The share of (flipped, clean) pairs that the score orders rightly, ties counted half.

    Raises:
        ValueError: shapes differ, a score is not finite, or all or no labels are flipped.
    """
    scores, wrong = _scores_and_labels(self_influence, flipped)
    ranks = _ranks(scores)
    positives = int(wrong.sum())
    negatives = len(wrong) - positives
    return float((ranks[wrong].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def mislabel_recall(self_influence: ArrayLike, flipped: ArrayLike, share: float) -> float:
    """Share of the flipped labels found by inspecting the most suspect samples.

    Args:
        self_influence: a score for each sample, ``(n,)``; higher means more suspect.
        flipped: whether the sample's label is wrong, ``(n,)``.
        share: share of all samples that is inspected, in (0, 1].

    Returns:
        Flipped labels among the ``round(share * n)`` highest scores over all flipped labels.

    Raises:
        ValueError: shapes differ, a score is not finite, all or no labels are flipped, or
            ``share`` is out of range.
    """
    scores, wrong = _scores_and_labels(self_influence, flipped)
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}")
    return float(recall_curve(scores, wrong)[max(1, round(share * len(wrong))) - 1])


def recall_curve(self_influence: ArrayLike, flipped: ArrayLike) -> NDArray[np.float64]:
    """Share of the flipped labels found after inspecting 1, 2, ..., n samples.

    Args:
        self_influence: a score for each sample, ``(n,)``; higher means more suspect.
        flipped: whether the sample's label is wrong, ``(n,)``.

    Returns:
        ``(n,)``, non-decreasing, ending at 1.

    Raises:
        ValueError: as for `mislabel_auc`.
    """
    scores, wrong = _scores_and_labels(self_influence, flipped)
    order = np.argsort(-scores, kind="stable")
    return np.cumsum(wrong[order]) / wrong.sum()


def retrieval_accuracy(scores: ArrayLike, train_labels: ArrayLike, labels: ArrayLike) -> float:
    """Share of targets whose most influential training sample has their label.

    Args:
        scores: ``(n_train, n_targets)``.
        train_labels: ``(n_train,)``.
        labels: the targets' labels, ``(n_targets,)``.

    Returns:
        The share, in [0, 1].

    Raises:
        ValueError: shapes do not match, a score is not finite, or there is none.
    """
    matrix = _finite("scores", scores, 2)
    train, targets = np.asarray(train_labels), np.asarray(labels)
    for name, given in (("train_labels", train), ("labels", targets)):
        if given.ndim != 1 or not given.size:
            raise ValueError(f"{name} must be of one dimension and not empty, got {given.shape}")
    if matrix.shape != (len(train), len(targets)):
        raise ValueError(
            f"scores has shape {matrix.shape}, expected ({len(train)}, {len(targets)}): "
            "train_labels by labels"
        )
    return float(np.mean(train[matrix.argmax(axis=0)] == targets))


def linear_datamodeling_score(
    scores: ArrayLike, subset_masks: ArrayLike, outputs: ArrayLike
) -> float:
    """Rank correlation between predicted and true outputs of models trained on subsets.

    Source: TRAK (arXiv 2303.14186), section 2.

    Args:
        scores: ``(n_train, n_targets)``.
        subset_masks: whether the training sample is in the subset, ``(n_subsets, n_train)``.
        outputs: output of the model trained on each subset, ``(n_subsets, n_targets)``.

    Returns:
        Spearman's correlation over subsets, averaged over targets; a target whose predictions
        are all equal counts as 0.

    Raises:
        ValueError: shapes do not match, a value is not finite, or a target's outputs are equal
            for all subsets, which leaves its correlation undefined.
    """
    matrix = _finite("scores", scores, 2)
    truth = _finite("outputs", outputs, 2)
    masks = _finite("subset_masks", subset_masks, 2)
    if masks.shape != (len(truth), len(matrix)) or truth.shape[1] != matrix.shape[1]:
        raise ValueError(
            f"scores {matrix.shape}, subset_masks {masks.shape} and outputs {truth.shape} do not "
            "match: (n_train, n_targets), (n_subsets, n_train), (n_subsets, n_targets)"
        )
    if not matrix.size:
        raise ValueError(f"scores of shape {matrix.shape} are of no sample or no target")
    constant = np.flatnonzero((truth == truth[:1]).all(axis=0))
    if len(constant):
        raise ValueError(f"outputs of targets {constant[:10].tolist()} are equal for all subsets")
    predicted = masks @ matrix
    return float(np.mean([_spearman(a, b) for a, b in zip(predicted.T, truth.T, strict=True)]))


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's correlation; 0 where ``a`` is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _finite(name: str, values: ArrayLike, ndim: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be a finite array of {ndim} dimensions, got shape {array.shape}"
            + ("" if np.isfinite(array).all() else " with NaN or infinite values")
        )
    return array


def _scores_and_labels(
    self_influence: ArrayLike, flipped: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores = _finite("self_influence", self_influence, 1)
    wrong = np.asarray(flipped, dtype=bool)
    if wrong.shape != scores.shape:
        raise ValueError(f"self_influence {scores.shape} and flipped {wrong.shape} differ in shape")
    if wrong.all() or not wrong.any():
        raise ValueError("flipped must mark some but not all samples")
    return scores, wrong
