"""Scores whose inverted matrix is made of loss gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Classifier, loader, train_set, trainer
from hypothesis import given
from hypothesis import strategies as st
from test_ranking import synthetic

from trak_dropout import open_store, self_influence, top_influences
from trak_dropout.curvature import ScaledRows, check_curvature, row_factors
from trak_dropout.lightning import GradientCollector
from trak_dropout.rowfile import RowFile
from trak_dropout.scoring import GramError
from trak_dropout.store import FeatureFiles


def reference(files: FeatureFiles, damping: float, name: str = "test") -> np.ndarray:
    """``mean(X M^-1 T^T) mean(q)``, M spelled out in k dimensions, k > n or not; ``(n, m)``."""
    total, slopes = 0.0, 0.0
    for m in files.choose(None):
        x = files.file(m, "grads").rows().double().numpy()
        q = files.file(m, "out_to_loss").rows().double().numpy()[:, 0]
        t = x if name == "own" else files.file(m, f"{name}_grads").rows().double().numpy()
        norms = np.linalg.norm(x, axis=1)
        w = np.divide(np.maximum(abs(q), 1e-4 * abs(q).mean()), norms, where=norms > 0, out=0 * q)
        matrix = (x.T * w) @ x
        matrix *= (x**2).sum() / np.trace(matrix)
        k = len(matrix)
        matrix += damping * np.trace(matrix) / k * np.eye(k)
        total = total + x @ np.linalg.solve(matrix, t.T)
        slopes = slopes + q
    count = len(files.choose(None))
    return total / count * (slopes / count)[:, None]


def store(folder: Path, k: int, n: int = 40) -> FeatureFiles:
    random = np.random.default_rng(0)
    grads = [random.standard_t(3, (n, k)).astype(np.float32) * 3**i for i in range(2)]
    targets = [random.standard_t(3, (7, k)).astype(np.float32) for _ in range(2)]
    for rows in grads:
        rows[5] = 0
    files = synthetic(folder / "store", grads, targets)
    for m in range(2):
        slopes = random.random((n, 1)).astype(np.float32) ** 4
        slopes[3 + m] = 0
        with (files.save_dir / str(m) / "out_to_loss.mmap").open("wb") as file:
            np.save(file, slopes)
    return files


@pytest.mark.parametrize("k", [16, 96])  # 96 columns of 40 samples: the dual form
@pytest.mark.parametrize("memory", [1, 10**9])
def test_streamed_scores_are_dense_algebra(tmp_path: Path, k: int, memory: int) -> None:
    files = store(tmp_path, k)
    expected = reference(files, 0.5)
    options = {"damping": 0.5, "curvature": "loss", "memory": memory}
    indices, values = top_influences(files, "test", 40, **options)
    found = np.empty_like(expected)
    found[indices, np.arange(7)[:, None]] = values
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5 * abs(expected).max())
    np.testing.assert_allclose(
        self_influence(files, **options), np.diag(reference(files, 0.5, "own")), rtol=2e-4
    )
    plain = self_influence(files, damping=0.5, memory=memory)
    assert np.abs(plain - self_influence(files, **options)).max() > 0.01 * plain.max()


@pytest.mark.parametrize("columns", [32, 400])
def test_a_collected_store_attributes_with_it(tmp_path: Path, columns: int) -> None:
    collector = GradientCollector(tmp_path / "store", proj_dim=columns)
    module = Classifier()
    trainer(callbacks=[collector], max_epochs=2).fit(module, loader(train_set()))
    opened = open_store(tmp_path / "store", module)
    targets = loader(train_set())
    opened.add_targets("test", targets, progress=False)
    options = {"curvature": "loss", "progress": False}
    scores = opened.attribute(targets, damping=0.3, **options)
    expected = reference(opened, 0.3)
    tolerance = {"rtol": 1e-3, "atol": 1e-4 * abs(expected).max()}
    np.testing.assert_allclose(scores, expected, **tolerance)
    several = opened.attribute(targets, damping=[0.3, 1.0], **options)
    np.testing.assert_allclose(several[0], expected, **tolerance)
    own = opened.self_influence(damping=0.3, curvature="loss")
    np.testing.assert_allclose(own, np.diag(expected), rtol=1e-3)
    np.testing.assert_array_equal(own, collector.self_influence(damping=0.3, curvature="loss"))
    again = collector.attribute(targets, module, damping=0.3, **options)
    np.testing.assert_allclose(again, scores, rtol=1e-5, atol=1e-6 * abs(scores).max())
    plain = opened.attribute(targets, damping=0.3, progress=False)
    assert np.linalg.norm(plain - scores) > 0.02 * np.linalg.norm(scores)


@given(
    st.lists(st.just(0.0) | st.floats(1e-30, 1e6), min_size=1, max_size=20).filter(any),
    st.floats(1e-6, 1e6),
    st.floats(1e-6, 1e6),
)
def test_factors_keep_the_trace_and_ignore_units(norms: list, by: float, slope: float) -> None:
    x = torch.tensor(norms, dtype=torch.float64)
    q = torch.linspace(0.1, 1, len(x), dtype=torch.float64)
    factors = row_factors(x, q)
    torch.testing.assert_close((factors * x).square().sum(), x.square().sum())
    torch.testing.assert_close(row_factors(x * by, q * slope), factors)
    assert bool((factors > 0).all())


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    one = torch.ones(3)
    with pytest.raises(ValueError, match="curvature must be one of output, loss, got 'hessian'"):
        check_curvature("hessian")
    with pytest.raises(GramError, match=r"compressed gradients of samples \[1\] are NaN"):
        row_factors(torch.tensor([1, float("nan"), 1]), one)
    with pytest.raises(GramError, match=r"out-to-loss gradients of samples \[2\] are NaN"):
        row_factors(one, torch.tensor([1, 1, float("inf")]))
    with pytest.raises(GramError, match="use curvature='output'"):
        row_factors(one, torch.zeros(3))
    with pytest.raises(GramError):
        row_factors(torch.zeros(3), one)
    files = store(tmp_path, 16)
    with pytest.raises(ValueError, match="curvature must be one of"):
        top_influences(files, "test", 3, curvature="fisher")
    with pytest.raises(ValueError, match="curvature must be one of"):
        self_influence(files, curvature="fisher")
    with pytest.raises(ValueError, match="has no meaning for method='dot'"):
        top_influences(files, "test", 3, method="dot", curvature="loss")


def test_scaled_rows(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float16)
    np.save(tmp_path / "x.npy", values)
    factors = torch.arange(9.0)
    rows = ScaledRows(RowFile(tmp_path / "x.npy"), factors)
    expected = torch.from_numpy(values).float() * factors[:, None]
    assert torch.equal(rows.rows(2, 7), expected[2:7])
    assert torch.equal(torch.cat([block for _, block in rows.blocks(4)]), expected)
