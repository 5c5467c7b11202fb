"""Classification with wrong labels: tasks on which it matters what a model is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _data import fashion_mnist, sources
from _models import mlp
from torch import Tensor, nn

FLIPPED = 0.3  # share of the training labels
KEPT = 0.3  # share of the training samples that a selection keeps
LENGTH = 64  # characters of a passage


@dataclass(frozen=True)
class Task:
    """Data, with flipped training labels, and a model.

    Args:
        name: under which results stand.
        model: builds an untrained model.
        classes: number of classes.
        train: inputs and labels.
        targets: clean ones.
        test: clean ones, others than the targets.
        epochs: after how many epochs of one run checkpoints are taken, ascending.
    """

    name: str
    model: Callable[[], nn.Module]
    classes: int
    train: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of training samples and of targets."""
        return len(self.train[0]), len(self.targets[0])

    def steps(self, model: nn.Module, rows: Tensor, count: int) -> None:
        """Train a model on some training samples, for a number of batches of 64."""
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        x, y = self.train
        batches: list[Tensor] = []
        for _ in range(count):
            if not batches:
                batches = list(torch.split(rows[torch.randperm(len(rows))], 64))
            batch = batches.pop(0)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()

    def of_epochs(self, epochs: int) -> int:
        """Number of batches in epochs of all training samples."""
        return epochs * -(-self.shape[0] // 64)

    def checkpoints(self, file: Path) -> list[nn.Module]:
        """Checkpoints of one run on all training samples, from a file where it is there."""
        torch.manual_seed(0)
        model = self.model()
        if not file.is_file():
            states = []
            for before, after in zip((0, *self.epochs), self.epochs, strict=False):
                self.steps(model, torch.arange(self.shape[0]), self.of_epochs(after - before))
                states.append({key: value.clone() for key, value in model.state_dict().items()})
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(states, file)
        found = []
        for state in torch.load(file, weights_only=True):
            model = self.model()
            model.load_state_dict(state)
            found.append(model.eval())
        return found

    def accuracy(self, rows: np.ndarray, seed: int) -> float:
        """Share of test samples classified rightly after training on some training samples.

        For as many batches as the run on all of them.
        """
        torch.manual_seed(seed)
        model = self.model()
        self.steps(model, torch.as_tensor(rows), self.of_epochs(self.epochs[-1]))
        return self.tested(model)

    def tested(self, model: nn.Module) -> float:
        """Share of test samples classified rightly."""
        model.eval()
        with torch.no_grad():
            found = torch.cat([model(few).argmax(1) for few in torch.split(self.test[0], 1000)])
        return float((found == self.test[1]).float().mean())


class ByteNet(nn.Module):
    """Bytes, a convolution, the maximum over places, two layers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(128, 32)
        self.near = nn.Conv1d(32, 64, 5, padding=2)
        self.hidden = nn.Linear(64, 64)
        self.out = nn.Linear(64, classes)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` of characters ``(B, length)``."""
        found = self.near(self.bytes(codes).transpose(1, 2)).relu().amax(2)
        return self.out(self.hidden(found).relu())


def image(n: int, m: int, folder: Path, quick: bool) -> Task:
    """An MLP of 109 386 parameters on Fashion-MNIST; 5000 training images are left for tests."""
    (x, y), later = fashion_mnist(folder, "train"), fashion_mnist(folder, "t10k")
    train, test = (x[:-5000], y[:-5000]), (x[-5000:], y[-5000:])
    targets = (later[0][:m], later[1][:m])
    epochs = (1, 2) if quick else (4, 6, 8)
    return Task(
        "image", lambda: mlp(784, 128, 64, 10), 10, *_flipped(train, n, 10), targets, test,
        epochs,
    )  # fmt: skip


def text(n: int, m: int, folder: Path, quick: bool) -> Task:
    """A convolution over characters tells from which source a passage is; targets from its end."""
    texts = sources(10, 600_000)
    early, late = [], []
    for label, words in enumerate(texts.values()):
        codes = torch.tensor(list(words.encode("ascii", "ignore")))
        rows = codes[: len(codes) // LENGTH * LENGTH].reshape(-1, LENGTH)
        cut = len(rows) * 4 // 5
        for part, some in ((early, rows[:cut]), (late, rows[cut:])):
            part.append((some, torch.full((len(some),), label)))
    train, later = (tuple(map(torch.cat, zip(*part, strict=True))) for part in (early, late))
    order = torch.randperm(len(later[0]), generator=torch.Generator().manual_seed(1))
    ends = [part[order] for part in later]
    count = len(texts)
    return Task(
        "text", lambda: ByteNet(count), count, *_flipped(train, n, count),
        (ends[0][:m], ends[1][:m]), (ends[0][m : m + 5000], ends[1][m : m + 5000]),
        (1, 2) if quick else (2, 3, 4),
    )  # fmt: skip


def _flipped(data: tuple[Tensor, ...], n: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    """A random sample of n, some of whose labels are replaced by others."""
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data[0]), generator=random)[:n]
    x, y = data[0][order], data[1][order]
    moved = (y + torch.randint(1, classes, y.shape, generator=random)) % classes
    return [(x, torch.where(torch.rand(y.shape, generator=random) < FLIPPED, moved, y))]


TASKS: dict[str, Callable[[int, int, Path, bool], Task]] = {"image": image, "text": text}
