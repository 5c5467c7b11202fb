"""Handwritten digits with LightningCLI: everything about the collector stands in config.yaml.

python digits.py fit --config config.yaml
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(pl.LightningDataModule):
    """Images of 8 x 8 pixels that come with scikit-learn.

    Args:
        train_size: images to train on.
        val_size: images to validate on, which are the targets of the attribution.
        batch_size: images in a batch.
    """

    def __init__(self, train_size: int = 1500, val_size: int = 100, batch_size: int = 64) -> None:
        super().__init__()
        self.train_size = train_size
        self.val_size = val_size
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Split the images."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels / 16, dtype=torch.float32)
        classes = torch.tensor(labels)
        first, last = slice(0, self.train_size), slice(-self.val_size, None)
        self.train = TensorDataset(images[first], classes[first])
        self.val = TensorDataset(images[last], classes[last])

    def train_dataloader(self) -> DataLoader:
        """Return shuffled training images; the collector reads them in order."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return validation images."""
        return DataLoader(self.val, self.batch_size)


def train_set() -> TensorDataset:
    """Return the images that config.yaml trains on, for the report."""
    data = Digits()
    data.setup("fit")
    return data.train


def val_set() -> TensorDataset:
    """Return the images that config.yaml validates on, for the report."""
    data = Digits()
    data.setup("fit")
    return data.val


class Network(pl.LightningModule):
    """A network with one hidden layer.

    Args:
        hidden: its units.
        learning_rate: of Adam.
    """

    def __init__(self, hidden: int = 128, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        self.learning_rate = learning_rate

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)


if __name__ == "__main__":
    LightningCLI(Network, Digits, seed_everything_default=0, save_config_callback=None)
