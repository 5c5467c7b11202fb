r"""How time and memory grow with model, samples and k, and whether the estimate is right.

Compressed gradients of GPT-NeoX models are collected over model size, number of samples, k and
sequence length, beside a plain forward and backward of the same batch. Exponents are fitted to
medians of interleaved rounds (log time over log size); each seed is a round of its own with other
masks. The constants of `trak-dropout estimate` are measured in the same run, as the command does
for each point, before and after; its predictions stand beside what was measured. Memory is that of
a process of its own, and of the tensors in it alone; an MLP and a ResNet-9, counted by
`Work.of_model`, stand beside the language models there.

    python benchmarks/scale.py                     # small setting, about six minutes
    python benchmarks/scale.py --quick             # a minute
    python benchmarks/scale.py --device cuda --dtype bfloat16 --tokens 512 \
        --shapes pythia-70m pythia-410m pythia-1.4b pythia-6.9b
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import _models
import torch
from _measure import Call, peak, peak_of_tensors, timed
from _study import Row, interval, parser, shown, table, write
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm
from trak.modelout_functions import ImageClassificationModelOutput

from trak_dropout import CausalLMOutput, DampedScoreComputer, DropoutProjector
from trak_dropout import FactoredGradientComputer as Factored
from trak_dropout.commands.estimate import shape
from trak_dropout.estimate import Estimate, Speed, Work, calibrate, estimate
from trak_dropout.masks import DEFAULT_FOLD

PLAIN = "plain forward + backward"


class Bench:
    """A model with a batch, and what is measured of it.

    Args:
        name: of the shape.
        options: of the study.
        tokens: positions in a sample.
    """

    def __init__(self, name: str, options: argparse.Namespace, tokens: int) -> None:
        width, layers, vocabulary = shape(name)
        heads = max(1, width // 64)
        torch.manual_seed(0)
        self.dtype = getattr(torch, options.dtype)
        build = _models.neox(width, layers, heads, vocabulary)
        self.model = build().to(options.device, self.dtype).eval()
        self.work = Work.transformer(width, layers, vocabulary, tokens)
        self.p = sum(parameter.numel() for parameter in self.model.parameters())
        self.device = options.device
        self.batch = (torch.randint(vocabulary, (options.batch_size, tokens), device=self.device),)
        self.computer = Factored(self.model, CausalLMOutput(), self.p, self.dtype, self.device)

    def plain(self) -> None:
        """A training step's forward and backward."""
        logits = self.model(input_ids=self.batch[0], use_cache=False).logits[:, :-1]
        labels = self.batch[0][:, 1:].flatten()
        nn.functional.cross_entropy(logits.float().flatten(0, 1), labels).backward()
        self.model.zero_grad(set_to_none=True)

    def collect(self, k: int, seed: int, batches: int = 1) -> Callable[[], Tensor]:
        """A call that collects compressed gradients of some batches."""
        projector = DropoutProjector.from_model(
            self.model, k, seed, device=self.device, dtype=self.dtype
        )

        def call() -> Tensor:
            parts = [
                projector.project(self.computer.compute_per_sample_grad(self.batch), 0)
                for _ in range(batches)
            ]
            return torch.cat(parts)

        return call


def peak_of(name: str, k: int, tokens: int, options: argparse.Namespace) -> Call:
    """What `peak` measures in a process of its own."""
    return Bench(name, options, tokens).collect(k, 0)


class Images:
    """A classifier with a batch of images, as `Bench`.

    Args:
        name: one of `IMAGES`.
        batch_size: samples in the batch.
    """

    def __init__(self, name: str, batch_size: int) -> None:
        torch.manual_seed(0)
        model = IMAGES[name]().eval()
        images = torch.randn(batch_size, 1, 28, 28)
        self.model, self.batch = model, (images, torch.randint(10, (batch_size,)))
        self.work = Work.of_model(model, images[:1])
        task = ImageClassificationModelOutput()
        self.computer = Factored(model, task, int(self.work.parameters))

    def collect(self, k: int) -> Call:
        """A call that collects a batch's compressed gradients."""
        projector = DropoutProjector.from_model(self.model, k)
        return lambda: projector.project(self.computer.compute_per_sample_grad(self.batch), 0)


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: _models.mlp(784, 1024, 1000, 64, 10),
    "ResNet-9": lambda: _models.ResNet9(1, 32),
}


