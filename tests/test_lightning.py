"""GradientCollector in real Trainers."""

import copy
import inspect
import json
import logging
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cases import (
    Classifier,
    digits,
    loader,
    mlp,
    quickstart,
    target_set,
    train_set,
    trainer,
)
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)
from trak import TRAKer

from trak_dropout import (
    BatchError,
    DropoutProjector,
    FactoredGradientComputer,
    LossOutput,
    NonFiniteGradientError,
    StoreMismatchError,
    open_store,
    plugin,
    self_influence,
)
from trak_dropout.lightning import GradientCollector


def fit(
    save_dir: Path, module: pl.LightningModule | None = None, data: Any = None, **options: Any
) -> tuple[GradientCollector, pl.LightningModule, pl.Trainer]:
    """Train with a collector; options go to the Trainer and, by name, to the collector."""
    names = inspect.signature(GradientCollector).parameters
    ours = {name: options.pop(name) for name in list(options) if name in names}
    pl.seed_everything(0, verbose=False)
    module = Classifier() if module is None else module
    collector = GradientCollector(save_dir, **{"proj_dim": 48, **ours})
    callbacks = [collector, *options.pop("callbacks", [])]
    runner = trainer(callbacks=callbacks, **options)
    runner.fit(module, loader(train_set(), shuffle=True) if data is None else data)
    return collector, module, runner


class Sequence(Dataset):
    """A map-style data set with random augmentation, from global random states."""

    def __init__(self, n: int = 120) -> None:
        self.images, self.labels = (part[:n] for part in digits())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = 0.01 * (torch.randn(1).item() + random.random() + np.random.random())  # noqa: NPY002
        return self.images[index] + noise, self.labels[index]


# --- the same as plain TRAK -----------------------------------------------------------------------


@pytest.mark.parametrize("when", ["epoch", "checkpoint"])
@pytest.mark.parametrize("validate", [False, True])
def test_store_equals_a_hand_written_loop_to_the_bit(
    tmp_path: Path, when: str, validate: bool
) -> None:
    # With a validation loader ModelCheckpoint saves inside the validation loop, in inference mode.
    data = {"train_dataloaders": loader(train_set(), shuffle=True)}
    if validate:
        data["val_dataloaders"] = loader(target_set())
    saver = ModelCheckpoint(
        tmp_path / "ckpt", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=not validate
    )
    torch.manual_seed(0)
    module = Classifier()
    collector = GradientCollector(tmp_path / "store", proj_dim=48, seed=3, when=when)
    trainer(max_epochs=3, callbacks=[collector, saver], enable_checkpointing=True).fit(
        module, **data
    )
    states = [
        torch.load(tmp_path / "ckpt" / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        for epoch in range(3)
    ]
    projector = DropoutProjector.from_model(module, 48, seed=3)
    hand, expected = quickstart(
        copy.deepcopy(module),
        states,
        tmp_path / "hand",
        use_half_precision=False,
        projector=projector,
        gradient_computer=FactoredGradientComputer,
    )
    opened = TRAKer(  # a plain TRAKer over the store that the callback wrote
        module,
        "image_classification",
        300,
        str(tmp_path / "store"),
        device="cpu",
        use_half_precision=False,
        projector=projector,
        gradient_computer=FactoredGradientComputer,
        logging_level=logging.ERROR,
    )
    opened.finalize_features()
    for model_id, state in enumerate(states):
        opened.start_scoring_checkpoint("test", state, model_id, 20)
        for batch in loader(target_set()):
            opened.score(batch, num_samples=20)
    np.testing.assert_array_equal(np.array(opened.finalize_scores("test")), expected)
    for model_id, state in enumerate(states):
        for name in ("grads", "out_to_loss"):
            files = [root / f"{model_id}/{name}.mmap" for root in (hand.save_dir, opened.save_dir)]
            np.testing.assert_array_equal(*(np.load(file, mmap_mode="r") for file in files))
        kept = collector.store.weights(model_id)
        assert set(kept) == set(state)
        assert all(torch.equal(kept[key], state[key]) for key in kept)
    # TRAK's own gradient computer sums in another order.
    plain, _ = quickstart(
        copy.deepcopy(module),
        states,
        tmp_path / "plain",
        use_half_precision=False,
        projector=projector,
    )
    for model_id in range(3):
        files = [root / f"{model_id}/grads.mmap" for root in (plain.save_dir, opened.save_dir)]
        theirs, ours = (np.load(file, mmap_mode="r") for file in files)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())


