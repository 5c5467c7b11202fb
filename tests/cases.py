"""Data, models and loops that several test modules share: real data, real TRAK, real Lightning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trak import TRAKer

N_TRAIN, N_TARGETS = 300, 20


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and labels; some border pixels are dark in all of them."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)


def train_set(n: int = N_TRAIN) -> TensorDataset:
    images, labels = digits()
    return TensorDataset(images[:n], labels[:n])


def target_set(n: int = N_TARGETS) -> TensorDataset:
    images, labels = digits()
    return TensorDataset(images[-n:], labels[-n:])


def loader(dataset: Any, batch_size: int = 50, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, **options)


def mlp(hidden: int = 32) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def convnet() -> nn.Module:
    """Convolution, batch norm, dropout, a scalar parameter and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.PReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.2),
        Scale(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Scale(nn.Module):
    """A parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def trained(model: nn.Module, epochs: int = 3, dataset: Any = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(epochs):
        for images, labels in loader(dataset or train_set(), shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def checkpoints(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    """State dicts after 1, 2, ... epochs."""
    states = []
    for _ in range(count):
        trained(model, epochs=1)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return states


class Classifier(pl.LightningModule):
    """A LightningModule around a network, which logs its loss."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or convnet()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def trainer(**options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return pl.Trainer(**{**settings, **options})


def quickstart(
    model: nn.Module,
    states: list[dict[str, Tensor]],
    save_dir: Path,
    train: Iterable[Any] | None = None,
    targets: Iterable[Any] | None = None,
    task: Any = "image_classification",
    n_train: int = N_TRAIN,
    n_targets: int = N_TARGETS,
    **options: Any,
) -> tuple[TRAKer, np.ndarray]:
    """TRAK's quickstart loop, as its documentation has it."""
    train = loader(train_set(n_train)) if train is None else train
    targets = loader(target_set(n_targets)) if targets is None else targets
    traker = TRAKer(
        model=model,
        task=task,
        train_set_size=n_train,
        save_dir=str(save_dir),
        device="cpu",
        logging_level=logging.ERROR,
        **options,
    )
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id=model_id)
        for batch in train:
            traker.featurize(batch=batch, num_samples=batch[0].shape[0])
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint(
            exp_name="test", checkpoint=state, model_id=model_id, num_targets=n_targets
        )
        for batch in targets:
            traker.score(batch=batch, num_samples=batch[0].shape[0])
    return traker, np.array(traker.finalize_scores(exp_name="test"))


def per_sample_gradients(model: nn.Module, output: Any, batch: Iterable[Tensor]) -> Tensor:
    """The oracle: autograd on one sample at a time; matrix (B, p) in named_parameters order."""
    parameters = list(model.parameters())
    rows = []
    for sample in zip(*batch, strict=True):
        value = output(model, *(part.unsqueeze(0) for part in sample))
        grads = torch.autograd.grad(value, parameters)
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return torch.stack(rows)
