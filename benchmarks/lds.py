"""Linear datamodeling score of every scheme and fold, beside Gaussian projection at equal k.

Three settings: an MLP and a CNN on Fashion-MNIST (TRAK's margin), a character transformer on the
source of Python's standard library (loss of a sequence). For each, models are trained on random
halves of the training set; scores are good if they predict, by summing over a half, the outputs of
the model trained on it (Spearman over halves, mean over targets). All methods see the same
checkpoints, gradients and dampings; each is reported at its best damping, averaged over seeds of
the projection.

    python benchmarks/lds.py              # about half an hour on 2 cores; trained halves are kept
    python benchmarks/lds.py --quick      # a minute: fewer of everything

Fashion-MNIST: Debian's dataset-fashion-mnist, or --fashion-mnist DIR with its four .gz files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm
from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput
from trak.projectors import BasicProjector

from trak_dropout import DenseGradientComputer, DropoutProjector, LossOutput
from trak_dropout.metrics import linear_datamodeling_score

HERE = Path(__file__).parent
DAMPINGS = (1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = (1, 2, 4, 8, 16, 32, 64)
SCHEMES = {
    **{f"dropout, fold {fold}": ("dropout", fold) for fold in FOLDS},
    **{f"unit, fold {fold}": ("unit_dropout", fold) for fold in (1, 16)},
    **{f"weighted, fold {fold}": ("weighted_dropout", fold) for fold in (1, 2, 4, 16)},
}


@dataclass
class Setting:
    """Data, model and training of one comparison."""

    name: str
    model: Callable[[], nn.Module]
    task: AbstractModelOutput
    loss: Callable[[Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    epochs: int
    rate: float
    batch_size: int = 50
    output: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor] = field(default=None)  # type: ignore[assignment]


class CharTransformer(nn.Module):
    """A causal character language model with two layers."""

    def __init__(self, vocabulary: int, length: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(B, length, vocabulary)`` of tokens ``(B, length)``."""
        x = self.tokens(tokens) + self.places
        batch, length, width = x.shape
        future = torch.full((length, length), -math.inf).triu(1)
        for block in self.blocks:
            shape = (batch, length, 3, self.heads, width // self.heads)
            q, k, v = block["qkv"](block["norm1"](x)).reshape(shape).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + future).softmax(-1)
            x = x + block["out"]((weights @ v).transpose(1, 2).reshape(batch, length, width))
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm2"](x))))
        return self.head(self.norm(x))


def margin(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """TRAK's margin of each sample."""
    logits = model(batch[0])
    right = logits.gather(1, batch[1][:, None])
    others = logits.scatter(1, batch[1][:, None], -math.inf)
    return right[:, 0] - others.logsumexp(1)


def sequence_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def minus_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Minus the loss of each sequence."""
    logits = model(batch[0]).transpose(1, 2)
    return -nn.functional.cross_entropy(logits, batch[1], reduction="none").mean(1)


def fashion_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read images ``(n, 1, 28, 28)`` in [0, 1], and labels."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.tensor(pixels / 255, dtype=torch.float32), torch.tensor(labels, dtype=torch.long)


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Build the settings that were asked for."""
    n, m = (300, 20) if options.quick else (2000, 100)
    if {"mlp", "cnn"} & set(options.settings):
        images, labels = fashion_mnist(options.fashion_mnist, "train")
        test_images, test_labels = fashion_mnist(options.fashion_mnist, "t10k")
        shared: dict[str, Any] = {
            "task": ImageClassificationModelOutput(),
            "loss": nn.functional.cross_entropy,
            "train": (images[:n], labels[:n]),
            "targets": (test_images[:m], test_labels[:m]),
            "output": margin,
            "rate": 1e-3,
        }
    if "mlp" in options.settings:
        yield Setting(
            "mlp",
            lambda: nn.Sequential(
                nn.Flatten(),
                nn.Linear(784, 128),
                nn.ReLU(),
                nn.Linear(128, 64),
                nn.ReLU(),
                nn.Linear(64, 10),
            ),
            epochs=15,
            **shared,
        )
    if "cnn" in options.settings:
        yield Setting(
            "cnn",
            lambda: nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(1568, 64),
                nn.ReLU(),
                nn.Linear(64, 10),
            ),
            epochs=10,
            **shared,
        )
    if "lm" in options.settings:
        folder = Path(sysconfig.get_path("stdlib"))
        names = (
            "argparse",
            "ast",
            "datetime",
            "decimal",
            "inspect",
            "tarfile",
            "typing",
            "zipfile",
        )
        files = [folder / f"{name}.py" for name in names]
        text = "".join(f.read_text(errors="replace") for f in files if f.is_file())
        alphabet = sorted(set(text))
        codes = torch.tensor([alphabet.index(c) for c in text])
        length, n = 64, 300 if options.quick else 1200
        starts = torch.randperm(
            len(codes) // (length + 1), generator=torch.Generator().manual_seed(0)
        )[: n + m]
        rows = torch.stack([codes[s * (length + 1) : (s + 1) * (length + 1)] for s in starts])
        pairs = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        yield Setting(
            "lm",
            lambda: CharTransformer(len(alphabet), length),
            task=LossOutput(sequence_loss),
            loss=sequence_loss,
            train=(pairs[0][:n], pairs[1][:n]),
            targets=(pairs[0][n:], pairs[1][n:]),
            output=minus_loss,
            epochs=12,
            rate=3e-3,
        )


