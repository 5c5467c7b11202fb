"""top_influences against the dense matrix of scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import checkpoints, loader, mlp, quickstart, target_set, train_set

from trak_dropout import (
    GramError,
    IncompleteStoreError,
    plugin,
    self_influence,
    top_influences,
)
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
    # Targets of fewer checkpoints replace all of those before.
    store.add_targets("test", loader(target_set()), model, model_ids=[0], progress=False)
    with pytest.raises(IncompleteStoreError, match="has no targets for model_id=1"):
        top_influences(store, "test", 4)
    with pytest.raises(ValueError, match="exp_name must be a plain name"):
        store.add_targets("a/b", loader(target_set()), model)


def synthetic(folder: Path, grads: list[np.ndarray], targets: list[np.ndarray]) -> FeatureFiles:
    """A directory as a plain TRAKer leaves it, with weights of the samples."""
    n, k = grads[0].shape
    about = {"JL dimension": k, "train set size": n}
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps(about))
    random = np.random.default_rng(5)
    for m, (train, test) in enumerate(zip(grads, targets, strict=True)):
        (folder / str(m)).mkdir()
        state = {str(m): {"is_featurized": 1, "is_finalized": 0}}
        (folder / f"id_{m}.json").write_text(json.dumps(state))
        weights = random.uniform(0.1, 1.0, (n, 1)).astype(train.dtype)
        for name, array in (("grads", train), ("test_grads", test), ("out_to_loss", weights)):
            with (folder / str(m) / f"{name}.mmap").open("wb") as file:
                np.save(file, array)
    return FeatureFiles(folder)


def reference(files: FeatureFiles, damping: float) -> np.ndarray:
    """Scores by explicit inverses in double precision, ``(n, m)``."""
    total, weight = 0.0, 0.0
    for m in files.model_ids:
        x, t, q = (np.array(files.file(m, name).rows(), np.float64)
                   for name in ("grads", "test_grads", "out_to_loss"))  # fmt: skip
        gram = x.T @ x
        gram += damping * np.trace(gram) / len(gram) * np.eye(len(gram))
        total, weight = total + x @ np.linalg.solve(gram, t.T), weight + q
    return total * weight / len(files.model_ids) ** 2


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("kind", ["rank deficient", "duplicates", "constant columns", "one sample"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_little_damping_costs_no_digits(
    tmp_path: Path, damping: float, kind: str, dtype: Any
) -> None:
    # What lies outside of the training gradients is large then, and must cancel in the products.
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 48))
    if kind == "rank deficient":
        x = x[:, :5] @ random.standard_normal((5, 48))
    elif kind == "duplicates":
        x = np.repeat(x[:5], 40, axis=0)
    elif kind == "constant columns":
        x[:, 3:] = 1.0
    else:
        x = x[:1]
    t = random.standard_normal((7, 48))
    files = synthetic(tmp_path / "s", [x.astype(dtype)] * 2, [t.astype(dtype)] * 2)
    expected = reference(files, damping).T
    indices, values = top_influences(files, "test", len(x), damping=damping)
    found = np.take_along_axis(expected, indices, 1)
    size = np.linalg.norm(expected, axis=1, keepdims=True) / len(x) ** 0.5
    np.testing.assert_allclose(values / size, found / size, rtol=1e-5, atol=1e-5)


def test_checkpoints_and_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = [random.standard_normal((30, 8)).astype(np.float32) for _ in range(2)]
    t = [random.standard_normal((5, 8)).astype(np.float32) for _ in range(2)]
    files = synthetic(tmp_path / "s", x, t)
    one, _ = top_influences(files, "test", 3, model_ids=[0])
    twice = top_influences(files, "test", np.int64(3), model_ids=[0, 0], memory=np.int64(10**6))
    np.testing.assert_array_equal(twice[0], one)
    np.testing.assert_array_equal(self_influence(files, [1, 1]), self_influence(files, [1]))
    with pytest.raises(ValueError, match="model_ids is empty"):
        self_influence(files, [])
    for memory in (0, -1, 2.5):
        with pytest.raises((TypeError, ValueError), match="memory must be"):
            top_influences(files, "test", 3, memory=memory)

    def write(name: str, array: np.ndarray) -> None:
        with (files.save_dir / "1" / f"{name}.mmap").open("wb") as file:
            np.save(file, array)

    write("test_grads", t[1][:3])
    with pytest.raises(IncompleteStoreError, match=r"other numbers of targets .* 5 for 0, 3 for 1"):
        top_influences(files, "test", 3)
    write("test_grads", t[1])
    for wrong in (x[1][:20], x[1][:, :4]):  # features of another data set, of another k
        write("grads", wrong)
        for compute in (self_influence, lambda f: top_influences(f, "test", 3)):
            with pytest.raises(IncompleteStoreError, match="but the store's metadata.json says"):
                compute(files)
    write("grads", x[1])
    weights = np.ones((30, 1), np.float32)
    weights[4] = np.nan
    write("out_to_loss", weights)
    for compute in (self_influence, lambda f: top_influences(f, "test", 3)):
        with pytest.raises(GramError, match=r"out-to-loss gradients of samples \[4\]"):
            compute(files)
    (files.save_dir / "1" / "grads.mmap").write_bytes(b"")
    with pytest.raises(IncompleteStoreError, match="damaged or cut short"):
        self_influence(files)
    assert not list(files.save_dir.glob(".unfinished*"))


@pytest.mark.parametrize("method", ["dot", "cosine"])
def test_baselines_are_plain_algebra(tmp_path: Path, method: str) -> None:
    random = np.random.default_rng(0)
    for scale in (1e-12, 1.0, 1e12):
        x = [(scale * random.standard_normal((30, 8))).astype(np.float32) for _ in range(2)]
        t = [(scale * random.standard_normal((5, 8))).astype(np.float32) for _ in range(2)]
        files = synthetic(tmp_path / f"{scale}", x, t)
        products = []
        for a, b in zip(x, t, strict=True):
            a, b = a.astype(np.float64), b.astype(np.float64)
            sizes = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
            products.append(a @ b.T / (sizes if method == "cosine" else 1))
        weight = np.mean([files.file(m, "out_to_loss").rows().numpy() for m in (0, 1)], axis=0)
        expected = np.mean(products, axis=0) * (weight if method == "dot" else 1)
        indices, values = top_influences(files, "test", 30, method=method)
        found = np.take_along_axis(expected.T, indices, 1)
        np.testing.assert_allclose(values, found, rtol=1e-4, atol=1e-5 * np.abs(found).max())
    tiny = synthetic(tmp_path / "tiny", [x[0] * 1e-36], [t[0] * 1e-36])
    if method == "dot":
        with pytest.raises(GramError, match="out of the range of float32; use method='cosine'"):
            top_influences(tiny, "test", 3, method="dot")
    with pytest.raises(ValueError, match="method must be one of"):
        top_influences(tiny, "test", 3, method="tracin")
    with pytest.raises(ValueError, match=r"damping=0.1 has no meaning"):
        top_influences(tiny, "test", 3, method=method, damping=0.1)
