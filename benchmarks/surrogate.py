"""InfluenceNetwork beside simpler predictors: quality, cost, and training on what it selects.

Two tasks with 30 % of the training labels flipped and clean targets: an MLP on Fashion-MNIST, and a
convolution over characters that tells from which of ten sources a passage of real text comes
(source code, manual pages, licenses, ...). Influences are TRAK's margin over three checkpoints of
one run. All of them are really computed, a block of rows at a time, as the truth and as what the
network's cost is compared with. From those of 5 % of the rows and columns, with the Gram matrix of
the sampled rows alone, networks learn to predict the rest; they see the last checkpoint's
penultimate layer and the label.

The tasks are studied with 10 000 images x 2500 targets and 20 000 passages x 5000; what the network
costs, and how good it is, also with 55 000 images x 10 000.

Reported over seeds of the sample: Spearman and squared error on the four quadrants (rows and
columns seen or not), seconds of every part, and the test accuracy of models trained on the 30 %
that predicted or true influences select. Everything runs in one thread; seconds are the process's
own, beside those of the wall clock. A run goes on where it stopped.

    python benchmarks/surrogate.py              # a quarter of an hour on an idle core
    python benchmarks/surrogate.py --quick      # a minute: fewer of everything

Fashion-MNIST: Debian's dataset-fashion-mnist, or --fashion-mnist DIR.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _influence import ROWS, Clock, Truth, every, gradients, kept, sampled
from _study import Cells, parser, write
from _tasks import KEPT, TASKS, Task
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import nn
from tqdm import tqdm

from trak_dropout import InfluenceNetwork
from trak_dropout.surrogate import (
    PredictedInfluences,
    penultimate_embeddings,
    sample_axes,
    select,
    with_labels,
)

# Task, training samples, targets and columns of a setting, and whether all is studied there or the
# network's cost and quality alone.
SETTINGS = {
    "image": ("image", 10_000, 2_500, 1024, True),
    "text": ("text", 20_000, 5_000, 4096, True),
    "all images": ("image", 55_000, 10_000, 4096, False),
}
QUADRANTS = ("both seen", "source seen", "target seen", "both unseen")
Sides = tuple[np.ndarray, np.ndarray]
Guess = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of some rows and columns

BATCH, STEPS = (256, 256), 300  # sources and targets of a batch, and batches to learn from

MAIN = "network (product)"
NETWORKS: dict[str, dict[str, Any]] = {
    MAIN: {"architecture": "product"},
    "network (concat)": {"architecture": "concat"},
}
OTHERS: tuple[float | str, ...] = (1.0, "auto")  # dampings at which learning is tried, too
# What else is learnt with the first seed alone.
STUDY: dict[str, dict[str, Any]] = {
    "product, hidden 25": {"hidden_dim": 25},
    "product, hidden 400": {"hidden_dim": 400},
    "product, 4 networks": {"ensemble": 4},
}


class Bench:
    """One task: its models, influences and embeddings, and what is measured on them.

    Args:
        task: the task.
        options: of the study.
        name: of the setting.
        studied: whether everything is compared, or the network with simple predictors alone.
    """

    def __init__(
        self, task: Task, options: argparse.Namespace, name: str, studied: bool = True
    ) -> None:
        self.task, self.options, self.name, self.studied = task, options, name, studied
        self.cells = Cells(options, f"surrogate-{name.replace(' ', '-')}")
        n, m = task.shape
        self._stem = f"surrogate-{task.name}-{n}-{m}-{options.proj_dim}-{options.damping:g}"
        self.models = task.checkpoints(options.cache / f"{self._stem}-models.pt")
        self.axes = {
            (seed, share): sample_axes(n, m, share, seed)
            for seed in range(options.seeds)
            for share in options.shares[: 1 if seed else None]
        }
        sampled_columns = [columns for _, columns in self.axes.values()]
        random = np.random.default_rng(7)
        # Targets that no seed has sampled, to judge by.
        self.unseen = np.sort(
            random.permutation(np.setdiff1d(np.arange(m), np.concatenate(sampled_columns)))[:500]
        )
        self.columns = np.unique(np.concatenate([self.unseen, *sampled_columns]))
        self.first = (0, options.shares[0])
        embedding = Clock()
        with embedding("embedding"):
            self.plain = self._embedded(self.models[-1])
            labels = [task.train[1].numpy(), task.targets[1].numpy()]
            self.embedded: Sides = tuple(  # type: ignore[assignment]
                with_labels(rows, own, task.classes, products=True)
                for rows, own in zip(self.plain, labels, strict=True)
            )
        self.labels: Sides = (labels[0], labels[1])
        self.embedding = embedding

    def _embedded(self, model: nn.Module) -> Sides:
        sides = (self.task.train, self.task.targets)
        rows = [
            penultimate_embeddings(model, [[few] for few in torch.split(data[0], ROWS)])
            for data in sides
        ]
        return rows[0], rows[1]

    # --- the truth ---------------------------------------------------------------------------

    def truths(self) -> tuple[Truth, dict[str, Truth]]:
        """All influences, computed once and kept on disk; and at other dampings on some targets."""
        options = self.options
        others: dict[float | str, np.ndarray] = {
            value: np.union1d(self.unseen, self.axes[self.first][1])
            for value in (OTHERS if self.studied else ())
        }
        files = {key: options.cache / f"{self._stem}-{key}.npz" for key in ("truth", *others)}
        found = {str(key): kept(file) for key, file in files.items()}
        if self.cells.get(part="full") is None or None in found.values():
            clock = Clock()
            every_gradient = gradients(self.task, self.models, options.proj_dim, clock)
            truth, rest, relative = every(
                every_gradient, options.damping, self.columns, clock, others
            )
            kept(files["truth"], truth)
            for value, one in rest.items():
                kept(files[value], one)
            self.cells.add({"part": "full", "seconds": clock.rows(), "relative": relative})
            say(f"{self.name}: all influences in {sum(clock.cpu.values()):.0f} s")
            return truth, {str(value): one for value, one in rest.items()}
        truth = found.pop("truth")
        assert truth is not None
        return truth, found  # type: ignore[return-value]

    # --- networks ------------------------------------------------------------------------------

    def block(self, key: tuple[int, float], clock: Clock) -> np.ndarray:
        """The sampled influences, from gradients of the sample alone."""
        rows, columns = self.axes[key]
        found = gradients(self.task, self.models, self.options.proj_dim, clock, rows, columns)
        return sampled(found, self.options.damping, self.task.shape[0], clock)

    def learnt(
        self,
        key: tuple[int, float],
        block: np.ndarray,
        sides: Sides | None = None,
        clock: Clock | None = None,
        **network: Any,
    ) -> InfluenceNetwork:
        """A network fitted to influences of a sample."""
        x, y = sides or self.embedded
        rows, columns = self.axes[key]
        batches = -(-len(rows) // BATCH[0]) * -(-len(columns) // BATCH[1])
        epochs = max(1, min(25, STEPS // batches))
        with (clock or Clock())("fit"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = InfluenceNetwork(x.shape[1], **{"architecture": "product", **network})
            return net.fit(
                x[rows], y[columns], block, seed=key[0], batch_size=BATCH, max_epochs=epochs
            )

    def guess(self, net: InfluenceNetwork, sides: Sides | None = None) -> Guess:
        """What a network predicts for some rows and columns."""
        x, y = sides or self.embedded

        def predict(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return net.predict(x[rows], y[columns])

        return predict

    # --- what is measured ------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Measure everything that has not been measured yet."""
        truth, others = self.truths()
        for key in tqdm(self.axes, f"{self.name}: samples", leave=False):
            if self.cells.get(part="sample", key=list(key)) is None:
                self.sample(key, truth)
                self.cells.add({"part": "sample", "key": list(key)})
                say(f"{self.name}: seed {key[0]}, {key[1]:.1%} done")
        if self.studied and self.cells.get(part="dampings") is None:
            for damping, one in others.items():
                self.at_damping(damping, one)
            self.cells.add({"part": "dampings"})
        for seed in range(self.options.seeds if self.studied else 0):
            self.selections(seed, truth)
        full = self.cells.get(part="full")
        assert full is not None
        n, m = self.task.shape
        groups = {
            part: [row for row in self.cells.rows if row["part"] == part]
            for part in ("quality", "cost", "selection", "fit")
        }
        return {
            "setting": self.name,
            "n": n,
            "m": m,
            "proj_dim": self.options.proj_dim,
            "parameters": sum(p.numel() for p in self.models[-1].parameters()),
            "checkpoints": len(self.models),
            "checkpoint_accuracy": [self.task.tested(model) for model in self.models],
            "relative_damping": full["relative"],
            "quality": groups["quality"],
            "cost": {"full": full["seconds"], "network": groups["cost"]},
            "fits": groups["fit"],
            "selection": groups["selection"],
        }

    def add(self, method: str, key: tuple[int, float], guess: Guess, truth: Truth) -> None:
        """Judge predictions on the four quadrants."""
        if self.cells.get(part="quality", method=method, share=key[1], seed=key[0]) is not None:
            return  # of a run that was interrupted before this sample was done
        found = quality(truth, guess, self.axes[key], self.unseen, self.task.shape[0])
        self.cells.add(
            {"part": "quality", "method": method, "share": key[1], "seed": key[0],
             "quadrants": found}
        )  # fmt: skip

    def sample(self, key: tuple[int, float], truth: Truth) -> None:
        """Everything that is learnt from one sample."""
        seed, share = key
        main = share == self.options.shares[0]
        clock = Clock()
        block = self.block(key, clock)
        net = self.learnt(key, block, clock=clock)
        if main and self.cells.get(part="cost", seed=seed) is None:
            self.cells.add({"part": "fit", "seed": seed, "summary": net.summary})
            self._cost(seed, net, clock)
        self.add(MAIN, key, self.guess(net), truth)
        if not main:
            return
        exact = truth.block(*self.axes[key])
        self._simple(key, exact, truth)
        if not self.studied:
            return
        paper = self.learnt(key, block, **NETWORKS["network (concat)"])
        self.add("network (concat)", key, self.guess(paper), truth)
        self.add("product, exact Gram matrix", key, self.guess(self.learnt(key, exact)), truth)
        one_hot = tuple(
            with_labels(rows, own, self.task.classes)
            for rows, own in zip(self.plain, self.labels, strict=True)
        )
        for method, sides in (("without label", self.plain), ("one-hot label", one_hot)):
            bare = self.learnt(key, exact, sides)  # type: ignore[arg-type]
            self.add(f"product, {method}", key, self.guess(bare, sides), truth)  # type: ignore[arg-type]
        if seed == 0:
            for method, network in STUDY.items():
                self.add(method, key, self.guess(self.learnt(key, exact, **network)), truth)

    def _cost(self, seed: int, net: InfluenceNetwork, clock: Clock) -> None:
        """Predict all pairs, a block of rows at a time as they were computed; keep the seconds."""
        with warnings.catch_warnings(), clock("predict"):
            warnings.simplefilter("ignore")
            predicted = PredictedInfluences(net, *self.embedded)
            for start in range(0, self.task.shape[0], ROWS // 4):
                predicted[start : start + ROWS // 4].mean(1)
        seconds = {
            kind: {**clock.rows()[kind], **self.embedding.rows()[kind]} for kind in ("cpu", "wall")
        }
        self.cells.add({"part": "cost", "method": MAIN, "seed": seed, "seconds": seconds})

    def _simple(self, key: tuple[int, float], exact: np.ndarray, truth: Truth) -> None:
        """The mean, ridge regression, and cosines."""
        some = self.axes[key]

        def constant(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
            return np.full((len(rows), len(columns)), exact.mean(), dtype=np.float32)

        self.add("mean", key, constant, truth)
        self.add("ridge", key, ridge(*self.embedded, *some, exact), truth)
        one_hot = [
            np.concatenate([rows, np.eye(self.task.classes, dtype=np.float32)[own]], 1)
            for rows, own in zip(self.plain, self.labels, strict=True)
        ]
        self.add("cosine", key, scaled(cosine(*self.plain), some, exact), truth)
        self.add("cosine with label", key, scaled(cosine(*one_hot), some, exact), truth)
        self.add("cosine if same label", key, scaled(self.alike(), some, exact), truth)

    def alike(self) -> Guess:
        """Cosine of the embeddings where the labels are equal, else zero."""
        angles, (own, other) = cosine(*self.plain), self.labels
        return lambda rows, columns: (
            angles(rows, columns) * (own[rows][:, None] == other[columns][None])
        )

    def at_damping(self, damping: str, truth: Truth) -> None:
        """What can be learnt from influences at another damping, exact ones of the first sample."""
        exact = truth.block(*self.axes[self.first])
        for method, network in NETWORKS.items():
            guess = self.guess(self.learnt(self.first, exact, **network))
            self.add(f"{method}, damping {damping}", self.first, guess, truth)
        same = scaled(self.alike(), self.axes[self.first], exact)
        self.add(f"cosine if same label, damping {damping}", self.first, same, truth)

    def selections(self, seed: int, truth: Truth) -> None:
        """Test accuracy after training on what true and predicted influences on 500 targets choose.

        The targets are ones that the network has not seen.
        """
        labels, n = self.labels[0], self.task.shape[0]
        ways: dict[str, dict[str, Any]] = {
            "top": {"method": "top"},
            "top by class": {"method": "top", "groups": labels},
            "facility location by class": {"groups": labels},
        }
        values: dict[str, np.ndarray] = {}

        def influences(kind: str) -> np.ndarray:
            if kind not in values:
                rows, key = np.arange(n), (seed, self.options.shares[0])
                if kind == "true":
                    values[kind] = truth.block(rows, self.unseen)
                else:
                    net = self.learnt(key, self.block(key, Clock()))
                    values[kind] = self.guess(net)(rows, self.unseen)
            return values[kind]

        everyone: dict[str, Callable[[], np.ndarray]] = {
            "random": lambda: np.random.default_rng(seed).permutation(n)[: round(KEPT * n)]
        }
        for way, how in ways.items():
            for kind in ("true", "predicted"):
                everyone[f"{way}: {kind}"] = lambda kind=kind, how=how: select(
                    influences(kind), KEPT, **how
                )
        bar = tqdm(everyone.items(), f"{self.name}: selections, seed {seed}", leave=False)
        for who, choose in bar:
            if self.cells.get(part="selection", who=who, seed=seed) is None:
                accuracy = self.task.accuracy(choose(), 100 + seed)
                row = {"part": "selection", "who": who, "seed": seed, "accuracy": accuracy}
                self.cells.add(row)
        say(f"{self.name}: selection of seed {seed} done")


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation over all pairs; 0 where one is constant."""
    x, y = rankdata(a.ravel()), rankdata(b.ravel())
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else 0.0


def quality(
    truth: Truth, guess: Guess, axes: Sides, unseen: np.ndarray, n: int
) -> dict[str, dict[str, float]]:
    """Spearman, and squared error over the truth's variance, on each quadrant.

    Of a thousand training samples, seen and unseen: ranks of half a million pairs are enough.
    """
    random = np.random.default_rng(11)
    rows, columns = axes
    seen = np.sort(random.permutation(rows)[:1000])
    others = np.sort(random.permutation(np.setdiff1d(np.arange(n), rows))[:1000])
    blocks = [(seen, columns), (seen, unseen), (others, columns), (others, unseen)]
    result = {}
    for name, some in zip(QUADRANTS, blocks, strict=True):
        real, found = truth.block(*some), guess(*some)
        error = float(np.square(real - found).mean() / real.var())
        result[name] = {"spearman": spearman(real, found), "error": error}
    return result


def ridge(
    source: np.ndarray, target: np.ndarray, rows: np.ndarray, columns: np.ndarray, block: np.ndarray
) -> Guess:
    """Ridge regression on the concatenated embeddings, which is a sum of one for each side."""
    parts = []
    for side, some, mean in ((source, rows, block.mean(1)), (target, columns, block.mean(0))):
        known = side[some].astype(np.float64)
        centre, scale = known.mean(0), known.std(0) + 1e-6
        x = (known - centre) / scale
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (mean - block.mean()))
        parts.append(np.clip((side - centre) / scale, -10, 10) @ weights)
    return lambda a, b: parts[0][a][:, None] + parts[1][b][None] + block.mean()


def cosine(source: np.ndarray, target: np.ndarray) -> Guess:
    """Cosine of pairs."""
    a, b = (x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-9) for x in (source, target))
    return lambda rows, columns: a[rows] @ b[columns].T


def scaled(guess: Guess, axes: Sides, block: np.ndarray) -> Guess:
    """A similarity in the units of influences, by least squares on the sample."""
    known = guess(*axes)
    slope = ((known - known.mean()) * (block - block.mean())).mean() / (known.var() + 1e-12)
    return lambda rows, columns: (guess(rows, columns) - known.mean()) * slope + block.mean()


def cost_shares(result: dict[str, Any]) -> list[float]:
    """The network's processor seconds over those of the full computation, for each seed."""
    full = sum(result["cost"]["full"]["cpu"].values())
    return [sum(row["seconds"]["cpu"].values()) / full for row in result["cost"]["network"]]


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    sd = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{sd}"


def table(result: dict[str, Any]) -> str:
    """Format a task's results."""
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
    for kind in ("cpu", "wall"):
        full = result["cost"]["full"][kind]
        lines.append(f"full computation {sum(full.values()):.1f} s ({kind}): {rounded(full)}")
        for row in result["cost"]["network"]:
            parts = row["seconds"][kind]
            share = sum(parts.values()) / sum(full.values())
            lines.append(f"network, seed {row['seed']}: {share:.2%} of it: {rounded(parts)}")
    for who in dict.fromkeys(row["who"] for row in result["selection"]):
        found = [row["accuracy"] for row in result["selection"] if row["who"] == who]
        lines.append(f"30 % by {who:38} accuracy {spread(found)}")
    return "\n".join(lines)


def rounded(parts: dict[str, float]) -> str:
    """Seconds of parts."""
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw Spearman on unseen pairs, the parts of the cost, and accuracy after selection."""
    figure = Figure(figsize=(15, 3.8 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 3, squeeze=False)
    for (left, middle, right), result in zip(panels, results, strict=True):
        first = result["quality"][0]["share"]
        by_method: dict[str, list[float]] = {}
        for row in result["quality"]:
            if row["share"] == first:
                found = row["quadrants"]["both unseen"]["spearman"]
                by_method.setdefault(row["method"], []).append(found)
        by_who: dict[str, list[float]] = {}
        for row in result["selection"]:
            by_who.setdefault(row["who"], []).append(row["accuracy"])
        for panel, label, groups in (
            (left, "Spearman, both unseen", by_method),
            (right, "test accuracy after training on 30 %", by_who),
        ):
            means = [statistics.mean(values) for values in groups.values()]
            errors = [statistics.pstdev(values) for values in groups.values()]
            panel.barh(list(groups), means, xerr=errors)
            panel.set(title=result["setting"], xlabel=label)
            panel.invert_yaxis()
        if by_who:
            right.set_xlim(left=0.9 * min(row["accuracy"] for row in result["selection"]))
        else:
            right.set_axis_off()
        cost = result["cost"]
        sides = {"all": cost["full"]["cpu"], "network": cost["network"][0]["seconds"]["cpu"]}
        names = [*dict.fromkeys([*sides["all"], *sides["network"]]), "sum"]
        for number, (who, parts) in enumerate(sides.items()):
            seconds = [{**parts, "sum": sum(parts.values())}.get(name, 0.0) for name in names]
            places = [place + 0.4 * number for place in range(len(names))]
            middle.barh(places, seconds, height=0.4, label=who)
        middle.set_yticks([place + 0.2 for place in range(len(names))], names)
        middle.invert_yaxis()
        middle.set(title="cost", xlabel="processor seconds", xscale="log")
        middle.legend()
        for panel in (left, middle, right):
            panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def say(text: str) -> None:
    """Print at once."""
    tqdm.write(text)


def main() -> None:
    """Run the study."""
    arguments = parser(__doc__, "surrogate")
    arguments.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments.add_argument("--n", type=int, help="training samples, instead of the setting's")
    arguments.add_argument("--m", type=int, help="targets")
    arguments.add_argument("--proj-dim", type=int, help="columns of compressed gradients")
    arguments.add_argument("--damping", type=float, default=10.0, help="relative damping")
    arguments.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.02])
    options = arguments.parse_args()
    if options.quick:
        options.n, options.m, options.proj_dim = 3000, 800, 256
        options.seeds, options.shares = 1, [0.1]
    torch.set_num_threads(1)
    results, benches = [], []
    for name in options.settings:
        task_name, n, m, columns, studied = SETTINGS[name]
        own = argparse.Namespace(**vars(options))
        own.n, own.m = options.n or n, options.m or m
        own.proj_dim = options.proj_dim or columns
        task = TASKS[task_name](own.n, own.m, options.fashion_mnist, options.quick)
        benches.append(Bench(task, own, name, studied))
        results.append(benches[-1].run())
        say(table(results[-1]))
        write(options.out, options, results=results)
        draw(results, options.out.with_suffix(".png"))
    for bench in benches:
        bench.cells.close()


if __name__ == "__main__":
    main()