def peak_of_images(name: str, k: int, batch_size: int) -> Call:
    """What `peak` measures in a process of its own."""
    return Images(name, batch_size).collect(k)


def memory(options: argparse.Namespace) -> list[Row]:
    """Peak memory of a batch, beside the estimate."""
    bare, k = Speed(0.0, 0.0, 0.0, 0.0), options.proj_dim
    longer = [t for t in options.lengths if t > options.tokens][:1]
    points = [(s, options.tokens) for s in options.shapes]
    points += [(options.shapes[len(options.shapes) // 2], t) for t in longer]
    rows = []
    for name, tokens in points:
        work = Work.transformer(*shape(name), tokens)
        arguments = (peak_of, name, k, tokens, options)
        size, used = options.batch_size, peak(*arguments, device=options.device)
        found = estimate(work, bare, size, k, batch_size=size, device=options.device,
                         bytes_of_weight=getattr(torch, options.dtype).itemsize)  # fmt: skip
        tensors = peak_of_tensors(*arguments) if options.device == "cpu" else used
        rows.append(_memory_row(name, tokens, size, work, used, tensors, found))
    for name in IMAGES if options.device == "cpu" and not options.quick else ():
        work, size = Images(name, 1).work, 2 * options.batch_size
        arguments_ = (peak_of_images, name, k, size)
        found = estimate(work, bare, size, k, batch_size=size)
        used, tensors = peak(*arguments_), peak_of_tensors(*arguments_)
        rows.append(_memory_row(name, 1, size, work, used, tensors, found))
    return rows


def _memory_row(
    name: str, tokens: int, size: int, work: Work, used: float | None, tensors: float | None,
    found: Estimate,
) -> Row:  # fmt: skip
    return {
        "shape": name, "p": work.parameters, "tokens": tokens, "batch": size,
        "megabytes": used, "predicted_megabytes": found.memory / 2**20,
        "tensor_megabytes": tensors, "predicted_tensor_megabytes": found.tensors / 2**20,
    }  # fmt: skip


def speed_of(point: tuple[str, int, int], options: argparse.Namespace) -> Speed:
    """The constants that the command would measure for a shape, k and length."""
    name, k, tokens = point
    width, _, vocabulary = shape(name)
    coordinates = k * DEFAULT_FOLD
    return calibrate(
        tokens,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        repeats=3 if options.quick else 5,
        width=width,
        vocabulary=min(vocabulary, 8192),
        batch_size=options.batch_size,
        density=coordinates / Work.transformer(*shape(name), tokens).parameters,
    )


def points_of(options: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """Shape, k, batches and length of each point that is timed."""
    middle = options.shapes[len(options.shapes) // 2]
    points: list[tuple[str, int, int, int]] = [
        *((s, options.proj_dim, 2, options.tokens) for s in options.shapes),
        *((middle, k, 2, options.tokens) for k in options.proj_dims),
        *((middle, options.proj_dim, b, options.tokens) for b in options.batches),
        *((middle, options.proj_dim, 2, t) for t in options.lengths),
    ]
    return list(dict.fromkeys(points))


def _mean(speeds: list[Speed]) -> Speed:
    return Speed(*(statistics.mean(parts) for parts in zip(*map(astuple, speeds), strict=True)))


def measure(options: argparse.Namespace) -> list[Row]:
    """Time all points, seed by seed."""
    cells: dict[tuple, list[float]] = {}
    points = points_of(options)
    benches = {(s, t): Bench(s, options, t) for s, _, _, t in points}
    with tqdm(total=options.seeds * options.rounds, desc="rounds") as bar:
        for seed in range(options.seeds):
            calls = {
                point: benches[point[0], point[3]].collect(point[1], seed, point[2])
                for point in points
            }
            for call in calls.values():
                call()  # checks and masks
            rounds: dict[tuple, list[float]] = {}
            for _ in range(options.rounds):
                for key, bench in benches.items():
                    rounds.setdefault((PLAIN, *key), []).append(timed(bench.plain, options.device))
                for point, call in calls.items():
                    rounds.setdefault(point, []).append(timed(call, options.device))
                bar.update()
            for key, seconds in rounds.items():
                cells.setdefault(key, []).append(statistics.median(seconds))
    rows = []
    for s, k, batches, t in points:
        bench = benches[s, t]
        samples = batches * options.batch_size
        plain = cells[PLAIN, s, t]
        rows.append(
            {
                "shape": s, "p": bench.p, "k": k, "n": samples, "tokens": t,
                "seconds": interval(cells[s, k, batches, t]),
                "plain": interval(plain),
                "of_plain": interval(
                    a / batches / b for a, b in zip(cells[s, k, batches, t], plain, strict=True)
                ),
            }
        )  # fmt: skip
    return rows


def exponent(rows: list[Row], over: str, what: str) -> Row:
    """Least-squares slope of log time over log size, with its interval over seeds."""
    x = [math.log(row[over]) for row in rows]
    count = len(rows[0][what]["values"])
    middle = statistics.mean(x)
    slopes = []
    for seed in range(count):
        y = [math.log(row[what]["values"][seed]) for row in rows]
        top = sum((a - middle) * b for a, b in zip(x, y, strict=True))
        slopes.append(top / sum((a - middle) ** 2 for a in x))
    return {"over": over, "of": what, "points": len(rows), "exponent": interval(slopes)}


def growth(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """Exponents in p, in n, in k and in the length."""
    middle = options.shapes[len(options.shapes) // 2]
    base = {"k": options.proj_dim, "n": 2 * options.batch_size, "tokens": options.tokens}
    found = []
    for over in ("p", "n", "k", "tokens"):
        fixed = {**base, "shape": middle}
        fixed.pop("shape" if over == "p" else over)
        here = [r for r in rows if all(r[name] == value for name, value in fixed.items())]
        if len(here) > 1:
            found.append(exponent(here, over, "seconds"))
            if over in ("p", "tokens"):
                found.append(exponent(here, over, "plain"))
    return found


def solving(options: argparse.Namespace, speed: Speed) -> list[Row]:
    """Time of Gram matrix and solve, beside the estimate."""
    rows = []
    for n, k in options.solves:
        x, targets = torch.randn(n, k), torch.randn(100, k)
        computer = DampedScoreComputer()
        seconds = []
        for _ in range(options.seeds):
            started = time.perf_counter()
            features = computer.get_x_xtx_inv(x, computer.get_xtx(x))
            computer.get_scores(features, targets, torch.zeros(n, 100))
            seconds.append(time.perf_counter() - started)
        work = Work.dense(1, 1)
        bare = Speed(0.0, 0.0, 0.0, speed.product, speed.entry)
        predicted = estimate(work, bare, n, k).scoring
        measured = interval(seconds)
        rows.append(
            {"n": n, "k": k, "seconds": measured, "predicted": predicted,
             "of_measured": predicted / measured["mean"]}
        )  # fmt: skip
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Draw time over p, n, k and length, measured and predicted."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    for panel, over in zip(panels, ("p", "n", "k", "tokens"), strict=True):
        others = [name for name in ("p", "n", "k", "tokens") if name != over]
        groups: dict[tuple, list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(row[name] for name in others), []).append(row)
        here = sorted(max(groups.values(), key=len), key=lambda r: r[over])
        x = [r[over] for r in here]
        panel.plot(x, [r["seconds"]["mean"] for r in here], "-o", label="measured")
        panel.plot(x, [r["predicted"] for r in here], "--s", label="estimate")
        if over in ("p", "tokens"):
            panel.plot(x, [2 * r["plain"]["mean"] for r in here], ":", label=PLAIN)
        panel.set(xscale="log", yscale="log", xlabel=over)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the study."""
    options_parser = parser(__doc__, "scale")
    options_parser.add_argument(
        "--shapes", nargs="+", default=["128x4x512", "192x6x512", "256x8x512", "384x8x512"]
    )
    options_parser.add_argument("--proj-dims", nargs="+", type=int, default=[512, 2048, 8192])
    options_parser.add_argument("--proj-dim", type=int, default=2048, help="for the other points")
    options_parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    options_parser.add_argument("--batch-size", type=int, default=16)
    options_parser.add_argument("--tokens", type=int, default=64)
    options_parser.add_argument("--lengths", nargs="+", type=int, default=[32, 64, 128])
    options_parser.add_argument("--rounds", type=int, default=3, help="of each seed")
    options_parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = options_parser.parse_args()
    options.solves = [(2000, 512), (2000, 2048), (4000, 1024)]
    if options.quick:
        options.shapes, options.proj_dims, options.proj_dim = (
            ["64x2x256", "128x2x256"],
            [64, 256],
            64,
        )
        options.batches, options.rounds, options.lengths = [1, 2], 2, [32]
        options.batch_size, options.tokens, options.solves = 4, 32, [(500, 128)]
    held = memory(options)
    rows: list[Row] = []
    points: list[tuple[str, int, int]] = []
    speeds: dict[tuple[str, int, int], list[Speed]] = {}
    # Before and after, so that a machine that slowed down meanwhile shows.
    for before in (True, False):
        if before:
            points = list(dict.fromkeys((s, k, t) for s, k, _, t in points_of(options)))
        for point in tqdm(points, desc="constants"):
            speeds.setdefault(point, []).append(speed_of(point, options))
        if before:
            rows = measure(options)
    for row in rows:
        width, layers, vocabulary = shape(row["shape"])
        work = Work.transformer(width, layers, vocabulary, row["tokens"])
        speed = _mean(speeds[row["shape"], row["k"], row["tokens"]])
        found = estimate(work, speed, row["n"], row["k"], batch_size=options.batch_size)
        row["predicted"] = found.collecting
        row["of_measured"] = found.collecting / row["seconds"]["mean"]
    names = [f"{r['shape']}, n = {r['n']}, k = {r['k']}, T = {r['tokens']}" for r in rows]
    of = dict(zip(names, rows, strict=True))
    show: dict[str, Callable[[Row], str]] = {
        "parameters": lambda r: f"{r['p'] / 1e6:.1f}M",
        "seconds": lambda r: shown(r["seconds"]),
        "of plain": lambda r: shown(r["of_plain"], 2),
        "estimate of measured": lambda r: f"{r['of_measured']:.2f}",
    }
    print(table(names, list(show), lambda n, c: show[c](of[n]), "collecting"))
    exponents = growth(rows, options)
    for row in exponents:
        print(f"{row['of']} grows with {row['over']} to the power {shown(row['exponent'], 2)}")
    for row in held:
        print(
            f"{row['shape']}, T = {row['tokens']}: {row['megabytes']:.0f} MB, estimate "
            f"{row['predicted_megabytes']:.0f}; of tensors {row['tensor_megabytes']:.0f}, estimate "
            f"{row['predicted_tensor_megabytes']:.0f}"
        )
    overall = _mean([speed for found in speeds.values() for speed in found])
    solves = solving(options, overall)
    for row in solves:
        print(
            f"scoring n = {row['n']}, k = {row['k']}: estimate {row['of_measured']:.2f} of measured"
        )
    write(
        options.out,
        options,
        rows=rows,
        memory=held,
        exponents=exponents,
        solving=solves,
        speeds=[
            {"shape": s, "k": k, "tokens": t, **vars(_mean(found))}
            for (s, k, t), found in speeds.items()
        ],
    )
    draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