def test_attribute_equals_the_four_plugs_to_the_bit(tmp_path: Path) -> None:
    collector, module, _ = fit(tmp_path / "store", seed=1)
    before = copy.deepcopy(module.state_dict())
    module.train()
    scores = collector.attribute(loader(target_set()), progress=False)
    assert scores.shape == (300, 20)
    assert scores.dtype == np.float32
    states = [collector.store.weights(m) for m in collector.model_ids]
    traker, expected = quickstart(
        copy.deepcopy(module),
        states,
        tmp_path / "hand",
        use_half_precision=False,
        **plugin(module, 48, seed=1),
    )
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(collector.self_influence(), self_influence(traker))
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    one = collector.attribute(loader(target_set()), model_ids=[1], damping=0.1, progress=False)
    assert not np.allclose(one, scores)


def test_new_process_attributes_the_same(tmp_path: Path) -> None:
    collector, _, _ = fit(tmp_path / "store")
    expected = collector.attribute(loader(target_set()), progress=False)
    torch.manual_seed(5)
    fresh = Classifier()  # other weights: they come from the store
    store = open_store(tmp_path / "store", model=fresh)
    np.testing.assert_array_equal(store.attribute(loader(target_set()), progress=False), expected)
    np.testing.assert_array_equal(store.self_influence(), collector.self_influence())
    with pytest.raises(ValueError, match="model is needed"):
        open_store(tmp_path / "store").attribute(loader(target_set()))
    with pytest.raises(StoreMismatchError, match=r"model has net.1.weight \(32, 64\)"):
        store.attribute(loader(target_set()), Classifier(mlp()), progress=False)
    with pytest.raises(TypeError, match="got the class Classifier; give an instance of it"):
        store.attribute(loader(target_set()), cast(Any, Classifier), progress=False)


def test_shuffled_targets_come_in_dataset_order(tmp_path: Path) -> None:
    collector, _, _ = fit(tmp_path / "store")
    scores = [
        collector.attribute(loader(target_set(), **options), progress=False)
        for options in ({}, {"shuffle": True})
    ]
    np.testing.assert_array_equal(*scores)
    targets = target_set()
    batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(targets), 5, False)
    again = collector.attribute(DataLoader(targets, batch_sampler=batches), progress=False)
    np.testing.assert_allclose(again, scores[0], rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match="order is unknown"):
        collector.attribute(DataLoader(targets, 5, sampler=SubsetRandomSampler(range(20))))
    with pytest.raises(BatchError, match="no targets"):
        collector.attribute([], progress=False)
    with pytest.raises(BatchError, match="takes a tuple of tensors"):
        collector.attribute([{"x": 1}], progress=False)


# --- training is what it would have been ----------------------------------------------------------


def random_state() -> list[Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest]


def undisturbed(tmp_path: Path, callbacks: list[Any], **options: Any) -> tuple[dict, str, list]:
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    logger = CSVLogger(tmp_path, name="log", version=len(callbacks))
    runner = trainer(
        max_epochs=3, callbacks=callbacks, logger=logger, log_every_n_steps=1, **options
    )
    data = Sequence()
    runner.fit(
        module, loader(data, 32, shuffle=True), loader(TensorDataset(data.images, data.labels))
    )
    assert module.training is not None
    metrics = Path(logger.log_dir, "metrics.csv").read_text()
    modes = [child.training for child in module.modules()]
    grads = [(p.requires_grad, p.grad is None) for p in module.parameters()]
    return module.state_dict(), metrics, [random_state(), modes, grads]