def train(setting: Setting, rows: Tensor, seed: int) -> nn.Module:
    """Train a model on some of the training samples."""
    torch.manual_seed(seed)
    model = setting.model()
    optimizer = torch.optim.Adam(model.parameters(), setting.rate)
    for _ in range(setting.epochs):
        for batch in rows[torch.randperm(len(rows))].split(setting.batch_size):
            optimizer.zero_grad()
            setting.loss(model(setting.train[0][batch]), setting.train[1][batch]).backward()
            optimizer.step()
    return model.eval()


def halves(setting: Setting, count: int, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Train on random halves; return which samples each held, and its outputs on the targets."""
    n = len(setting.train[0])
    file = cache / f"{setting.name}-{n}-{len(setting.targets[0])}-{setting.epochs}.npz"
    masks, outputs = np.zeros((0, n), dtype=bool), np.zeros((0, len(setting.targets[0])))
    if file.is_file():
        kept = np.load(file)
        masks, outputs = kept["masks"][:count], kept["outputs"][:count]
    for i in tqdm(range(len(masks), count), desc=f"{setting.name}: halves", leave=False):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 + i))
        model = train(setting, order[: n // 2], seed=1000 + i)
        with torch.no_grad():
            output = setting.output(model, setting.targets).double().numpy()
        mask = np.zeros(n, dtype=bool)
        mask[order[: n // 2].numpy()] = True
        masks, outputs = np.vstack([masks, mask]), np.vstack([outputs, output])
        if i % 10 == 9 or i == count - 1:
            cache.mkdir(parents=True, exist_ok=True)
            np.savez(file, masks=masks, outputs=outputs)
    return masks, outputs


def features(
    setting: Setting, models: list[nn.Module], dims: list[int], seed: int
) -> Iterator[tuple[str, int, list[Any]]]:
    """Compress the gradients of all checkpoints by all methods, one pass over the gradients each.

    Yields:
        Method, k, and for each checkpoint the features of training samples and of targets and the
        out-to-loss gradients.
    """
    samples = [torch.cat(pair) for pair in zip(setting.train, setting.targets, strict=True)]
    n = len(setting.train[0])
    found: dict[tuple[str, int], list[Any]] = {}
    for model_id, model in enumerate(models):
        computer = DenseGradientComputer(model, setting.task)
        p = sum(parameter.numel() for parameter in model.parameters())
        projectors: dict[tuple[str, int], DropoutProjector] = {
            (name, k): DropoutProjector.from_model(model, k, seed, scheme, fold=fold)
            for name, (scheme, fold) in SCHEMES.items()
            for k in dims
        }
        calibration = [tuple(part[: n : max(1, n // 400)] for part in setting.train)]
        some = [computer.compute_per_sample_grad(batch) for batch in calibration]
        for projector in projectors.values():
            if projector.proj_type == "weighted_dropout":
                projector.calibrate(some)
        del some
        gaussian = BasicProjector(p, max(dims), seed, "normal", "cpu", block_size=256)
        parts: dict[tuple[str, int], list[Tensor]] = {}
        out_to_loss = []
        batches = list(zip(*(part.split(350) for part in samples), strict=True))
        for batch in tqdm(batches, desc=f"{setting.name}: checkpoint {model_id}", leave=False):
            grads = computer.compute_per_sample_grad(batch)
            out_to_loss.append(computer.compute_loss_grad(batch))
            dense = gaussian.project(grads, model_id)
            for k in dims:  # the first columns of a Gaussian projection are one themselves
                parts.setdefault(("Gaussian", k), []).append(dense[:, :k])
            for key, projector in projectors.items():
                parts.setdefault(key, []).append(projector.project(grads, model_id))
        q = torch.cat(out_to_loss)[:n]
        for key, rows in parts.items():
            x = torch.cat(rows)
            found.setdefault(key, []).append((x[:n], x[n:], q))
    for (method, k), checkpoints in found.items():
        yield method, k, checkpoints


def scores(checkpoints: list[Any], damping: float, grams: list[Tensor]) -> np.ndarray:
    """TRAK's scores at a relative damping."""
    total, weight = 0.0, 0.0
    for (x, targets, q), gram in zip(checkpoints, grams, strict=True):
        damped = gram.clone()
        damped.diagonal().add_(damping * gram.trace() / len(gram))
        solved = torch.cholesky_solve(targets.double().T, torch.linalg.cholesky(damped))
        total = total + x.double() @ solved
        weight = weight + q.double()
    return (total * weight).numpy()


def study(setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all methods in a setting."""
    masks, outputs = halves(setting, options.halves, options.cache)
    everything = torch.arange(len(setting.train[0]))
    models = [train(setting, everything, seed) for seed in range(options.checkpoints)]
    found: dict[tuple[str, int], list[dict[float, float]]] = {}
    for seed in range(options.seeds):
        for method, k, checkpoints in features(setting, models, options.proj_dims, seed):
            grams = [x.double().T @ x.double() for x, _, _ in checkpoints]
            by_damping = {
                damping: linear_datamodeling_score(
                    scores(checkpoints, damping, grams), masks, outputs
                )
                for damping in DAMPINGS
            }
            found.setdefault((method, k), []).append(by_damping)
    rows = []
    for (method, k), seeds in found.items():
        mean = {damping: statistics.mean(s[damping] for s in seeds) for damping in DAMPINGS}
        best = max(mean, key=mean.__getitem__)
        rows.append(
            {
                "setting": setting.name,
                "k": k,
                "method": method,
                "lds": mean[best],
                "lds_by_seed": [s[best] for s in seeds],
                "damping": best,
                "lds_by_damping": mean,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the scores, and each method's mean ratio to Gaussian."""
    cells = sorted({(row["setting"], row["k"]) for row in rows})
    lds = {(row["method"], row["setting"], row["k"]): row["lds"] for row in rows}
    lines = [f"{'':22}" + "".join(f"{f'{s} {k}':>12}" for s, k in cells) + f"{'of Gaussian':>22}"]
    for method in dict.fromkeys(row["method"] for row in rows):
        ratios = [lds[method, s, k] / lds["Gaussian", s, k] for s, k in cells]
        lines.append(
            f"{method:22}"
            + "".join(f"{lds[method, s, k]:12.3f}" for s, k in cells)
            + f"{statistics.mean(ratios):10.3f} (least {min(ratios):.3f})"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw each method's score in each setting."""
    cells = sorted({(row["setting"], row["k"]) for row in rows})
    figure = Figure(figsize=(2.4 * len(cells), 3.6), layout="constrained")
    panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for panel, (name, k) in zip(panels, cells, strict=True):
        here = [row for row in rows if (row["setting"], row["k"]) == (name, k)]
        panel.barh([row["method"] for row in here], [row["lds"] for row in here])
        reference = next(row["lds"] for row in here if row["method"] == "Gaussian")
        panel.axvline(reference, color="gray", linewidth=0.8, linestyle=":")
        panel.set(title=f"{name}, k = {k}", xlabel="LDS")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer of everything, k = 128")
    parser.add_argument("--settings", nargs="+", default=["mlp", "cnn", "lm"])
    parser.add_argument("--proj-dims", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--halves", type=int, default=60, help="models trained on random halves")
    parser.add_argument("--checkpoints", type=int, default=3, help="models trained on everything")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the projections")
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="for trained halves")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "lds.json")
    parser.add_argument(
        "--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist")
    )
    options = parser.parse_args()
    if options.quick:
        options.halves, options.checkpoints, options.proj_dims = 10, 1, [128]
        options.seeds = 1
    rows: list[dict[str, Any]] = []
    for setting in settings(options):
        started = time.perf_counter()
        rows += study(setting, options)
        print(f"{setting.name}: {time.perf_counter() - started:.0f} s", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"halves": options.halves, "seeds": options.seeds, "rows": rows}, indent=1)
            + "\n"
        )
        draw(rows, options.out.with_suffix(".png"))
    print(f"\nLDS at the best damping\n{table(rows)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
