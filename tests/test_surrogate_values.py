"""Sampled influences against the dense matrix, and against algebra of the sampled rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import checkpoints, loader, mlp, quickstart, target_set

from trak_dropout import GramError, IncompleteStoreError, plugin
from trak_dropout.store import FeatureFiles
from trak_dropout.surrogate import sample_axes, sampled_influences


def scored(folder: Path, k: int, models: int = 2, **options: Any) -> Any:
    model = mlp()
    plugs = plugin(model, k, **options)
    states = checkpoints(model, models)
    return quickstart(model, states, folder, use_half_precision=False, **plugs)


def test_axes_are_seeded_samples() -> None:
    rows, columns = sample_axes(1000, 400, 0.05, seed=3)
    assert (len(rows), len(columns)) == (50, 20)
    for axis, size in ((rows, 1000), (columns, 400)):
        assert axis.dtype == np.int64
        assert (np.diff(axis) > 0).all()
        assert axis[0] >= 0
        assert axis[-1] < size
    again, other = sample_axes(1000, 400, 0.05, seed=3)[0], sample_axes(1000, 400, 0.05, seed=4)[0]
    np.testing.assert_array_equal(rows, again)
    assert not np.array_equal(rows, other)
    counts = sum(np.bincount(sample_axes(20, 2, 0.5, s)[0], minlength=20) for s in range(400))
    assert counts.min() > 200 - 5 * 10  # binomial, standard deviation 10
    assert counts.max() < 200 + 5 * 10
    assert [len(axis) for axis in sample_axes(3, 1, 0.01)] == [2, 1]
    for arguments in ((0, 3), (3, 3, 0.0), (3, 3, 1.1), (3, 3, 0.5, -1)):
        with pytest.raises(ValueError, match="must be"):
            sample_axes(*arguments)


@pytest.mark.parametrize("columns", [64, 512])  # 512 columns of 300 samples: the dual form
def test_all_rows_in_the_gram_matrix_give_traks_scores(tmp_path: Path, columns: int) -> None:
    traker, scores = scored(tmp_path, columns)
    rows = np.array([7, 3, 250, 7])
    bound = 1e-4 * np.abs(scores).max()
    for source in (traker, FeatureFiles(tmp_path)):
        found = sampled_influences(source, "test", rows)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, scores[rows], atol=bound)
        np.testing.assert_allclose(sampled_influences(source, "test"), scores, atol=bound)
        same = sampled_influences(source, "test", np.arange(300), gram="rows")
        np.testing.assert_allclose(same, scores, atol=bound)


@pytest.mark.parametrize("columns", [16, 512])
@pytest.mark.parametrize("damping", ["auto", 2.0])
def test_gram_matrix_of_the_sampled_rows(tmp_path: Path, columns: int, damping: Any) -> None:
    """Against the formula, by brute force: the Gram matrix is n / r times that of r rows."""
    scored(tmp_path, columns, models=1)
    files = FeatureFiles(tmp_path)
    rows = np.arange(5, 300, 6)
    r = len(rows)
    x = np.array(files.grads(0), dtype=np.float64)[rows]
    targets = files.file(0, "test_grads").rows().double().numpy()
    gram = 300 / r * x.T @ x
    if damping == "auto":
        inner = np.square(x @ x.T)
        apart = (inner.sum() - np.trace(inner)) / (r * (r - 1))
        mean = np.square(x).sum(1).mean()
        mean_square = 299 * apart + np.trace(inner) / r - 300 * mean**2 / columns
        ridge = 6 * mean**2 / np.sqrt(max(mean_square, mean**2))
    else:
        ridge = damping * np.trace(gram) / columns
    weight = np.array(files.out_to_loss(0), dtype=np.float64)[rows]
    expected = x @ np.linalg.solve(gram + ridge * np.eye(columns), targets.T) * weight
    found = sampled_influences(files, "test", rows, gram="rows", damping=damping)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    # It estimates what all rows give.
    exact = sampled_influences(files, "test", rows, damping=damping)
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.6


def test_a_store_of_a_sample_stands_for_more(tmp_path: Path) -> None:
    scored(tmp_path, 64, models=1)
    files, rows = FeatureFiles(tmp_path), np.arange(0, 300, 3)
    whole = sampled_influences(files, "test", rows, gram="rows")
    grads = np.array(files.grads(0))[rows], np.array(files.out_to_loss(0))[rows]
    for name, array in zip(("grads", "out_to_loss"), grads, strict=True):
        with (tmp_path / "0" / f"{name}.mmap").open("wb") as file:
            np.save(file, array)
    about = json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "metadata.json").write_text(json.dumps(about | {"train set size": len(rows)}))
    found = sampled_influences(FeatureFiles(tmp_path), "test", train_set_size=300)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    traker, _ = scored(tmp_path, 64, models=1)
    for rows in ([], [300], [-1], [0.5], [[1, 2]], ["a"]):
        with pytest.raises(ValueError, match="rows must"):
            sampled_influences(traker, "test", rows)
    with pytest.raises(ValueError, match="gram must be"):
        sampled_influences(traker, "test", [1], gram="some")
    with pytest.raises(ValueError, match="train_set_size=200"):
        sampled_influences(traker, "test", [1], train_set_size=200)
    with pytest.raises(ValueError, match="two rows"):
        sampled_influences(traker, "test", [1], gram="rows")
    with pytest.raises(IncompleteStoreError, match="other_grads"):
        sampled_influences(traker, "other", [1])
    with pytest.raises(TypeError, match="store_or_traker"):
        sampled_influences(np.zeros((2, 2)), "test", [1])
    grads = np.load(tmp_path / "0" / "grads.mmap", mmap_mode="r+")
    grads[250] = np.nan
    grads.flush()
    with pytest.raises(GramError, match=r"samples \[250\]"):
        sampled_influences(traker, "test", [1])
    targets = np.load(tmp_path / "0" / "test_grads.mmap", mmap_mode="r+")
    targets[3] = 0
    targets.flush()
    with pytest.raises(IncompleteStoreError, match=r"targets \[3\]"):
        sampled_influences(traker, "test", [1, 2], gram="rows")


def test_targets_of_a_sample_are_those_of_all(tmp_path: Path) -> None:
    """From the callback's store, with targets featurized for the sampled columns only."""
    from test_lightning import fit
    from torch.utils.data import Subset

    collector, model, _ = fit(tmp_path)
    scores = collector.attribute(loader(target_set()), progress=False)
    rows, columns = sample_axes(*scores.shape, share=0.3, seed=1)
    store = collector.store
    store.add_targets("few", loader(Subset(target_set(), columns.tolist())), model, progress=False)
    found = sampled_influences(store, "few", rows)
    bound = 1e-4 * float(np.abs(scores).max())
    np.testing.assert_allclose(found, scores[np.ix_(rows, columns)], atol=bound)
    assert torch.isfinite(torch.from_numpy(found)).all()
