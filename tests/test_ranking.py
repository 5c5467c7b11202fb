"""top_influences against the dense matrix of scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import checkpoints, loader, mlp, quickstart, target_set, train_set

from trak_dropout import GramError, IncompleteStoreError, plugin, top_influences
from trak_dropout.store import FeatureFiles


def scored(folder: Path, k: int = 64, models: int = 2, **options: Any) -> Any:
    model = mlp()
    plugs = plugin(model, k)
    return quickstart(
        model, checkpoints(model, models), folder, use_half_precision=False, **plugs, **options
    )


def dense(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, axis=0, kind="stable")[:k].T
    return order, np.take_along_axis(scores.T, order, 1)


@pytest.mark.parametrize("columns", [64, 512])  # 512 columns of 300 samples: the dual form
@pytest.mark.parametrize("memory", [1, 10**5, 10**9])
def test_equals_the_dense_matrix(tmp_path: Path, columns: int, memory: int) -> None:
    traker, scores = scored(tmp_path, columns)
    for source in (traker, FeatureFiles(tmp_path)):
        for harmful in (False, True):
            sign = -1 if harmful else 1
            _, expected = dense(sign * scores, 7)
            indices, values = top_influences(source, "test", 7, harmful=harmful, memory=memory)
            assert indices.shape == values.shape == (20, 7)
            assert (indices.dtype, values.dtype) == (np.int64, np.float32)
            bound = 1e-4 * np.abs(scores).max()
            np.testing.assert_allclose(sign * values, expected, atol=bound)
            found = np.take_along_axis(scores.T, indices, 1)
            np.testing.assert_allclose(found, values, atol=bound)
    assert not list(tmp_path.glob(".unfinished*"))


def test_groups_are_means_over_targets(tmp_path: Path) -> None:
    traker, scores = scored(tmp_path)
    groups = [i % 3 for i in range(20)]
    means = np.stack([scores[:, np.array(groups) == g].mean(1) for g in range(3)], 1)
    _, values = top_influences(traker, "test", 5, groups=groups)
    np.testing.assert_allclose(values, dense(means, 5)[1], atol=1e-4 * np.abs(scores).max())
    for wrong in ([0] * 19, [0.5] * 20, [0, 2] * 10, [-1] * 20):
        with pytest.raises(ValueError, match="groups"):
            top_influences(traker, "test", 5, groups=wrong)


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    traker, _ = scored(tmp_path, models=1)
    for k, error, message in (
        (0, ValueError, "k"),
        (301, ValueError, "k=301 is above the number of training samples, 300"),
        (2.5, TypeError, "k"),
    ):
        with pytest.raises(error, match=message):
            top_influences(traker, "test", k)
    with pytest.raises(IncompleteStoreError, match="'other' has no targets .* experiments: test"):
        top_influences(traker, "other", 3)
    with pytest.raises(IncompleteStoreError, match="not complete"):
        top_influences(traker, "test", 3, model_ids=[4])

    targets = np.load(tmp_path / "0" / "test_grads.mmap", mmap_mode="r+")
    kept = np.array(targets)
    targets[3] = 0
    targets.flush()
    with pytest.raises(IncompleteStoreError, match=r"targets \[3\] .* are all zero"):
        top_influences(traker, "test", 3)
    targets[3] = np.nan
    targets.flush()
    with pytest.raises(GramError, match=r"targets \[3\] are NaN"):
        top_influences(traker, "test", 3)
    np.save((tmp_path / "0" / "test_grads.mmap").open("wb"), kept[:, :60])
    with pytest.raises(IncompleteStoreError, match="60 columns, the training gradients 64"):
        top_influences(traker, "test", 3)
    np.save((tmp_path / "0" / "test_grads.mmap").open("wb"), kept)

    grads = np.load(tmp_path / "0" / "grads.mmap", mmap_mode="r+")
    before = grads[250].copy()
    grads[250] = np.inf
    grads.flush()
    with pytest.raises(GramError, match=r"samples \[250\] are NaN or infinite"):
        top_influences(traker, "test", 3)
    grads[250] = before
    grads.flush()
    top_influences(traker, "test", 3)
    file = tmp_path / "0" / "grads.mmap"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(IncompleteStoreError, match=r"grads.mmap is damaged or cut short"):
        top_influences(traker, "test", 3)


def test_a_store_being_written_is_refused(tmp_path: Path) -> None:
    from trak import TRAKer

    model = mlp()
    traker = TRAKer(
        model, "image_classification", 300, str(tmp_path), device="cpu", **plugin(model, 64)
    )
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(next(iter(loader(train_set()))), num_samples=50)
    with pytest.raises(IncompleteStoreError, match="no completely featurized checkpoint"):
        top_influences(traker, "test", 3)


def test_targets_of_a_collected_store(tmp_path: Path) -> None:
    from test_lightning import fit

    collector, model, _ = fit(tmp_path)
    scores = collector.attribute(loader(target_set()), progress=False)
    store = collector.store
    assert store.add_targets("test", loader(target_set()), model, progress=False) == 20
    _, values = top_influences(store, "test", 4)
    np.testing.assert_allclose(values, dense(scores, 4)[1], rtol=1e-4)
    with pytest.raises(ValueError, match="exp_name must be a plain name"):
        store.add_targets("a/b", loader(target_set()), model)
