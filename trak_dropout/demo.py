"""The main job on real data: train with the callback, find flipped labels, explain predictions.

scikit-learn's digits, a small convolutional network, a tenth of the training labels flipped.
Beside our scores, in the same run and for the same checkpoints: the per-sample loss, TRAK with its
Gaussian projection at equal k and damping, and TRAK with its defaults at equal k.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trak import TRAKer
from trak.projectors import BasicProjector

from trak_dropout import metrics, report
from trak_dropout.attribution import AttributionStore
from trak_dropout.lightning import GradientCollector
from trak_dropout.scoring import DampedScoreComputer
from trak_dropout.streaming import self_influence

N_TRAIN, N_TEST, FLIPPED_SHARE = 1000, 300, 0.1
EPOCHS, EVERY_N_EPOCHS = 12, 4
PROJ_DIM = 512
INSPECTED = (0.05, 0.10, 0.20)
OURS, GAUSSIAN, DEFAULTS, LOSS = (
    "trak_dropout (callback)",
    "TRAK, Gaussian, our damping",
    "TRAK, its defaults",
    "per-sample loss",
)
HEADS = ("AUC", *(f"in {share:.0%}" for share in INSPECTED), "same class", "seconds")
NOTE = (
    "AUC: how well the score separates flipped from right labels. In 5 %, 10 %, 20 %: the share of "
    "the flipped labels among the first that are inspected. Same class: the share of test images "
    "whose most influential training image shows their class."
)


class DigitsNet(pl.LightningModule):
    """A small convolutional classifier of 8 x 8 images."""

    def __init__(self, width: int = 12, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)`` of images ``(B, 1, 8, 8)``."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the batch's cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


@dataclass(frozen=True)
class Digits:
    """The data of the demo: given training labels are partly wrong."""

    train_images: Tensor
    given: Tensor
    true: Tensor
    flipped: NDArray[np.bool_]
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        """Split scikit-learn's digits and flip a tenth of the training labels."""
        pixels, digits = load_digits(return_X_y=True)
        images = torch.tensor(pixels / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
        labels = torch.tensor(digits)
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=random)
        train, test = order[:N_TRAIN], order[N_TRAIN : N_TRAIN + N_TEST]
        wrong = torch.randperm(N_TRAIN, generator=random)[: round(FLIPPED_SHARE * N_TRAIN)]
        given = labels[train].clone()
        given[wrong] = (given[wrong] + torch.randint(1, 10, wrong.shape, generator=random)) % 10
        flipped = np.zeros(N_TRAIN, dtype=bool)
        flipped[wrong.numpy()] = True
        return cls(images[train], given, labels[train], flipped, images[test], labels[test])

    def train_loader(self, batch_size: int, shuffle: bool) -> DataLoader[Any]:
        """Return batches of training images and given labels."""
        data = TensorDataset(self.train_images, self.given)
        return DataLoader(data, batch_size, shuffle=shuffle)

    def test_loader(self) -> DataLoader[Any]:
        """Return batches of test images and labels."""
        return DataLoader(TensorDataset(self.test_images, self.test_labels), N_TEST)


