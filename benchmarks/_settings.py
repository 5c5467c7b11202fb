"""Settings: data, a model and how it is trained, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import _data
import _models
import torch
from torch import Tensor, nn
from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput

from trak_dropout import CausalLMOutput, LossOutput

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Setting:
    """Data, model and training of one comparison.

    Args:
        name: under which results stand.
        model: builds an untrained model.
        task: TRAK's model output function.
        train: tensors of the training set, labels last.
        targets: those of the targets.
        epochs: of training.
        rate: Adam's.
        batch_size: of training.
        dense: whether TRAK's own gradient computer runs on the model.
        sources: names of the sources of text, where samples come from several.
        origin: the source of each training sample, ``(n,)``, and of each target.
    """

    name: str
    model: Callable[[], nn.Module]
    task: AbstractModelOutput
    train: Batch
    targets: Batch
    epochs: int
    rate: float
    batch_size: int = 50
    dense: bool = True
    sources: tuple[str, ...] = ()
    origin: tuple[Tensor, Tensor] | None = None

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``(B, classes)`` or ``(B, T, vocabulary)``, and the labels they are for."""
        if isinstance(self.task, CausalLMOutput):
            logits = model(input_ids=batch[0], use_cache=False).logits
            return logits[:, :-1], batch[0][:, 1:]
        return model(*batch[:-1]), batch[-1]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each sample, ``(B,)``."""
        logits, labels = self.predict(model, batch)
        losses = nn.functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the task measures of each sample, ``(B,)``: TRAK's margin, or minus the loss."""
        if not isinstance(self.task, ImageClassificationModelOutput):
            return -self.losses(model, batch)
        logits, labels = self.predict(model, batch)
        right = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -math.inf)
        return right[:, 0] - others.logsumexp(1)

    @property
    def n(self) -> int:
        """Number of training samples."""
        return len(self.train[0])

    def to(self, device: str) -> Setting:
        """The same with its data on a device."""
        train, targets = (tuple(t.to(device) for t in b) for b in (self.train, self.targets))
        return replace(self, train=train, targets=targets)

    def of_targets(self, rows: Tensor) -> Setting:
        """The same with some of its targets."""
        origin = self.origin and (self.origin[0], self.origin[1][rows])
        return replace(self, targets=take(self.targets, rows), origin=origin)

    def relabeled(self, labels: Tensor) -> Setting:
        """The same with other training labels."""
        return replace(self, train=(*self.train[:-1], labels))


def take(batch: Batch, rows: Tensor | slice) -> Batch:
    """Some rows of all tensors."""
    return tuple(part[rows] for part in batch)


def sequence_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


CLASS_LOSS = LossOutput(nn.functional.cross_entropy)


def _fashion(
    name: str,
    model: Callable[[], nn.Module],
    epochs: int,
    n: int,
    m: int,
    folder: Path,
    task: AbstractModelOutput | None = None,
) -> Setting:
    images, labels = _data.fashion_mnist(folder, "train")
    test_images, test_labels = _data.fashion_mnist(folder, "t10k")
    return Setting(
        name,
        model,
        task or ImageClassificationModelOutput(),
        (images[:n], labels[:n]),
        (test_images[:m], test_labels[:m]),
        epochs,
        1e-3,
    )


def fashion_mlp(n: int = 2000, m: int = 100, folder: Path = _data.FASHION_MNIST) -> Setting:
    """An MLP of 109 386 parameters on Fashion-MNIST, TRAK's margin."""
    return _fashion("mlp", lambda: _models.mlp(784, 128, 64, 10), 15, n, m, folder)


def fashion_cnn(n: int = 2000, m: int = 100, folder: Path = _data.FASHION_MNIST) -> Setting:
    """A CNN of 105 866 parameters on Fashion-MNIST, TRAK's margin."""
    return _fashion("cnn", _models.cnn, 10, n, m, folder)


def fashion_resnet9(n: int = 600, m: int = 400, folder: Path = _data.FASHION_MNIST) -> Setting:
    """A narrow ResNet-9 on Fashion-MNIST, loss."""
    return _fashion("resnet9", lambda: _models.ResNet9(1, 8), 8, n, m, folder, CLASS_LOSS)


def cifar10_resnet9(n: int = 50_000, m: int = 2000, folder: Path | None = None) -> Setting:
    """ResNet-9 on CIFAR-10 as in TRAK's example, loss; needs torchvision and a network or GPU."""
    images, labels = _data.cifar10("train")
    test_images, test_labels = _data.cifar10("test")
    return Setting(
        "cifar10",
        _models.ResNet9,
        CLASS_LOSS,
        (images[:n], labels[:n]),
        (test_images[:m], test_labels[:m]),
        24,
        1e-3,
        batch_size=512,
    )


def small_cnn(n: int = 500, m: int = 100, folder: Path = _data.FASHION_MNIST) -> Setting:
    """Another CNN on the last images of Fashion-MNIST, TRAK's margin."""
    images, labels = _data.fashion_mnist(folder, "train")
    test_images, test_labels = _data.fashion_mnist(folder, "t10k")
    return Setting(
        "small cnn",
        _models.small_cnn,
        ImageClassificationModelOutput(),
        (images[-n:], labels[-n:]),
        (test_images[-m:], test_labels[-m:]),
        20,
        1e-3,
    )