@pytest.mark.parametrize("when", ["epoch", "checkpoint"])
def test_training_is_bit_equal(tmp_path: Path, when: str) -> None:
    options: dict[str, Any] = {}
    if when == "checkpoint":
        options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    plain_weights, plain_log, plain_rest = undisturbed(tmp_path, [], **options)
    collector = GradientCollector(tmp_path / "store", proj_dim=48, when=when, log=False)
    weights, log, rest = undisturbed(tmp_path, [collector], **options)
    assert collector.model_ids == [0, 1, 2]
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)
    assert log == plain_log
    assert rest == plain_rest


def test_augmentation_is_the_same_in_every_collection(tmp_path: Path) -> None:
    class Frozen(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    store = fit(tmp_path / "store", Frozen(mlp()), loader(Sequence(), 32, shuffle=True))[0].store
    np.testing.assert_array_equal(store.out_to_loss(0), store.out_to_loss(1))


# --- when, and what over --------------------------------------------------------------------------


def test_every_n_epochs(tmp_path: Path) -> None:
    collector, _, _ = fit(tmp_path / "store", max_epochs=5, every_n_epochs=2)
    facts = [collector.store.describe(m) for m in collector.model_ids]
    assert [(f["epoch"], f["global_step"]) for f in facts] == [(1, 12), (3, 24)]
    assert all(f["seconds"] > 0 for f in facts)
    assert collector.collect_seconds > 0


def test_rows_are_in_dataset_order(tmp_path: Path) -> None:
    images, labels = digits()
    collector, module, _ = fit(
        tmp_path / "store",
        data=loader(TensorDataset(images[:70], labels[:70]), 32, shuffle=True, drop_last=True),
        max_epochs=1,
        fold=1,
    )
    store = collector.store
    assert store.train_set_size == 70
    plugs = plugin(module, 48, fold=1)
    computer = plugs["gradient_computer"](module.eval(), *task_and_dim())
    grads = computer.compute_per_sample_grad([images[67:70], labels[67:70]])
    expected = plugs["projector"].project(grads, 0) / np.sqrt(plugs["projector"].grad_dim)
    np.testing.assert_allclose(store.grads(0)[67:70], expected.detach(), rtol=1e-3, atol=1e-5)


def task_and_dim() -> tuple[Any, int]:
    from trak.modelout_functions import ImageClassificationModelOutput

    return ImageClassificationModelOutput(), 0


@pytest.mark.parametrize(
    "options",
    [
        {"grad_wrt": ["net.7.weight"]},
        {"batch_size": 17},
        {"use_half_precision": True},
        {"fold": 1},
        {"task": LossOutput(nn.functional.cross_entropy)},
    ],
)
def test_options(tmp_path: Path, options: dict) -> None:
    collector, module, _ = fit(tmp_path / "store", max_epochs=1, **options)
    store = collector.store
    assert store.grads(0).dtype == (np.float16 if "use_half_precision" in options else np.float32)
    assert np.isfinite(store.self_influence()).all()
    assert np.isfinite(collector.attribute(loader(target_set()), progress=False)).all()
    if "grad_wrt" in options:
        assert store.settings.grad_dim == 1280
    if "task" in options:
        with pytest.raises(ValueError, match="task is needed.*cross_entropy"):
            open_store(store.save_dir, module).attribute(loader(target_set()))
        for other in ("image_classification", LossOutput(nn.functional.multi_margin_loss)):
            with pytest.raises(StoreMismatchError, match="task is .* in the store"):
                open_store(store.save_dir, module, other).attribute(loader(target_set()))
        again = open_store(store.save_dir, module, options["task"])
        assert again.attribute(loader(target_set()), progress=False).shape == (300, 20)


def test_data_module_and_workers(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader(train_set(), shuffle=True, num_workers=1)

    collector, _, _ = fit(tmp_path / "store", data=Data(), max_epochs=1)
    assert collector.model_ids == [0]


def test_transfer_hooks_prepare_the_batches(tmp_path: Path) -> None:
    # A loader of dicts of raw bytes, which the module turns into what the task takes.
    class Raw(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch["image"].float() / 16, batch["label"]]

    class Dicts(Sequence):
        def __getitem__(self, index: int) -> Any:
            return {"image": (16 * self.images[index]).byte(), "label": self.labels[index]}

    raw, normal = Raw(), Classifier()
    normal.load_state_dict(raw.state_dict())
    collector, _, _ = fit(tmp_path / "a", raw, loader(Dicts(), shuffle=True), max_epochs=1)
    plain = loader(TensorDataset(*(part[:120] for part in digits())), shuffle=True)
    other, _, _ = fit(tmp_path / "b", normal, plain, max_epochs=1)
    np.testing.assert_array_equal(collector.store.grads(0), other.store.grads(0))
    targets = [collector.attribute(loader(Dicts(6)), progress=False)]
    targets.append(other.attribute([[part[:6] for part in digits()]], progress=False))
    np.testing.assert_array_equal(*targets)


def test_data_module_hooks_prepare_the_batches(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader(train_set(), shuffle=True)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [4 * (batch[0] - 0.5), batch[1]]

    collector, module, _ = fit(tmp_path / "a", Classifier(mlp()), Data(), max_epochs=1)
    images, labels = train_set().tensors
    plugs = plugin(module, 48)
    computer = plugs["gradient_computer"](module.eval(), *task_and_dim())
    grads = computer.compute_per_sample_grad([4 * (images - 0.5), labels])
    expected = plugs["projector"].project(grads, 0) / np.sqrt(plugs["projector"].grad_dim)
    np.testing.assert_allclose(collector.store.grads(0), expected.detach(), rtol=1e-3, atol=1e-4)


def test_tensors_may_be_replaced_while_training(tmp_path: Path) -> None:
    # Buffers that are rebound instead of changed, and one that state dicts leave out.
    class Centered(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.register_buffer("center", torch.zeros(1, 1, 8, 8))
            self.register_buffer("scale", torch.ones(1), persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.net((images - self.center) * self.scale)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.center = 0.9 * self.center + 0.1 * batch[0].mean(0, keepdim=True)
            self.scale = 0.9 * self.scale
            return super().training_step(batch, batch_idx)

    collector, _module, _ = fit(tmp_path / "store", Centered(), max_epochs=2)
    expected = collector.attribute(loader(target_set()), progress=False)
    store = open_store(tmp_path / "store", Centered())
    np.testing.assert_array_equal(store.attribute(loader(target_set()), progress=False), expected)
    for model_id in (0, 1):
        state = store.weights(model_id)
        assert not torch.equal(state["center"], torch.zeros(1, 1, 8, 8))
        fresh = Centered()
        fresh.load_state_dict(state)
        fresh.scale = store.transient_buffers(model_id)["scale"]
        plugs = plugin(fresh, 48)
        computer = plugs["gradient_computer"](fresh.eval(), *task_and_dim())
        grads = plugs["projector"].project(
            computer.compute_per_sample_grad(train_set().tensors), model_id
        )
        rows = (grads / np.sqrt(plugs["projector"].grad_dim)).detach()
        np.testing.assert_allclose(store.grads(model_id), rows, rtol=1e-3, atol=1e-5)


def test_manual_optimization_with_a_raw_optimizer(tmp_path: Path) -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)  # global_step stays at 0
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    collector, _, _ = fit(tmp_path / "store", Manual(), max_epochs=3)
    assert collector.model_ids == [0, 1, 2]


def test_averaged_weights_are_collected_as_saved(tmp_path: Path) -> None:
    averaging = EMAWeightAveraging(decay=0.9)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    collector, module, _ = fit(
        tmp_path / "store",
        callbacks=[averaging, saver],
        enable_checkpointing=True,
        when="checkpoint",
    )
    assert collector.model_ids == [0, 1]
    for epoch in (0, 1):
        saved = torch.load(tmp_path / f"ckpt/epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        kept = collector.store.weights(epoch)
        assert all(torch.equal(kept[name], saved[name]) for name, _ in module.named_parameters())


def test_several_checkpoints_at_one_position_are_collected_once(tmp_path: Path) -> None:
    savers = [
        ModelCheckpoint(tmp_path / str(n), every_n_train_steps=n, save_top_k=-1, save_last=True)
        for n in (3, 6)
    ]
    collector, _, _ = fit(
        tmp_path / "store", when="checkpoint", callbacks=savers, enable_checkpointing=True
    )
    facts = [collector.store.describe(m) for m in collector.model_ids]
    assert [f["global_step"] for f in facts] == [3, 6, 9, 12]


def test_checkpoints_that_nobody_hears_of(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", save_weights_only=True)
    with (
        pytest.warns(UserWarning, match="collects only if you call"),
        pytest.warns(UserWarning, match="collected nothing in this fit"),
    ):
        fit(tmp_path / "store", when="checkpoint", callbacks=[saver], enable_checkpointing=True)


def test_part_of_the_data_is_trained_on(tmp_path: Path) -> None:
    for options in (
        {"limit_train_batches": 2},
        {
            "data": loader(
                train_set(), sampler=torch.utils.data.RandomSampler(train_set(), num_samples=60)
            )
        },
    ):
        with pytest.warns(UserWarning, match="collects all 300 samples"):
            fit(tmp_path / "store", max_epochs=1, overwrite=True, **options)


def test_a_failing_collection_leaves_the_checkpoint(tmp_path: Path) -> None:
    images, labels = digits()
    images = images[:120].clone()
    images[77] = float("nan")
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}")
    with pytest.raises(NonFiniteGradientError):
        fit(
            tmp_path / "store",
            Careful(),
            loader(TensorDataset(images, labels[:120])),
            when="checkpoint",
            callbacks=[saver],
            enable_checkpointing=True,
        )
    assert (tmp_path / "ckpt/epoch=0.ckpt").is_file()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precisions(tmp_path: Path, precision: str) -> None:
    collector, _, _ = fit(tmp_path / "store", max_epochs=1, precision=precision)
    assert np.isfinite(collector.self_influence()).all()
    assert np.isfinite(collector.attribute(loader(target_set()), progress=False)).all()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("part", [None, "net"])
def test_a_forward_creates_tensors_of_the_precision(
    tmp_path: Path, precision: str, part: str | None
) -> None:
    class Starts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.out = nn.Linear(16, 8), nn.Linear(8, 10)

        def forward(self, images: Tensor) -> Tensor:
            state = torch.zeros(len(images), 8)
            for row in images[:, 0].unbind(1):
                state = torch.tanh(self.step(torch.cat((row, torch.tanh(state)), 1)))
            return self.out(state)

    loss = nn.CrossEntropyLoss()
    options = {"precision": precision, "model": part, "task": LossOutput(loss)}
    collector, module, _ = fit(tmp_path, Classifier(Starts()), max_epochs=1, **options)
    assert np.isfinite(collector.attribute(loader(target_set()), progress=False)).all()
    assert torch.get_default_dtype() == torch.float32
    images, labels = train_set(4)[:]
    projector, dtype = collector.store.projector(), next(module.parameters()).dtype
    torch.set_default_dtype(dtype)
    try:
        losses = [-loss(module(images[i : i + 1].to(dtype)), labels[i : i + 1]) for i in range(4)]
    finally:
        torch.set_default_dtype(torch.float32)
    grads = [torch.autograd.grad(value, list(module.parameters())) for value in losses]
    matrix = torch.stack([torch.cat([part.flatten() for part in each]) for each in grads])
    expected = projector.project(matrix, 0) / projector.grad_dim**0.5
    error = np.abs(collector.store.grads(0)[:4] - expected.numpy()).max()
    assert error <= (1e-6 if precision == "64-true" else 0.05) * float(expected.abs().max())


def test_scores_during_the_fit_do_not_change_it(tmp_path: Path) -> None:
    class Looks(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            collector.attribute(loader(target_set()), progress=False)

    weights = []
    for callbacks in ([], [Looks()]):
        collector = GradientCollector(tmp_path / str(len(callbacks)), proj_dim=48)
        pl.seed_everything(0, verbose=False)
        module = Classifier()
        trainer(callbacks=[collector, *callbacks]).fit(module, loader(train_set(), shuffle=True))
        weights.append(module.state_dict().values())
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("each", [False, True])
def test_weighted_dropout_keeps_its_statistics(tmp_path: Path, each: bool) -> None:
    collector, module, _ = fit(
        tmp_path / "store", proj_type="weighted_dropout", fold=2, calibrate_each=each
    )
    store = open_store(tmp_path / "store", module)
    names = {"statistics_0.safetensors", "statistics_1.safetensors"}
    found = {file.name for file in (tmp_path / "store").glob("statistics_*")}
    assert found == (names if each else {"statistics_shared.safetensors"})
    assert next(iter(store.projector().statistics.values())).samples == 300
    scores = collector.attribute(loader(target_set()), progress=False)
    np.testing.assert_array_equal(store.attribute(loader(target_set()), progress=False), scores)
    # TRAKer in another process takes the statistics from the store.
    states = [store.weights(m) for m in store.model_ids]
    plugs = plugin(module, 48, proj_type="weighted_dropout", fold=2)
    traker = TRAKer(
        module,
        "image_classification",
        300,
        str(tmp_path / "store"),
        device="cpu",
        use_half_precision=False,
        logging_level=logging.ERROR,
        **plugs,
    )
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("test", state, model_id, 20)
        for batch in loader(target_set()):
            traker.score(batch, num_samples=20)
    np.testing.assert_array_equal(np.array(traker.finalize_scores("test")), scores)
    next((tmp_path / "store").glob("statistics_*")).unlink()
    with pytest.raises(StoreMismatchError, match="lost its statistics"):
        store.attribute(loader(target_set()), progress=False)


def test_fast_dev_run_tries_a_batch_and_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path / "store", fast_dev_run=True)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "bar",
    [TQDMProgressBar(), RichProgressBar(console_kwargs={"force_terminal": True, "width": 120})],
)
def test_progress_bar_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture, bar: Any) -> None:
    fit(tmp_path / "store", enable_progress_bar=True, max_epochs=1, callbacks=[bar])
    shown = capsys.readouterr()
    assert "Collecting gradients, epoch 0" in shown.out + shown.err
    fit(tmp_path / "quiet", enable_progress_bar=False, max_epochs=1)
    shown = capsys.readouterr()
    assert "Collecting" not in shown.out + shown.err


# --- several runs ---------------------------------------------------------------------------------


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)

    # Nothing random in it, so that the resumed run passes the same weights.
    def module() -> Classifier:
        pl.seed_everything(0, verbose=False)
        return Classifier(mlp())

    data = loader(train_set())
    whole, _, _ = fit(tmp_path / "whole", module(), data, max_epochs=4)
    fit(
        tmp_path / "parts",
        module(),
        data,
        max_epochs=3,
        callbacks=[saver],
        enable_checkpointing=True,
    )
    # Resumed from the second of three epochs: the third is found to be what it was.
    collector = GradientCollector(tmp_path / "parts", proj_dim=48)
    trainer(max_epochs=4, callbacks=[collector]).fit(
        module(), data, ckpt_path=tmp_path / "ckpt" / "epoch=1.ckpt"
    )
    assert collector.model_ids == whole.model_ids == [0, 1, 2, 3]
    positions = [collector.store.describe(m)["epoch"] for m in collector.model_ids]
    assert positions == [0, 1, 2, 3]
    for model_id in range(4):
        np.testing.assert_array_equal(collector.store.grads(model_id), whole.store.grads(model_id))


def test_a_run_that_goes_another_way_sets_aside_what_lay_ahead(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    first, _, _ = fit(tmp_path / "s", max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    abandoned = first.store.grads(2).copy()
    collector = GradientCollector(tmp_path / "s", proj_dim=48)
    trainer(max_epochs=3, callbacks=[collector]).fit(
        Classifier(),
        loader(train_set(), 100, shuffle=True),  # other batches: another trajectory
        ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt",
    )
    # Only the trajectory that was trained on counts; nothing collected before is lost.
    assert collector.model_ids == [0, 3, 4]
    assert [collector.store.describe(m)["epoch"] for m in collector.model_ids] == [0, 1, 2]
    np.testing.assert_array_equal(np.load(tmp_path / "s/2/grads.mmap"), abandoned)


def test_an_interrupted_collection_is_done_again(tmp_path: Path) -> None:
    expected, _, _ = fit(tmp_path / "whole", max_epochs=3)

    class Fails(Classifier):
        """Breaks in the middle of the second collection."""

        broken = False

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if self.current_epoch == 1 and not self.training and type(self).broken:
                raise RuntimeError("the disk is full")
            if self.current_epoch == 1 and not self.training:
                type(self).broken = True
            return batch

    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    pl.seed_everything(0, verbose=False)
    with pytest.raises(RuntimeError, match="disk is full"):
        fit(tmp_path / "s", Fails(), callbacks=[saver], enable_checkpointing=True)
    assert open_store(tmp_path / "s").model_ids == [0]
    collector = GradientCollector(tmp_path / "s", proj_dim=48)
    trainer(max_epochs=3, callbacks=[collector]).fit(
        Classifier(),
        loader(train_set(), shuffle=True),
        ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt",
    )
    assert collector.model_ids == expected.model_ids == [0, 1, 2]


def test_save_dir_may_be_spelled_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}")
    fit(Path("store"), max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    for overwrite in (False, True):  # never deletes what is being resumed
        collector = GradientCollector(tmp_path / "store", proj_dim=48, overwrite=overwrite)
        trainer(max_epochs=2, callbacks=[collector]).fit(
            Classifier(), loader(train_set()), ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt"
        )
        assert 0 in collector.model_ids
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(StoreMismatchError, match="another run than the one that is being resumed"):
        trainer(
            max_epochs=2,
            callbacks=[GradientCollector(tmp_path / "moved", proj_dim=48, overwrite=True)],
        ).fit(Classifier(), loader(train_set()), ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt")


def test_stores_of_other_runs_are_refused(tmp_path: Path) -> None:
    fit(tmp_path / "store", max_epochs=1)
    file = tmp_path / "store" / "0" / "grads.mmap"
    before = file.read_bytes()
    with pytest.raises(StoreMismatchError, match="1 collections of an earlier run"):
        fit(tmp_path / "store", max_epochs=1)
    assert file.read_bytes() == before
    (tmp_path / "store" / "thesis.tex").write_text("mine")
    collector, _, _ = fit(tmp_path / "store", max_epochs=2, proj_dim=40, overwrite=True)
    assert collector.store.grads(1).shape == (300, 40)
    assert (tmp_path / "store" / "thesis.tex").read_text() == "mine"


def test_a_run_that_collected_nothing_leaves_nothing_to_refuse(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="collected nothing in this fit"):
        fit(tmp_path / "store", max_epochs=1, every_n_epochs=5)
    collector, _, _ = fit(tmp_path / "store", max_epochs=1, proj_dim=40)
    assert collector.store.grads(0).shape == (300, 40)


def test_a_second_fit_is_another_run(tmp_path: Path) -> None:
    collector, module, runner = fit(tmp_path / "store", max_epochs=1)
    with pytest.raises(StoreMismatchError, match="earlier run"):
        trainer(callbacks=[collector]).fit(module, loader(train_set()))
    runner.fit_loop.max_epochs = 2  # the same Trainer, trained on
    runner.fit(module, loader(train_set(), shuffle=True))
    assert collector.model_ids == [0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "seed"),
        ({"proj_dim": 40}, "proj_dim"),
        ({"fold": 2}, "fold"),
        ({"proj_type": "unit_dropout"}, "scheme"),
        ({"task": LossOutput(nn.functional.cross_entropy)}, "task"),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path: Path, options: dict, words: str) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}")
    fit(tmp_path / "store", max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    collector = GradientCollector(tmp_path / "store", **{"proj_dim": 48, **options})
    with pytest.raises(StoreMismatchError, match=f"{words} is .* in the store"):
        trainer(callbacks=[collector]).fit(
            Classifier(),
            loader(train_set()),
            ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt",
        )


# --- clear errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "images"}, "task='images' is not known"),
        ({"task": 3}, "task must be a name"),
        ({"proj_dim": 0}, "proj_dim must be at least 1"),
        ({"proj_dim": "many"}, "proj_dim must be an integer"),
        ({"proj_type": "gauss"}, "proj_type='gauss' is not known"),
        ({"fold": 0}, "fold must be at least 1"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"when": "sometimes"}, "when must be one or several of 'epoch', 'step', 'checkpoint'"),
        ({"when": "step"}, "when='step' and every_n_train_steps belong together"),
        ({"every_n_train_steps": 0}, "every_n_train_steps must be at least 1"),
        ({"overwrite": True, "adopt": True}, "exclude each other"),
        ({"targets": "holdout"}, "targets: 'holdout' is not known"),
        ({"targets": {"a/b": []}}, "'a/b' is no plain name"),
        ({"dataloader": [1]}, "dataloader must be a torch DataLoader"),
        ({"indices": [0.5]}, "indices must be an integer"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        GradientCollector(tmp_path, **options)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*digits(), strict=True)


class Unsized(Dataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(part[index] for part in digits())


def test_datasets_without_a_length_are_refused_before_training(tmp_path: Path) -> None:
    for data in (
        DataLoader(Stream(), 50),
        DataLoader(Unsized(), sampler=range(50), batch_size=10),
    ):
        with pytest.raises(MisconfigurationException, match="dataset with a length"):
            fit(tmp_path / "store", data=data, limit_train_batches=2)
    for options, words in [
        ({"sampler": SubsetRandomSampler(range(50)), "batch_size": 10}, "samples a subset"),
        ({"batch_size": None}, "does not batch"),
    ]:
        with pytest.raises(MisconfigurationException, match=words):
            fit(tmp_path / "store", data=DataLoader(train_set(), **options))
    with pytest.raises(MisconfigurationException, match="single torch DataLoader"):
        fit(tmp_path / "store", Both(), {"a": loader(train_set()), "b": loader(train_set())})
    assert not (tmp_path / "store").exists()


class Careful(Classifier):
    """Trains on what is finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        keep = torch.isfinite(batch[0]).flatten(1).all(1)
        return super().training_step([part[keep] for part in batch], batch_idx)


class Both(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx)


class Triples(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pytest.fail("a batch was trained on before the collector complained")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda x, y: TensorDataset(x, y, y), r"takes a tuple of tensors \(image, label\), got"),
        (lambda x, y: TensorDataset(x), "got"),
        (lambda x, y: TensorDataset(x, y.float()), "failed on"),
        (lambda x, y: [{"x": a, "y": b} for a, b in zip(x, y, strict=True)], "got a dict"),
    ],
)
def test_batches_the_task_cannot_take_are_refused_before_training(
    tmp_path: Path, data: Any, words: str
) -> None:
    images, labels = digits()
    with pytest.raises(BatchError, match=words):
        fit(tmp_path / "store", Triples(), loader(data(images[:60], labels[:60])))
    assert not (tmp_path / "store").exists()


def test_collate_that_drops_samples_is_refused(tmp_path: Path) -> None:
    def collate(samples: list) -> list[Tensor]:
        return [torch.stack(part) for part in zip(*samples[:40], strict=True)]

    with pytest.raises(BatchError, match="batch 0 .* holds 40 samples instead of 50"):
        fit(tmp_path / "store", data=loader(train_set(), collate_fn=collate))


def test_too_many_columns_for_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="proj_dim=4096 is above grad_dim"):
        fit(tmp_path / "store", proj_dim=4096)


def test_non_finite_gradients_name_the_training_samples(tmp_path: Path) -> None:
    images, labels = digits()
    images = images[:120].clone()
    images[77] = float("nan")

    with pytest.raises(NonFiniteGradientError, match=r"training samples \[77\]") as caught:
        fit(tmp_path / "store", Careful(), loader(TensorDataset(images, labels[:120])))
    assert caught.value.samples == [77]
    # The checkpoint that failed does not count as collected.
    assert open_store(tmp_path / "store").model_ids == []


def test_nothing_was_collected_yet(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing has been collected"):
        GradientCollector(tmp_path / "store").self_influence()


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    fit(tmp_path / "store", max_epochs=1)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["settings"]["task"] == "image_classification"
    assert manifest["model_ids"]["0"]["global_step"] == 6
