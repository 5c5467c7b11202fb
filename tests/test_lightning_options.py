"""GradientCollector: when it collects, over what, of which part of the module, and for whom."""

import itertools
import os
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cases import Classifier, digits, loader, mlp, target_set, train_set, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_lightning import fit
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from trak_dropout import BatchError, LossOutput, open_store, top_influences
from trak_dropout.attribution import Featurizer
from trak_dropout.collation import Reorders
from trak_dropout.lightning import GradientCollector
from trak_dropout.lightning import rows as rows_of_a_store
from trak_dropout.lightning.rows import RowWriter
from trak_dropout.store import Store


def net(cls: type[Classifier] = Classifier, *given: Any) -> Classifier:
    """A module with the same weights each time."""
    torch.manual_seed(0)
    return cls(*(given or (mlp(),)))


def steps(collector: GradientCollector) -> list[int]:
    return [collector.store.describe(m)["global_step"] for m in collector.model_ids]


# --- how ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "given", "expected"),
    [(32, None, [60] * 16 + [20]), (32, 20, [20] * 49), (40_000, None, [20] * 49)],
)
def test_small_samples_are_taken_more_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hidden: int,
    given: int | None,
    expected: list[int],
) -> None:
    # The wide layer counts although nothing is collected of it.
    names = "net.3.bias" if hidden > 32 else None

    def run(name: str, batch_size: int | None, **options: Any) -> GradientCollector:
        torch.manual_seed(0)
        data, module = loader(train_set(980), batch_size=20), net(Classifier, mlp(hidden))
        options = {"max_epochs": 1, "limit_train_batches": 1, **options}
        options |= {"batch_size": batch_size, "grad_wrt": names, "proj_dim": 10}
        return fit(tmp_path / name, module, data, **options)[0]

    seen, features = [], Featurizer.features

    def counted(self: Featurizer, batch: Any, model_id: int) -> torch.Tensor:
        seen.append(len(batch[0]))
        return features(self, batch, model_id)

    monkeypatch.setattr(Featurizer, "features", counted)
    collector = run("s", given)
    assert seen[1:] == expected  # the first batch is tried when training starts
    by_loader = run("by_loader", 20).store.grads(0)
    np.testing.assert_allclose(collector.store.grads(0), by_loader, rtol=1e-4, atol=1e-5)


class Varied(Dataset):
    """Images of varied size, with noise that starts anew for each batch."""

    def __init__(self, n: int = 64) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitems__(self, indices: list[int]) -> list[Any]:
        height = 8 + indices[0] // 6 % 2
        return [(torch.randn(1, height, 8), index % 3) for index in indices]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]