@dataclass(frozen=True)
class Result:
    """One row of the demo's table; what a method does not give is None."""

    method: str
    auc: float | None = None
    recalls: tuple[float, ...] | None = None
    same_class: float | None = None
    seconds: float | None = None

    @classmethod
    def measure(
        cls,
        method: str,
        data: Digits,
        suspicion: NDArray[Any] | None,
        scores: NDArray[Any] | None,
        seconds: float | None,
    ) -> Result:
        """Measure what a method makes of the training and of the test images."""
        if scores is not None:
            same_class = metrics.retrieval_accuracy(scores, data.true, data.test_labels)
        if suspicion is None:
            return cls(method, same_class=same_class, seconds=seconds)
        return cls(
            method,
            metrics.mislabel_auc(suspicion, data.flipped),
            tuple(metrics.mislabel_recall(suspicion, data.flipped, s) for s in INSPECTED),
            None if scores is None else same_class,
            seconds,
        )

    def cells(self, absent: str) -> list[str]:
        """Return the row as text."""
        values = [self.auc, *(self.recalls or (None,) * len(INSPECTED)), self.same_class]
        forms = [".4f", *([".2f"] * len(INSPECTED)), ".3f", ".1f"]
        return [
            self.method,
            *(
                absent if value is None else format(value, form)
                for value, form in zip([*values, self.seconds], forms, strict=True)
            ),
        ]

    def figures(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return dict(vars(self))


def run(out: Path, seed: int = 0) -> dict[str, Any]:
    """Run the demo, print its table, write ``report.html``, ``results.json`` and the store.

    Args:
        out: directory to write to; the files of an earlier demo there are replaced.
        seed: seed of split, flipped labels, training and masks.

    Returns:
        The figures, as in ``results.json``.
    """
    data = Digits.load(seed)
    say(
        f"scikit-learn's digits: {N_TRAIN} training images, {data.flipped.sum()} of their labels "
        f"flipped; {N_TEST} test images"
    )
    with quiet():
        pl.seed_everything(seed, verbose=False)
        module = DigitsNet()
        collector = GradientCollector(
            out / "store",
            task="image_classification",
            proj_dim=PROJ_DIM,
            seed=seed,
            every_n_epochs=EVERY_N_EPOCHS,
            overwrite=True,
        )
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[collector],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
        )
        say(f"training {EPOCHS} epochs, collecting after every {EVERY_N_EPOCHS}th ...")
        fit_seconds = timed(trainer.fit, module, data.train_loader(64, shuffle=True))[1]
        train_seconds = fit_seconds - collector.collect_seconds
        accuracy, losses = evaluate(module, data)
        settings = collector.store.settings
        kept = len(np.unique(collector.store.projector().mask(0).coordinates))
        say(
            f"test accuracy {accuracy:.3f}; training took {train_seconds:.1f} s, collecting "
            f"{len(collector.model_ids)} checkpoints {collector.collect_seconds:.1f} s "
            f"({collector.collect_seconds / train_seconds:.2f} of training)"
        )
        say(
            f"kept {kept} of {settings.grad_dim} gradient coordinates, "
            f"folded into k = {PROJ_DIM} columns"
        )
        suspicion, seconds = timed(collector.self_influence)
        scores, more = timed(partial(collector.attribute, progress=False), data.test_loader())
        others, gaussian = peers(collector.store, module, data, seed)
        rows = [
            Result.measure(
                OURS, data, suspicion, scores, collector.collect_seconds + seconds + more
            ),
            *others,
            Result.measure(LOSS, data, losses, None, None),
        ]
    figures = {
        "seed": seed,
        "proj_dim": PROJ_DIM,
        "checkpoints": len(collector.model_ids),
        "test_accuracy": accuracy,
        "train_seconds": train_seconds,
        "collect_seconds": collector.collect_seconds,
        "rows": [row.figures() for row in rows],
    }
    say("")
    say(table(rows))
    (out / "results.json").write_text(json.dumps(figures, indent=1))
    page = out / "report.html"
    with quiet():
        size = write_page(page, collector.store, data, losses, gaussian, rows, figures)
    say(
        f"\nflagged images, recall curve and influences with pictures: {page} ({size / 1e6:.1f} MB)"
    )
    return figures


def peers(
    store: AttributionStore, module: nn.Module, data: Digits, seed: int
) -> tuple[list[Result], NDArray[np.float64]]:
    """Run TRAK's own Gaussian projection over the store's checkpoints.

    Returns:
        The table's rows, and self-influence with the Gaussian projection and our damping.
    """
    grad_dim = store.settings.grad_dim
    say(f"TRAK with its Gaussian projection of {grad_dim} x {PROJ_DIM}, for comparison ...")
    gaussian = BasicProjector(grad_dim, PROJ_DIM, seed, "normal", "cpu")
    (suspicion, scores), seconds = timed(
        trak_by_hand,
        store,
        module,
        data,
        projector=gaussian,
        score_computer=partial(DampedScoreComputer, damping="auto"),
        use_half_precision=False,
    )
    rows = [Result.measure(GAUSSIAN, data, suspicion, scores, seconds)]
    say("TRAK with its defaults (no damping, float16), for comparison; slow on a CPU ...")
    try:
        (_, scores), seconds = timed(
            trak_by_hand, store, module, data, proj_dim=PROJ_DIM, projector_seed=seed
        )
        rows.append(Result.measure(DEFAULTS, data, None, scores, seconds))
    except (ValueError, RuntimeError) as error:
        say(f"TRAK with its defaults failed: {error}")
        rows.append(Result(DEFAULTS, same_class=0.0))
    return rows, suspicion


