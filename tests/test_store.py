"""The store: what is refused on reopening, and that nothing bad is ever written."""

import json
import logging
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import checkpoints, digits, loader, mlp, quickstart, target_set
from torch import nn
from trak import TRAKer

from trak_dropout import (
    DropoutProjector,
    IncompleteStoreError,
    Store,
    StoreMismatchError,
    open_store,
    plugin,
)
from trak_dropout.store import FeatureFiles


@pytest.fixture
def stored(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = mlp()
    quickstart(model, checkpoints(model, 2), tmp_path / "s", **plugin(model, 32))
    return model, tmp_path / "s"


def reopen(
    model: nn.Module,
    save_dir: Path,
    n: int = 300,
    half: bool = True,
    load_from_save_dir: bool = True,
    **options,
) -> TRAKer:
    return TRAKer(
        model,
        "image_classification",
        n,
        str(save_dir),
        load_from_save_dir,
        device="cpu",
        use_half_precision=half,
        logging_level=logging.ERROR,
        **plugin(model, **{"proj_dim": 32, **options}),
    )


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_manifest_says_how_the_features_came_about(stored: tuple[nn.Module, Path]) -> None:
    manifest = json.loads((stored[1] / "manifest.json").read_text())
    settings = manifest["settings"]
    assert manifest["format_version"] == 2
    assert settings["scheme"] == "dropout"
    assert settings["grad_dim"] == 2410
    assert settings["parameters"][0] == ["1.weight", [32, 64]]
    assert settings["dtype"] == "float16"
    store = Store(stored[1])
    assert store.model_ids == [0, 1]
    assert store.train_set_size == 300
    assert store.grads(1).shape == (300, 32)
    assert store.out_to_loss(1).shape == (300, 1)
    assert "300 samples x 32 columns" in repr(store)
    assert isinstance(store.settings.projector(), DropoutProjector)


def test_same_settings_reopen(stored: tuple[nn.Module, Path]) -> None:
    traker = reopen(*stored)
    assert sorted(traker.saver.model_ids) == [0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 9}, "seed is 0 in the store, 9 given"),
        ({"proj_dim": 33}, "proj_dim is 32 in the store, 33 given"),
        ({"fold": 3}, "fold is 16 in the store, 3 given"),
        ({"n": 299}, "train_set_size is 300 in the store, 299 given"),
        ({"half": False}, "dtype is 'float16' in the store, 'float32' given"),
        ({"grad_wrt": ["1.weight"]}, "the store has 4 parameters, the model given 1"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(
    stored: tuple[nn.Module, Path], options: dict, words: str
) -> None:
    before = listing(stored[1])
    with pytest.raises(StoreMismatchError, match=words):
        reopen(*stored, **options)
    assert listing(stored[1]) == before


def test_another_model_is_refused(stored: tuple[nn.Module, Path]) -> None:
    wider = mlp(33)
    with pytest.raises(
        StoreMismatchError, match=r"parameter 0 is 1.weight \(32, 64\) in the store"
    ):
        reopen(wider, stored[1])
    # As many coordinates, but in another order.
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model.register_parameter("first", nn.Parameter(torch.zeros(10)))
    del model[3].bias
    model[3].bias = None
    with pytest.raises(StoreMismatchError, match="parameter 0 is 1.weight"):
        reopen(model, stored[1])


def test_swapped_statistics_are_refused(tmp_path: Path) -> None:
    model = mlp()
    states = checkpoints(model, 1)
    options = {"proj_dim": 32, "fold": 2, "proj_type": "weighted_dropout"}
    quickstart(model, states, tmp_path / "s", **plugin(model, **options))
    # The first batch calibrated; another process takes the statistics over, or is refused.
    assert [f.name for f in (tmp_path / "s").glob("statistics_*")] == [
        "statistics_shared.safetensors"
    ]
    taken = reopen(model, tmp_path / "s", **options).projector
    assert taken.statistics[None].samples == 50
    plugs = plugin(model, **options)
    plugs["projector"].calibrate([torch.randn(5, 2410)])
    before = listing(tmp_path / "s")
    with pytest.raises(StoreMismatchError, match=r"statistics \(shared\) of weighted dropout are"):
        TRAKer(model, "image_classification", 300, str(tmp_path / "s"), device="cpu", **plugs)
    assert listing(tmp_path / "s") == before
    with pytest.raises(StoreMismatchError, match="scheme is 'weighted_dropout' in the store"):
        reopen(model, tmp_path / "s", fold=2)
    # Features whose statistics were never written cannot be continued.
    manifest = tmp_path / "s" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"statistics": {}}))
    with pytest.raises(StoreMismatchError, match="without the statistics of their masks"):
        reopen(model, tmp_path / "s", **options)


def featurize(traker: TRAKer, model_id: int, magnitude: float = 1.0) -> None:
    images, labels = digits()
    for start in range(0, 300, 100):
        rows = np.arange(start, start + 100)
        traker.featurize((magnitude * images[rows], labels[rows]), inds=rows)
    traker.finalize_features([model_id])