class Energy(nn.Module):
    """Asks for a gradient in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.inner(images).sum(), images)
        return self.head(slope.mean((1, 2)))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.Sequential(Energy().inner, nn.Flatten(), nn.Linear(4, 3)), None),
        (Energy, ["net.head.weight", "net.head.bias"]),
    ],
)
def test_joining_batches_changes_no_sample(
    tmp_path: Path, batch_size: int, build: Any, names: list[str] | None
) -> None:
    def rows(given: int | None) -> Any:
        torch.manual_seed(0)
        data = DataLoader(Varied(), batch_size)
        options = {"max_epochs": 1, "limit_train_batches": 1, "proj_dim": 9, "grad_wrt": names}
        folder = tmp_path / str(given)
        return fit(folder, net(Classifier, build()), data, batch_size=given, **options)[0]

    joined, alone = rows(None).store, rows(batch_size).store
    np.testing.assert_allclose(joined.grads(0), alone.grads(0), rtol=1e-4, atol=1e-6)


def test_joined_batches_are_resumed_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, ckpt_path: Path | None = None) -> GradientCollector:
        torch.manual_seed(0)
        module = net(Classifier, nn.Sequential(nn.AdaptiveAvgPool2d(8), mlp()))
        collector = GradientCollector(
            tmp_path / f"{name}_store",
            proj_dim=48,
            when="checkpoint",
            dataloader=loader(Varied(320), batch_size=4),
        )
        saver = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        options = {"max_epochs": 2, "limit_train_batches": 2, "enable_checkpointing": True}
        runner = trainer(callbacks=[collector, saver], **options)
        runner.fit(module, loader(train_set(980), batch_size=20), ckpt_path=ckpt_path)
        return collector

    expected, written = run("undisturbed"), []

    def dying(self: RowWriter, start: int, *rows: Any) -> None:
        written.append((start, len(rows[0])))
        if len(written) == 31:
            raise RuntimeError("killed")
        write(self, start, *rows)

    write = RowWriter.write
    monkeypatch.setattr(RowWriter, "write", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run("resumed")
    monkeypatch.undo()
    assert max(count for _, count in written) > 4  # some were joined
    again: list[int] = []

    def watching(self: RowWriter, start: int, *rows: Any) -> None:
        again.append(start)
        write(self, start, *rows)

    monkeypatch.setattr(RowWriter, "write", watching)
    found = run("resumed", tmp_path / "resumed" / "epoch=0.ckpt")
    assert again[0] % 20 == 0 < again[0]  # five batches may be joined: all of them are read again
    assert found.model_ids == expected.model_ids == [0, 1]
    for model_id in found.model_ids:
        np.testing.assert_array_equal(found.store.grads(model_id), expected.store.grads(model_id))


def test_what_a_failed_sync_may_have_lost_is_not_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, sync = [], os.fsync

    def failing(file: int) -> None:
        calls.append(threading.current_thread() is threading.main_thread())
        if not calls[-1] and calls.count(False) == 1:
            time.sleep(0.2)
            raise OSError(5, "no disk")
        sync(file)

    monkeypatch.setattr(rows_of_a_store, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="no disk"):
        fit(tmp_path / "s", data=loader(train_set(), batch_size=5), batch_size=5, max_epochs=1)
    assert False in calls
    assert not np.load(tmp_path / "s" / "0" / "_is_featurized.mmap").any()


# --- when -----------------------------------------------------------------------------------------


def test_every_n_steps_counts_optimizer_steps(tmp_path: Path) -> None:
    # 12 batches in two epochs, two of which make a step.
    collector, _, _ = fit(tmp_path / "s", every_n_train_steps=2, accumulate_grad_batches=2)
    assert steps(collector) == [2, 4, 6]
    assert collector.store.describe(0)["batches"] == 4


def test_several_moments_at_one_position_are_one_collection(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1)
    collector, _, _ = fit(
        tmp_path / "s",
        when=["epoch", "checkpoint", "step", "train_end"],
        every_n_train_steps=6,
        callbacks=[saver],
        enable_checkpointing=True,
    )
    assert steps(collector) == [4, 6, 8, 12]


def test_train_end(tmp_path: Path) -> None:
    collector, module, _ = fit(tmp_path / "s", when="train_end", max_epochs=3)
    assert steps(collector) == [18]
    kept = collector.store.weights(0)
    assert all(torch.equal(kept[n], t) for n, t in module.state_dict().items())


def test_checkpoints_are_tied_to_files_and_metrics(tmp_path: Path) -> None:
    data = loader(train_set(), shuffle=True)

    def run(name: str, **options: Any) -> GradientCollector:
        pl.seed_everything(0, verbose=False)
        collector = GradientCollector(tmp_path / name, proj_dim=48, **options)
        saver = ModelCheckpoint(
            tmp_path / f"{name}_ckpt", filename="{epoch}", monitor="val_loss", save_top_k=1
        )
        trainer(max_epochs=4, callbacks=[collector, saver], enable_checkpointing=True).fit(
            net(), data, loader(target_set())
        )
        return collector

    for when in ("epoch", "checkpoint"):
        kept = run(f"{when}_kept", when=when)
        facts = [kept.store.describe(m) for m in kept.model_ids]
        assert [f["epoch"] for f in facts] == [0, 1, 2, 3]
        assert [f["checkpoints"] for f in facts[:3]] == [[], [], []]
        last = str(tmp_path / f"{when}_kept_ckpt" / "epoch=3.ckpt")
        assert facts[3]["checkpoints"] == [last]
        assert Path(last).is_file()
        assert facts[3]["metrics"]["val_loss"] < facts[0]["metrics"]["val_loss"]
        dropped = run(f"{when}_dropped", when=when, drop_deleted=True)
        assert dropped.model_ids == [3]
        assert not (tmp_path / f"{when}_dropped" / "0").exists()
        np.testing.assert_array_equal(dropped.store.grads(3), kept.store.grads(3))
        dropped.attribute(loader(target_set()), progress=False)


def test_the_trainers_checkpoint_plugin_is_given_back(tmp_path: Path) -> None:
    first = GradientCollector(tmp_path / "a", proj_dim=48)
    second = GradientCollector(tmp_path / "b", proj_dim=40, seed=1)
    runner = trainer(max_epochs=1, callbacks=[first, second])
    plugin = runner.strategy.checkpoint_io
    runner.fit(net(), loader(train_set()))
    assert runner.strategy.checkpoint_io is plugin
    assert first.store.grads(0).shape == (300, 48)
    assert second.store.grads(0).shape == (300, 40)


# --- over what ------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Samples in an order of their own, without a length."""

    def __iter__(self) -> Any:
        yield from zip(*(part[:120] for part in digits()), strict=True)


