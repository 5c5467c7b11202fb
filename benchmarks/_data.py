"""Real data: images, and text of sources found on the machine or fetched where there is a network.

Nothing here is made up: a source that is not there raises `MissingError`, which says how to get it.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))
_ENOUGH = 600_000  # characters read of a source; a quarter of it from any one file


class MissingError(RuntimeError):
    """Data that is not on this machine, and how to get it."""


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits in a fixed random order: ``(1797, 64)``, labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.tensor(pixels[order] / 16, dtype=torch.float32), torch.tensor(labels[order])


def fashion_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST, images ``(n, 1, 28, 28)`` in [0, 1] and labels.

    Args:
        folder: where the four .gz files are (Debian's dataset-fashion-mnist); torchvision fetches
            them where they are not.
        part: ``"train"`` or ``"t10k"``.
    """
    if not folder.is_dir():
        data = _torchvision("FashionMNIST", part == "train")
        return data.data[:, None] / 255, data.targets
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.tensor(pixels / 255, dtype=torch.float32), torch.tensor(labels, dtype=torch.long)


def cifar10(part: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10 through torchvision, images ``(n, 3, 32, 32)`` standardised, and labels."""
    data = _torchvision("CIFAR10", part == "train")
    images = torch.tensor(data.data).permute(0, 3, 1, 2) / 255
    mean, deviation = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.243, 0.262])
    return (images - mean[:, None, None]) / deviation[:, None, None], torch.tensor(data.targets)


def hub_text(dataset: str, name: str, part: str, *columns: str) -> list[tuple]:
    """Rows of a Hugging Face data set: ``("nyu-mll/glue", "sst2", "train", "sentence")``."""
    try:
        from datasets import load_dataset

        rows = load_dataset(dataset, name, split=part)
    except Exception as error:
        raise MissingError(
            f"{dataset}/{name} needs a network and `pip install datasets` ({type(error).__name__})"
        ) from error
    return list(zip(*(rows[column] for column in columns), strict=True))


def _torchvision(name: str, train: bool) -> object:
    try:
        import torchvision

        folder = Path.home() / ".cache" / "torchvision"
        return getattr(torchvision.datasets, name)(folder, train, download=True)
    except Exception as error:
        raise MissingError(
            f"{name} needs torchvision and a network ({type(error).__name__}); Fashion-MNIST is "
            "also Debian's dataset-fashion-mnist"
        ) from error


def _files(*patterns: tuple[Path, str]) -> Callable[[], Iterator[str]]:
    """Texts of files, in the order of their names."""

    def read() -> Iterator[str]:
        for folder, pattern in patterns:
            for file in sorted(folder.glob(pattern)) if folder.is_dir() else ():
                if file.is_file() and 1500 < file.stat().st_size < 400_000:
                    raw = file.read_bytes()
                    raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
                    yield raw.decode("utf-8", "ignore")

    return read


def _manual() -> Iterator[str]:
    """Manual pages without their markup."""
    for page in _files((Path("/usr/share/man"), "man[2357]/*.gz"))():
        lines = (line for line in page.splitlines() if not line.startswith((".\\", "'\\")))
        plain = "\n".join(re.sub(r"^\.[A-Za-z]{1,2} ?", "", line) for line in lines)
        yield re.sub(r"\\f.|\\-|\\&", lambda m: "-" if m.group() == r"\-" else "", plain)


def _bible() -> Iterator[str]:
    """The King James version, from Debian's bible-kjv."""
    if shutil.which("bible"):
        chosen = ("gen1:1-exo40:38", "psa1:1-psa150:6", "mat1:1-joh21:25")
        for part in chosen:
            yield subprocess.run(
                ["bible", "-f", part], capture_output=True, text=True, stdin=subprocess.DEVNULL
            ).stdout


# Text by source. Each is written in a language or manner of its own.
SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "Python": _files((STDLIB, "[a-z]*.py")),
    "C++": _files((PACKAGES / "torch/include/ATen", "[A-Z]*.h"),
                  (PACKAGES / "torch/include/c10", "*/*.h")),
    "licenses": _files((Path("/usr/share/common-licenses"), "[A-Z]*"),
                       (PACKAGES, "*.dist-info/licenses/**/LICENSE*")),
    "manual pages": _manual,
    "Bible": _bible,
    "Perl": _files((Path("/usr/share/perl"), "5.*.*/**/*.pm"),
                   (Path("/usr/share/perl5"), "**/*.pm")),
    "JavaScript": _files((PACKAGES, "*/**/static/**/*.js"), (PACKAGES, "*/**/*.js")),
    "style sheets": _files((PACKAGES, "sphinx/**/*.css*"), (PACKAGES, "*/**/*.css")),
    "translations": _files((PACKAGES, "sphinx/locale/*/LC_MESSAGES/*.po")),
    "package readmes": _files((PACKAGES, "*.dist-info/METADATA")),
    "copyright notices": _files((Path("/usr/share/doc"), "*/copyright")),
    "RFCs": _files((Path("/usr/share/doc/RFC"), "**/*.txt*")),
}  # fmt: skip


def source_text(name: str, characters: int = _ENOUGH) -> str:
    """Text of a source, from the beginning of as many files as it takes.

    Args:
        name: one of `SOURCES`.
        characters: how much to read.

    Raises:
        MissingError: there is less than a tenth of it.
    """
    parts: list[str] = []
    length = 0
    for text in SOURCES[name]():
        plain = text.encode("ascii", "ignore").decode()[: _ENOUGH // 4]
        parts.append(plain)
        length += len(plain)
        if length >= characters:
            break
    if length < characters / 10:
        raise MissingError(f"too little text of {name!r} on this machine: {length} characters")
    return "\n".join(parts)[:characters]


def sources(count: int, characters: int) -> dict[str, str]:
    """The first sources that have enough text.

    Args:
        count: how many at most.
        characters: how much text each must have.

    Raises:
        MissingError: there are fewer than six.
    """
    found: dict[str, str] = {}
    for name in SOURCES:
        try:
            text = source_text(name, characters)
        except MissingError:
            continue
        if len(text) >= characters:
            found[name] = text
        if len(found) == count:
            break
    if len(found) < 6:
        raise MissingError(
            f"only {len(found)} sources of text found ({', '.join(found)}); "
            "Debian's manpages, bible-kjv-text and doc-rfc-std have more"
        )
    return found