def test_processes_keep_each_others_facts(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    first, second = (reopen(model, tmp_path) for _ in range(2))
    for model_id, traker in enumerate((first, second)):
        traker.load_checkpoint(model.state_dict(), model_id)
        featurize(traker, model_id, 1e-5)
    first.saver.describe_run(note="x")
    known = Store(tmp_path).manifest["model_ids"]
    assert known.keys() == {"0", "1"}
    assert all(facts.keys() == {"scale", "features_divided_by"} for facts in known.values())
    assert all(facts["scale"] > 1 for facts in known.values())
    second.saver.forget(0)
    first.saver.describe(1, note="y")
    manifest = Store(tmp_path).manifest
    assert manifest["run"] == {"note": "x", "dropped": [0]}
    assert manifest["model_ids"].keys() == {"1"}


def test_processes_write_the_manifest_in_turn(tmp_path: Path) -> None:
    traker = reopen(mlp(), tmp_path)

    def describe(rank: int) -> None:
        for i in range(20):
            traker.saver.describe(rank, **{str(i): i})

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=describe, args=(rank,)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    known = Store(tmp_path).manifest["model_ids"]
    assert known == {str(rank): {str(i): i for i in range(20)} for rank in range(4)}


def test_processes_register_targets_in_turn(stored: tuple[nn.Module, Path]) -> None:
    _, folder = stored

    def keep(rank: int) -> None:
        for i in range(20):
            Store(folder).write_targets(0, f"{rank} {i}", np.ones((2, 32), np.float32))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=keep, args=(rank,)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    known = json.loads((folder / "experiments.json").read_text())
    assert known.keys() - {"test"} == {f"{rank} {i}" for rank in range(4) for i in range(20)}


def test_a_name_stands_for_other_targets(tmp_path: Path) -> None:
    model = mlp()
    states = checkpoints(model, 2)
    traker, scores = quickstart(model, states, tmp_path, **plugin(model, 32))
    images, labels = next(iter(loader(target_set(), 20)))

    def score(count: int, model_ids: list[int]) -> np.ndarray:
        again = np.arange(count) % 20
        for i in model_ids:
            traker.start_scoring_checkpoint("test", states[i], i, num_targets=count)
            traker.score((images[again], labels[again]), num_samples=count)
        return np.array(traker.finalize_scores("test", model_ids=model_ids))

    few, many = score(7, [0, 1]), score(30, [0, 1])
    assert few.shape == (300, 7)
    np.testing.assert_allclose(few, scores[:, :7], rtol=2e-2, atol=1e-2 * np.abs(scores).max())
    np.testing.assert_array_equal(many[:, :10], many[:, 20:])
    score(5, [1])
    Store(tmp_path).write_targets(1, "late", np.ones((3, 32), np.float32))
    assert "late" in json.loads((tmp_path / "experiments.json").read_text())
    with pytest.raises(FileNotFoundError, match="has 30 targets for model_id=0, 5 in all"):
        traker.finalize_scores("test")
    assert "late" in json.loads((tmp_path / "experiments.json").read_text())
    traker.start_scoring_checkpoint("one", states[1], 1, num_targets=20)
    traker.score((images, labels), num_samples=20)
    with pytest.raises(FileNotFoundError, match="'one' has no targets for model_id=0"):
        traker.finalize_scores("one")
    traker.finalize_scores("one", model_ids=[1])
    assert {"late", "one", "test"} <= json.loads((tmp_path / "experiments.json").read_text()).keys()


def test_processes_of_one_checkpoint_use_one_factor(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    images, labels = digits()
    first = reopen(model, tmp_path)
    first.load_checkpoint(model.state_dict(), 0)
    second, third = (reopen(model, tmp_path) for _ in range(2))
    third.load_checkpoint(model.state_dict(), 0)  # before there is a factor
    first.featurize((1e-5 * images[:50], labels[:50]), inds=np.arange(50))
    second.load_checkpoint(model.state_dict(), 0)
    second.featurize((1e-3 * images[50:99], labels[50:99]), inds=np.arange(50, 99))
    scale = Store(tmp_path).scale(0)
    assert scale > 1
    assert second.projector.scales.factors == first.projector.scales.factors == {0: scale}
    with pytest.raises(StoreMismatchError, match="another process stores gradients of model_id=0"):
        third.featurize((images[99:150], labels[99:150]), inds=np.arange(99, 150))
    assert Store(tmp_path).scale(0) == scale
    assert not np.load(tmp_path / "0" / "_is_featurized.mmap")[99:].any()
    third.load_checkpoint(model.state_dict(), 0)
    third.featurize((1e-5 * images[99:150], labels[99:150]), inds=np.arange(99, 150))


def test_processes_share_statistics(tmp_path: Path) -> None:
    model = mlp()
    options = {"proj_type": "weighted_dropout", "half": False}
    trakers = [reopen(model, tmp_path, **options) for _ in range(3)]
    for model_id, traker in enumerate(trakers):  # all open the store before one calibrates
        traker.load_checkpoint(model.state_dict(), model_id)
    featurize(trakers[0], 0)
    found = trakers[0].projector.statistics[None].digest
    # One that calibrates by itself takes over what is there by now.
    images, labels = digits()
    trakers[1].featurize((images[100:150], labels[100:150]), inds=np.arange(100, 150))
    assert trakers[1].projector.statistics[None].digest == found
    # One that was calibrated with others is refused before it writes anything.
    trakers[2].projector.calibrate([torch.randn(5, 2410)])
    before = listing(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreMismatchError, match="one calibrates, before the others open"):
            featurize(trakers[2], 2)
    assert listing(tmp_path) == before
    assert Store(tmp_path).manifest["statistics"] == {"shared": found}


def test_projector_and_saver_must_belong_together(tmp_path: Path) -> None:
    model = mlp()
    plugs = plugin(model, 32) | {"projector": DropoutProjector.from_model(model, 31)}
    with pytest.raises(StoreMismatchError, match="of one plugin"):
        TRAKer(model, "image_classification", 300, str(tmp_path / "s"), device="cpu", **plugs)
    assert not (tmp_path / "s").exists()


def test_features_without_a_manifest_are_refused(tmp_path: Path) -> None:
    model = mlp()
    quickstart(
        model, checkpoints(model, 1), tmp_path, projector=DropoutProjector.from_model(model, 32)
    )
    with pytest.raises(StoreMismatchError, match="without a manifest.json"):
        reopen(model, tmp_path)
    assert FeatureFiles(tmp_path).model_ids == [0]
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        open_store(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no TRAK results"):
        FeatureFiles(tmp_path / "nowhere")


def test_another_format_version_is_refused(stored: tuple[nn.Module, Path]) -> None:
    file = stored[1] / "manifest.json"
    file.write_text(file.read_text().replace('"format_version": 2', '"format_version": 99'))
    for opened in (lambda: reopen(*stored), lambda: open_store(stored[1]).manifest):
        with pytest.raises(StoreMismatchError, match="format_version 99"):
            opened()


def test_plain_trak_opens_it(stored: tuple[nn.Module, Path]) -> None:
    model, save_dir = stored
    traker = TRAKer(
        model,
        "image_classification",
        300,
        str(save_dir),
        device="cpu",
        projector=DropoutProjector.from_model(model, 32),
        logging_level=logging.ERROR,
    )
    assert traker.saver.model_ids == {m: {"is_featurized": 1, "is_finalized": 1} for m in (0, 1)}


@pytest.mark.parametrize(
    ("value", "half", "words"),
    [
        (np.nan, False, "NaN or infinite"),
        (np.inf, False, "NaN or infinite"),
        (1e6, True, "NaN or infinite as float16; use use_half_precision=False"),
        (-1e6, True, "NaN or infinite as float16"),
        (1e-9, True, "too small, so all zero, as float16"),
        (1e-60, False, "too small"),
    ],
)
def test_what_storage_cannot_hold_is_refused(
    tmp_path: Path, value: float, half: bool, words: str
) -> None:
    traker = reopen(mlp(), tmp_path, half=half)
    traker.saver.register_model_id(0, True)
    rows = np.zeros((4, 32))
    rows[2, 7] = value
    for name in ("grads", "features"):
        with pytest.raises(ValueError, match=rf"rows \[2\] .* {name}.mmap are {words}"):
            traker.saver.current_store[name][10:14] = rows
        assert not np.load(tmp_path / "0" / f"{name}.mmap", mmap_mode="r").any()


def test_scores_of_no_finalized_checkpoint_are_refused(tmp_path: Path) -> None:
    model = mlp()
    traker = reopen(model, tmp_path, half=False, load_from_save_dir=False)
    traker.load_checkpoint(model.state_dict(), 0)
    images, labels = digits()
    traker.featurize((images[:300], labels[:300]), num_samples=300)
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, num_targets=20)
    traker.score((images[-20:], labels[-20:]), num_samples=20)
    with pytest.raises(ValueError, match="call finalize_features before finalize_scores"):
        traker.finalize_scores("test")
    traker.finalize_features()
    scores = np.array(traker.finalize_scores("test"))
    assert np.isfinite(scores).all()
    assert np.array_equal(reopen(model, tmp_path, half=False).finalize_scores("test"), scores)


def test_incomplete_checkpoints_are_named(stored: tuple[nn.Module, Path]) -> None:
    model, save_dir = stored
    traker = reopen(model, save_dir)
    traker.load_checkpoint(model.state_dict(), 7)
    store = Store(save_dir)
    assert store.choose() == [0, 1]
    with pytest.raises(IncompleteStoreError, match=r"model_ids \[7, 8\] are not complete"):
        store.choose([0, 7, 8])
    with pytest.raises(IncompleteStoreError, match="holds no weights for model_id=0"):
        store.weights(0)
    traker.saver.del_grads(0)
    with pytest.raises(IncompleteStoreError, match="has no grads"):
        store.grads(0)
    empty = reopen(model, save_dir.parent / "empty")
    with pytest.raises(IncompleteStoreError, match="no completely featurized checkpoint"):
        Store(empty.save_dir).choose()