@pytest.mark.parametrize("how", ["train_set_size", "len"])
def test_iterable_data_sets_of_stated_length(tmp_path: Path, how: str) -> None:
    class Sized(Stream):
        def __len__(self) -> int:
            return 120

    data, options = (Sized(), {}) if how == "len" else (Stream(), {"train_set_size": 120})
    collector, _module, _ = fit(
        tmp_path / "s", net(), DataLoader(data, 50), max_epochs=1, **options
    )
    fixed, _, _ = fit(tmp_path / "m", net(), loader(train_set(120)), max_epochs=1)
    np.testing.assert_array_equal(collector.store.grads(0), fixed.store.grads(0))


class Sharded(Stream):
    """Each worker has a part of the samples."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        return itertools.islice(super().__iter__(), start, None, step)


@pytest.mark.parametrize("kind", [Stream, Sharded])
def test_streams_that_several_workers_read_are_in_order(tmp_path: Path, kind: Any) -> None:
    one = loader(train_set(120))
    stream = DataLoader(kind(), 50, num_workers=2)
    rows = [
        fit(tmp_path / name, net(), one, max_epochs=1, dataloader=data, **options)[0].store.grads(0)
        for name, data, options in (("s", stream, {"train_set_size": 120}), ("m", one, {}))
    ]
    np.testing.assert_allclose(*rows, rtol=1e-4, atol=1e-6)


def test_a_stream_of_another_length_is_refused(tmp_path: Path) -> None:
    for stated, words in ((150, "holds 20 samples instead of 50"), (200, "ended after 3 of 5")):
        with pytest.raises(BatchError, match=words):
            fit(
                tmp_path / str(stated), net(), DataLoader(Stream(), 50 if stated == 150 else 40),
                train_set_size=stated,
            )  # fmt: skip
        assert open_store(tmp_path / str(stated)).model_ids == []


def test_a_loader_given(tmp_path: Path) -> None:
    given = loader(train_set(80), 16, shuffle=True, num_workers=2)
    collector, _, _ = fit(tmp_path / "a", net(), max_epochs=1, dataloader=given)
    assert collector.store.train_set_size == 80
    whole, _, _ = fit(tmp_path / "b", net(), max_epochs=1, batch_size=16)
    np.testing.assert_array_equal(collector.store.grads(0), whole.store.grads(0)[:80])


def test_indices(tmp_path: Path) -> None:
    chosen = [250, 3, 3, 77]
    collector, _, _ = fit(tmp_path / "a", net(), max_epochs=1, indices=chosen)
    whole, _, _ = fit(tmp_path / "b", net(), max_epochs=1)
    np.testing.assert_allclose(
        collector.store.grads(0), whole.store.grads(0)[chosen], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(MisconfigurationException, match=r"indices \[300\] are outside"):
        fit(tmp_path / "c", indices=[300])
    with pytest.raises(MisconfigurationException, match="train_set_size=7 was given"):
        fit(tmp_path / "c", train_set_size=7)


class Opened(Dataset):
    """Images that each worker opens for itself, in parts or as a whole."""

    images: Any = None

    def __init__(self) -> None:
        self._seed = "the data set's own"

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        return self.images[index], digits()[1][index]


def open_images(worker: int) -> None:
    dataset = get_worker_info().dataset  # type: ignore[union-attr]
    if hasattr(dataset, "indices"):
        dataset = dataset.dataset
    assert (dataset.images, dataset._seed, len(dataset)) == (None, "the data set's own", 60)
    dataset.images = digits()[0]


@pytest.mark.parametrize(("how", "part"), [("fork", False), ("spawn", True)])
def test_workers_reach_the_data_set_by_its_attributes(tmp_path: Path, how: str, part: bool) -> None:
    data = Subset(Opened(), range(50)) if part else Opened()
    chosen = [7, 3, 40, 11]
    read = loader(data, 2, num_workers=1, worker_init_fn=open_images, multiprocessing_context=how)
    collector, _, _ = fit(
        tmp_path / how, net(), loader(train_set(60)), max_epochs=1, dataloader=read, indices=chosen
    )
    plain, _, _ = fit(tmp_path / "plain", net(), loader(train_set(60)), max_epochs=1,
                      indices=chosen, batch_size=2)  # fmt: skip
    np.testing.assert_array_equal(collector.store.grads(0), plain.store.grads(0))


def by_ink(samples: list[Any]) -> Any:
    """Darkest image first, as sequences are sorted by length."""
    return default_collate(sorted(samples, key=lambda sample: -float(sample[0].sum())))


@pytest.mark.parametrize("options", [{}, {"indices": list(range(10, 90, 2))}])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_collation_that_reorders_samples_is_refused(
    tmp_path: Path, workers: int, options: dict[str, Any]
) -> None:
    data = loader(train_set(90), 20, collate_fn=by_ink, num_workers=workers)
    with pytest.raises(MisconfigurationException, match=r"collate_fn \(by_ink\) reorders samples"):
        fit(tmp_path / "s", net(), data, **options)
    assert not (tmp_path / "s").exists()
    fit(tmp_path / "s", net(), data, max_epochs=1, dataloader=loader(train_set(90)), **options)


def noisy(samples: list[Any]) -> Any:
    images, labels = default_collate(samples)
    return images + 0.1 * torch.randn(images.shape) * np.random.random(), labels  # noqa: NPY002


def mixed(samples: list[Any]) -> Any:
    images, labels = default_collate(samples)
    return images.lerp(images[torch.randperm(len(images))], 0.2), labels


def emptied(samples: list[Any]) -> Any:
    images = torch.stack([sample.pop("image") for sample in samples])
    return images, torch.tensor([sample.pop("label") for sample in samples])


class Named(Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(zip(("image", "label"), train_set()[index], strict=True))


@pytest.mark.parametrize("collate", [noisy, mixed, emptied])
def test_other_collations_are_not_refused_and_training_is_not_disturbed(
    tmp_path: Path, collate: Any
) -> None:
    data = Named() if collate is emptied else train_set(60)
    weights = []
    for collecting in (False, True):
        torch.manual_seed(0)
        pl.seed_everything(0, verbose=False)
        module, batches = net(), loader(data, 20, shuffle=True, collate_fn=collate)
        callbacks = [GradientCollector(tmp_path / "s", proj_dim=16)] if collecting else []
        pl.seed_everything(1, verbose=False)
        trainer(max_epochs=2, callbacks=callbacks).fit(module, batches)
        weights.append(torch.cat([weight.flatten() for weight in module.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("collate", "expected"),
    [
        (lambda x: torch.stack(sorted(x, key=lambda y: -float(y[0]))), True),
        (lambda x: [torch.stack(x[1:] + x[:1]), torch.arange(len(x))], True),
        # Sequence first, and in an order drawn with the usual random states.
        (lambda x: {"a": torch.stack([x[i] for i in torch.randperm(len(x))], 1)}, True),
        (lambda x: {"a": torch.stack(x, 1)}, False),
        # What is left for the model to sort by; neighbors within the batch; relations.
        (lambda x: (torch.stack(x), torch.stack(x)[:, 0].sort(), torch.stack(x).roll(1, 0)), False),
        (lambda x: (torch.stack(x) @ torch.stack(x).T, torch.arange(len(x))), False),
        (lambda x: [torch.cat([torch.stack(x)] * 2), torch.arange(len(x))], False),
        (lambda x: torch.stack([x[i] for i in np.random.default_rng().permutation(len(x))]), False),
        (lambda x: sorted(x, key=lambda y: -float(y[0])), False),
        (lambda x: [{"no": "tensor"}] * len(x), False),
        (lambda x: 1 / 0, False),
    ],
)
def test_what_reordering_is(collate: Any, expected: bool) -> None:
    samples = list(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
    before = torch.get_rng_state()
    assert Reorders(collate)(samples) is expected
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_of_a_sample_depends_on_its_index_alone(tmp_path: Path) -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            image, label = self.tensors[0][index], self.tensors[1][index]
            return image + 0.1 * torch.randn(image.shape), label

        __getitems__ = None  # type: ignore[assignment]

    data = Noisy(*train_set(90).tensors)
    stores = [
        fit(tmp_path / str(i), net(), loader(data, 30), max_epochs=1, **options)[0].store
        for i, options in enumerate(
            ({}, {"dataloader": loader(data, 30, num_workers=2)}, {"augmentation_seed": 5})
        )
    ]
    np.testing.assert_array_equal(stores[0].grads(0), stores[1].grads(0))
    assert not np.allclose(stores[0].grads(0), stores[2].grads(0))
    part = Subset(data, range(30, 90))
    shifted, _, _ = fit(
        tmp_path / "x",
        net(),
        loader(data, 30),
        max_epochs=1,
        dataloader=loader(part, 30),
    )
    assert shifted.store.train_set_size == 60


# --- of what --------------------------------------------------------------------------------------


def test_a_submodule(tmp_path: Path) -> None:
    collector, module, _ = fit(tmp_path / "a", max_epochs=1, model="net")
    whole, _, _ = fit(tmp_path / "b", max_epochs=1)
    np.testing.assert_array_equal(collector.store.grads(0), whole.store.grads(0))
    assert collector.store.settings.parameters[0][0] == "0.weight"
    scores = collector.attribute(loader(target_set()), progress=False)
    np.testing.assert_array_equal(scores, whole.attribute(loader(target_set()), progress=False))
    for given in (module.net, module):
        again = open_store(tmp_path / "a", given)
        np.testing.assert_array_equal(again.attribute(loader(target_set()), progress=False), scores)
    elsewhere = GradientCollector(tmp_path / "a", proj_dim=48, model="net")  # as after ddp_spawn
    again = elsewhere.attribute(loader(target_set()), module, progress=False)
    np.testing.assert_array_equal(again, scores)
    with pytest.raises(MisconfigurationException, match="Classifier has net"):
        fit(tmp_path / "c", model="encoder")


def test_parameters_by_pattern(tmp_path: Path) -> None:
    collector, _, _ = fit(tmp_path / "a", max_epochs=1, grad_wrt=["net.7.*", "net.0.bias"])
    names = [name for name, _ in collector.store.settings.parameters]
    assert names == ["net.0.bias", "net.7.weight", "net.7.bias"]
    with pytest.raises(MisconfigurationException, match=r"'net.9.\*' matches no parameter"):
        fit(tmp_path / "b", grad_wrt="net.9.*")


def test_the_modules_own_loss(tmp_path: Path) -> None:
    class WithLoss(Classifier):
        def __init__(self, given: nn.Module) -> None:
            super().__init__(given)
            self.criterion = nn.CrossEntropyLoss()

    collector, _module, _ = fit(tmp_path / "a", net(WithLoss), max_epochs=1, task="loss")
    other, _, _ = fit(
        tmp_path / "b", net(WithLoss), max_epochs=1, task=LossOutput(nn.CrossEntropyLoss())
    )
    np.testing.assert_array_equal(collector.store.grads(0), other.store.grads(0))
    assert collector.store.settings.task == "LossOutput(CrossEntropyLoss())"
    scores = collector.attribute(loader(target_set()), progress=False)
    assert scores.shape == (300, 20)
    elsewhere = GradientCollector(tmp_path / "a", proj_dim=48, task="loss")  # as after ddp_spawn
    again = elsewhere.attribute(loader(target_set()), collector._module, progress=False)
    np.testing.assert_array_equal(again, scores)
    with pytest.raises(MisconfigurationException, match="has no loss function as attribute"):
        fit(tmp_path / "c", net(), task="loss")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_that_cancel_are_told_of(tmp_path: Path, reduction: str) -> None:
    class Weighted(Classifier):
        def __init__(self, given: nn.Module) -> None:
            super().__init__(given)
            weight = torch.arange(1.0, 11)
            self.criterion = nn.CrossEntropyLoss(weight, reduction=reduction)

    plain, _, _ = fit(tmp_path / "a", net(), max_epochs=1, task=LossOutput(nn.CrossEntropyLoss()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weighted, _, _ = fit(tmp_path / "b", net(Weighted), max_epochs=1, task="loss")
    told = [
        w for w in caught if "Weighted.criterion divides by the class weights" in str(w.message)
    ]
    assert len(told) == (reduction == "mean")
    factor = 1 if reduction == "mean" else train_set()[:][1][:, None].numpy() + 1
    np.testing.assert_allclose(
        weighted.store.grads(0), plain.store.grads(0) * factor, rtol=1e-3, atol=1e-4
    )


class Unlogged(Classifier):
    """Lightning's logging cannot be compiled."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules(tmp_path: Path, whole: bool) -> None:
    module: Any = net(Unlogged)
    if whole:
        module = torch.compile(module, backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    collector, _, _ = fit(tmp_path / "b", module, max_epochs=1)
    plain, _, _ = fit(tmp_path / "a", net(Unlogged), max_epochs=1)
    np.testing.assert_allclose(collector.store.grads(0), plain.store.grads(0), rtol=1e-3, atol=1e-5)
    scores = [c.attribute(loader(target_set()), progress=False) for c in (collector, plain)]
    np.testing.assert_allclose(*scores, rtol=1e-2, atol=1e-6)


# --- for whom -------------------------------------------------------------------------------------


def test_targets_are_kept_with_each_checkpoint(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader(train_set(), shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return loader(target_set(12))

        def test_dataloader(self) -> DataLoader:
            return loader(target_set(), shuffle=True)

    collector, _module, _ = fit(tmp_path / "a", net(), Data(), targets=["val", "test"])
    store = Store(tmp_path / "a")
    scores = collector.attribute(loader(target_set()), progress=False)
    indices, values = top_influences(store, "test", 5)  # no model at hand
    expected = np.sort(scores, axis=0)[::-1][:5].T
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())
    assert top_influences(store, "val", 5)[0].shape == (12, 5)
    assert indices.shape == (20, 5)
    by_name, _, _ = fit(tmp_path / "b", net(), targets={"mine": loader(target_set())}, max_epochs=1)
    assert top_influences(by_name.store, "mine", 3)[0].shape == (20, 3)
    with pytest.raises(MisconfigurationException, match="needs a loader from the test_dataloader"):
        fit(tmp_path / "c", targets="test")


class Augments(Classifier):
    """Inverts images while it trains, and those of each validation loader by its number."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        factor = -1 if self.trainer.training else 1 + dataloader_idx
        return [factor * batch[0], batch[1]]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


@pytest.mark.parametrize("part", [None, "net"])
def test_hooks_know_targets_from_training_data(tmp_path: Path, part: str | None) -> None:
    class Two(Augments):
        def val_dataloader(self) -> Any:
            return {"near": loader(target_set(12)), "far": loader(target_set(7))}

    collector, module, runner = fit(
        tmp_path / "a", net(Two), max_epochs=1, targets=["val"], model=part
    )
    store = collector.store
    store.add_targets("again", loader(target_set(12)), progress=False)
    given = [None, module, *([module.net] if part else [])]
    scores = [collector.attribute(loader(target_set(7)), m, progress=False) for m in given]
    assert all(np.array_equal(one, scores[0]) for one in scores)
    images, labels = target_set(7).tensors
    plain = open_store(tmp_path / "a", module.net if part else net())
    plain.add_targets("far", [(2 * images, labels)], module.net if part else None, progress=False)
    for found, expected in (("val_near", "again"), ("val_far", "far")):
        rows = [np.load(tmp_path / f"a/0/{name}_grads.mmap") for name in (found, expected)]
        np.testing.assert_allclose(*rows, rtol=1e-3, atol=1e-5)
    assert not runner.validating


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}])
def test_validation_data_that_were_not_read_yet(tmp_path: Path, options: dict[str, Any]) -> None:
    collector = GradientCollector(tmp_path, proj_dim=48, targets="val")
    runner = trainer(callbacks=[collector], num_sanity_val_steps=0, **options)
    runner.fit(net(), loader(train_set()), loader(target_set()))
    assert [top_influences(collector.store, "val", 3, model_ids=[m])[0].shape for m in (0, 1)] == [
        (20, 3)
    ] * 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([target_set().tensors[:1]], "targets 'mine': batch: .* takes a tuple of tensors"),
        ([], "targets 'mine': there are none"),
        (iter([target_set().tensors]), "can be read only once"),
    ],
)
def test_targets_are_tried_before_training(tmp_path: Path, given: Any, words: str) -> None:
    with pytest.raises((BatchError, MisconfigurationException), match=words):
        fit(tmp_path / "s", net(), targets={"mine": given})
    assert not (tmp_path / "s").exists()


def test_targets_that_a_collation_reorders_are_refused(tmp_path: Path) -> None:
    """In training before it begins, and afterwards."""
    sorting = loader(target_set(), collate_fn=by_ink)
    words = r"'mine', collate_fn \(by_ink\) reorders samples"
    with pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path / "s", net(), targets={"mine": sorting})
    drawn = DataLoader(target_set(), 5, sampler=SubsetRandomSampler(range(20)))
    with pytest.raises(MisconfigurationException, match=r"targets 'mine': .*order is unknown"):
        fit(tmp_path / "s", net(), targets={"mine": drawn})
    assert not (tmp_path / "s").exists()
    collector, _, _ = fit(tmp_path / "s", net(), max_epochs=1)
    for score in (collector.attribute, partial(collector.store.add_targets, "mine")):
        with pytest.raises(ValueError, match=r"collate_fn \(by_ink\) reorders samples"):
            score(sorting, progress=False)
    scores = collector.attribute(loader(target_set(), collate_fn=noisy), progress=False)
    assert scores.shape == (300, 20)


def test_metrics_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="log")
    fit(tmp_path / "a", logger=logger)
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    rates = [r["collector/samples_per_second"] for r in rows if r["collector/samples_per_second"]]
    shares = [float(r["collector/share_of_time"]) for r in rows if r["collector/share_of_time"]]
    assert len(rates) == len(shares) == 2
    assert all(0 < share < 1 for share in shares)