def fashion_loss(n: int = 1000, m: int = 100, folder: Path = _data.FASHION_MNIST) -> Setting:
    """The MLP on Fashion-MNIST with its loss."""
    setting = fashion_mlp(n, m, folder)
    return replace(setting, name="Fashion-MNIST", task=CLASS_LOSS)


def digits(n: int = 1000, m: int = 100, folder: Path = _data.FASHION_MNIST) -> Setting:
    """An MLP on scikit-learn's digits, loss."""
    images, labels = _data.digits()
    return Setting(
        "digits",
        lambda: _models.mlp(64, 96, 10, activation=nn.Tanh),
        CLASS_LOSS,
        (images[:n], labels[:n]),
        (images[n : n + m], labels[n : n + m]),
        20,
        3e-3,
    )


def characters(n: int = 1200, m: int = 100, folder: Path = _data.FASHION_MNIST) -> Setting:
    """A character transformer on the source of Python's standard library, loss."""
    names = ("argparse", "ast", "datetime", "decimal", "inspect", "tarfile", "typing", "zipfile")
    files = [_data.STDLIB / f"{name}.py" for name in names]
    text = "".join(f.read_text(errors="replace") for f in files if f.is_file())
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(c) for c in text])
    length = 64
    order = torch.randperm(len(codes) // (length + 1), generator=torch.Generator().manual_seed(0))
    rows = codes[: len(codes) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    rows = rows[order[: n + m]]
    pairs = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return Setting(
        "lm",
        lambda: _models.CharTransformer(len(alphabet), length),
        LossOutput(sequence_loss),
        take(pairs, slice(n)),
        take(pairs, slice(n, None)),
        12,
        3e-3,
    )


def text_topics(n: int = 300, m: int = 60, folder: Path = _data.FASHION_MNIST) -> Setting:
    """MiniLM with adapters tells from which of six sources a passage comes, loss."""
    texts = _data.sources(6, 150_000)
    length, random = 160, torch.Generator().manual_seed(0)
    passages, labels = [], []
    for label, text in enumerate(texts.values()):
        starts = torch.randperm(len(text) // length, generator=random)[: (n + m) // 6 + 1]
        passages += [text[s * length : (s + 1) * length] for s in starts.tolist()]
        labels += [label] * len(starts)
    order = torch.randperm(len(passages), generator=random)[: n + m]
    tokens, mask = _models.minilm_tokens([passages[i] for i in order], 32)
    batch = (tokens, mask, torch.tensor(labels)[order])
    return Setting(
        "text, MiniLM + LoRA",
        lambda: _models.MiniLM(len(texts)),
        CLASS_LOSS,
        take(batch, slice(n)),
        take(batch, slice(n, None)),
        4,
        2e-3,
        batch_size=20,
        dense=False,
        sources=tuple(texts),
    )


def byte_lm(
    n: int = 1200, m: int = 720, folder: Path = _data.FASHION_MNIST, count: int = 6
) -> Setting:
    """A GPT-NeoX model of bytes on a mixture of at least six sources of real text, loss."""
    return _bytes("byte GPT-NeoX", n, m, count, 64, width=64, epochs=15)


def few_bytes(
    n: int = 480, m: int = 240, folder: Path = _data.FASHION_MNIST, count: int = 6
) -> Setting:
    """A smaller one, to be trained again and again."""
    return _bytes("small byte GPT-NeoX", n, m, count, 64, width=32, epochs=10)


def _bytes(name: str, n: int, m: int, count: int, length: int, width: int, epochs: int) -> Setting:
    texts = _data.sources(count, 600_000)
    random = torch.Generator().manual_seed(0)
    rows, held, origins, held_origins = [], [], [], []
    for source, text in enumerate(texts.values()):
        codes = torch.tensor(list(text.encode("ascii", "ignore")))
        chunks = codes[: len(codes) // length * length].reshape(-1, length)
        # Targets come from the last fifth of a source, training samples from before it.
        cut = len(chunks) * 4 // 5
        rows.append(chunks[torch.randperm(cut, generator=random)[: n // len(texts)]])
        later = torch.randperm(len(chunks) - cut, generator=random)[: m // len(texts)]
        held.append(chunks[cut + later])
        origins.append(torch.full((len(rows[-1]),), source))
        held_origins.append(torch.full((len(held[-1]),), source))
    return Setting(
        name,
        _models.neox(width, 2, width // 16, 128, length),
        CausalLMOutput(),
        (torch.cat(rows),),
        (torch.cat(held),),
        epochs,
        3e-3,
        batch_size=32,
        dense=False,
        sources=tuple(texts),
        origin=(torch.cat(origins), torch.cat(held_origins)),
    )


SETTINGS: dict[str, Callable[..., Setting]] = {
    "mlp": fashion_mlp,
    "cnn": fashion_cnn,
    "lm": characters,
    "digits": digits,
    "small cnn": small_cnn,
    "fashion": fashion_loss,
    "resnet9": fashion_resnet9,
    "cifar10": cifar10_resnet9,
    "text": text_topics,
    "bytes": byte_lm,
    "few bytes": few_bytes,
}


def load(
    name: str, *sizes: int, folder: Path = _data.FASHION_MNIST, device: str = "cpu"
) -> Setting:
    """Build a setting by name, its data on a device.

    Args:
        name: one of `SETTINGS`.
        *sizes: number of training samples and of targets; the setting's own when not given.
        folder: of Fashion-MNIST's files.
        device: where the data goes.
    """
    return SETTINGS[name](*sizes, folder=folder).to(device)