def trak_by_hand(
    store: AttributionStore, module: nn.Module, data: Digits, **options: Any
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Run TRAK's quickstart loop over the store's checkpoints: self-influence and scores."""
    # TRAK's progress bars, which cannot be turned off, go to the standard error.
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        traker = TRAKer(
            model=module,
            task="image_classification",
            train_set_size=N_TRAIN,
            save_dir=folder,
            device="cpu",
            logging_level=logging.ERROR,
            **options,
        )
        for model_id in store.model_ids:
            traker.load_checkpoint(store.weights(model_id), model_id)
            for batch in data.train_loader(250, shuffle=False):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for model_id in store.model_ids:
            traker.start_scoring_checkpoint("test", store.weights(model_id), model_id, N_TEST)
            for batch in data.test_loader():
                traker.score(batch, num_samples=len(batch[0]))
        scores = np.array(traker.finalize_scores("test"), dtype=np.float32)
        return self_influence(traker), scores


def table(rows: list[Result]) -> str:
    """Format the results as text."""
    lines = [["flipped labels:", *HEADS], *(row.cells("-") for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    same_class = {row.method: row.same_class for row in rows}
    ours, defaults = same_class[OURS], same_class[DEFAULTS]
    if ours and defaults:
        text += ["", f"same class, {OURS} over {DEFAULTS}: {ours / defaults:.2f} times"]
    return "\n".join([*text, "", *textwrap.wrap(NOTE, 88)])


def write_page(
    out: Path,
    store: AttributionStore,
    data: Digits,
    losses: NDArray[np.float32],
    gaussian: NDArray[Any],
    rows: list[Result],
    figures: dict[str, Any],
) -> int:
    """Write the run's report with the table of methods; returns its size in bytes."""
    store.add_targets("test", data.test_loader(), progress=False)
    written = report.write(
        store,
        out,
        report.Examples(data.train_images, labels=data.given, true_labels=data.true),
        exp_name="test",
        targets=report.Examples(data.test_images, labels=data.test_labels),
        chosen=[int(torch.nonzero(data.test_labels == digit)[0]) for digit in (2, 3, 5, 8, 9)],
        title="Which training labels are wrong?",
        summary=(
            f"A small convolutional network was trained on {N_TRAIN} of scikit-learn's digits, "
            f"{int(data.flipped.sum())} of whose labels had been flipped. Compressed per-sample "
            f"gradients were collected at {figures['checkpoints']} checkpoints, which took "
            f"{figures['collect_seconds']:.1f} s beside {figures['train_seconds']:.1f} s of "
            "training. The images below are ranked by the influence that each has on itself."
        ),
        compare={GAUSSIAN: gaussian, LOSS: losses},
        table=report.Table(
            "Methods at the same checkpoints and number of columns",
            ["method", *HEADS],
            [row.cells("-") for row in rows],
            NOTE,
        ),
    )
    return int(written["bytes"])


def evaluate(module: DigitsNet, data: Digits) -> tuple[float, NDArray[np.float32]]:
    """Return the accuracy on the test images and the loss of each training image's given label."""
    module.eval()
    with torch.no_grad():
        predicted = module(data.test_images).argmax(1)
        accuracy = float((predicted == data.test_labels).float().mean())
        losses = nn.functional.cross_entropy(
            module(data.train_images), data.given, reduction="none"
        )
    return accuracy, losses.numpy()


def timed(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Call a function; return what it returned, and the seconds it took."""
    started = time.perf_counter()
    value = function(*args, **kwargs)
    return value, time.perf_counter() - started


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's banners and hints out of the demo's output."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
