"""Metrics against scipy and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from trak_dropout import metrics

FINITE = st.integers(-3, 3).map(float)  # few values, so that ties are common


@settings(deadline=None)
@given(st.lists(st.tuples(FINITE, st.booleans()), min_size=2))
def test_auc(pairs: list[tuple[float, bool]]) -> None:
    scores, flipped = map(np.array, zip(*pairs, strict=True))
    if flipped.all() or not flipped.any():
        with pytest.raises(ValueError, match="some but not all"):
            metrics.mislabel_auc(scores, flipped)
    else:
        assert metrics.mislabel_auc(scores, flipped) == pytest.approx(
            roc_auc_score(flipped, scores)
        )


def test_recall() -> None:
    scores, flipped = [5, 4, 3, 2, 1], [True, False, True, False, False]
    np.testing.assert_allclose(metrics.recall_curve(scores, flipped), [0.5, 0.5, 1, 1, 1])
    assert metrics.mislabel_recall(scores, flipped, 0.2) == 0.5
    assert metrics.mislabel_recall(scores, flipped, 0.6) == 1
    assert metrics.mislabel_recall(scores, flipped, 0.01) == 0.5
    with pytest.raises(ValueError, match="share must be in"):
        metrics.mislabel_recall(scores, flipped, 0)


def test_retrieval() -> None:
    scores = [[0.1, 0.9, 0.0], [0.5, 0.2, 0.3]]
    assert metrics.retrieval_accuracy(scores, [7, 8], [8, 7, 7]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"expected \(2, 2\)"):
        metrics.retrieval_accuracy(scores, [7, 8], [8, 7])
    with pytest.raises(ValueError, match=r"train_labels must be of one dimension .* \(2, 1\)"):
        metrics.retrieval_accuracy(scores, [[7], [8]], [8, 7, 7])  # would be compared crosswise
    with pytest.raises(ValueError, match="labels must be of one dimension and not empty"):
        metrics.retrieval_accuracy(np.zeros((2, 0)), [7, 8], [])


def test_linear_datamodeling_score() -> None:
    random = np.random.default_rng(0)
    scores, masks = random.normal(size=(30, 4)), random.random((12, 30)) < 0.5
    outputs = masks @ scores + random.normal(size=(12, 4))
    expected = [spearmanr(masks @ scores[:, t], outputs[:, t])[0] for t in range(4)]
    assert metrics.linear_datamodeling_score(scores, masks, outputs) == pytest.approx(
        np.mean(expected)
    )
    scores[:, 0] = 0  # no prediction at all for a target counts as no correlation
    assert metrics.linear_datamodeling_score(scores, masks, outputs) == pytest.approx(
        np.mean([0, *expected[1:]])
    )
    outputs[:, 2] = 1
    with pytest.raises(ValueError, match=r"outputs of targets \[2\] are equal"):
        metrics.linear_datamodeling_score(scores, masks, outputs)
    with pytest.raises(ValueError, match="do not match"):
        metrics.linear_datamodeling_score(scores, masks[:, :-1], outputs)
    with pytest.raises(ValueError, match="of no sample or no target"):
        metrics.linear_datamodeling_score(scores[:, :0], masks, outputs[:, :0])


def test_nan_is_never_ranked() -> None:
    with pytest.raises(ValueError, match="self_influence .* NaN"):
        metrics.mislabel_auc([1, np.nan], [True, False])
    with pytest.raises(ValueError, match="subset_masks .* NaN"):
        metrics.linear_datamodeling_score([[1], [2]], [[1, np.nan], [0, 1]], [[1], [2]])
    with pytest.raises(ValueError, match="scores .* NaN"):
        metrics.retrieval_accuracy([[np.inf]], [1], [1])
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.mislabel_auc([1, 2], [True])
