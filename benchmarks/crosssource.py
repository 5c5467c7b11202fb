"""Finding the source of a text (the paper's third task), against peers.

A GPT-NeoX model of bytes is trained on a mixture of at least six real sources of text found on the
machine. For sequences of each source that it has not seen, the most influential training sequences
are looked up: how many come from the same source, of the first and of the first ten? Training
samples with large gradients have large scores for every target; each method also stands as
"normalized", its scores divided by the root of the training sample's self-influence at the same
damping (RelatIF, arXiv 2003.11630), which is the cosine where nothing is damped. Beside scores
of gradients stand similarities of the model's own embeddings (mean of its last hidden layer) and of
the embeddings of a pretrained encoder (MiniLM), and chance. Each seed trains another model and
draws another projection. Rows "3 checkpoints" add up the scores of the model as it was after each
third of its one training; the others have the trained model alone. The damping of each method is
the one that is best on average over the other seeds, for the first and for the first ten.

    python benchmarks/crosssource.py               # small setting, about 25 minutes
    python benchmarks/crosssource.py --quick       # a minute
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from _data import MissingError
from _measure import Measured
from _methods import Attribution, Method, Problem, methods, run
from _models import MiniLM, minilm_tokens
from _settings import load
from _study import (
    Cells,
    Row,
    chosen,
    cross_fitted,
    difference,
    fitted_to,
    interval,
    parser,
    shown,
    table,
    write,
)
from _training import checkpoints, stages_of
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

EMBEDDINGS = ("own embeddings", "own embeddings, 3 checkpoints", "MiniLM embeddings")
ORDER = (
    "dropout", "dropout, 3 checkpoints", "dropout, fold 1", "unit dropout", "weighted dropout",
    "Gaussian", "Gaussian, 3 checkpoints", "SJLT", "no compression", "kronfluence EK-FAC",
    "gradient dot product", *EMBEDDINGS, "random",
)  # fmt: skip
NORMALIZED = ", normalized"
_ENCODED: dict[str, Attribution] = {}  # MiniLM's similarities, by setting


def same_source(scores: np.ndarray, train: np.ndarray, targets: np.ndarray, top: int) -> float:
    """Share of each target's ``top`` most influential samples that are of its source."""
    best = np.argsort(-scores, axis=0, kind="stable")[:top]
    return float((train[best] == targets).mean())


def _similar(train: Tensor, targets: Tensor) -> np.ndarray:
    normal = torch.nn.functional.normalize
    return (normal(train) @ normal(targets).T).double().numpy()


def own_embeddings(problem: Problem, k: int) -> Attribution:
    """Cosine of the mean last hidden states of the model itself, its mean over checkpoints."""

    def embed(tokens: Tensor) -> Tensor:
        parts = tokens.split(problem.batch_size)
        with torch.no_grad():
            states = [
                torch.cat([m.gpt_neox(part).last_hidden_state.mean(1) for part in parts])
                for m in problem.models
            ]
        return torch.cat([torch.nn.functional.normalize(state) for state in states], 1)

    with Measured() as measured:
        value = _similar(embed(problem.setting.train[0]), embed(problem.setting.targets[0]))
    return Attribution({"none": value}, seconds=measured.seconds, megabytes=measured.megabytes)


def minilm_embeddings(problem: Problem, k: int) -> Attribution:
    """Cosine of a pretrained sentence encoder's embeddings, the same for all seeds."""
    if problem.setting.name in _ENCODED:
        return _ENCODED[problem.setting.name]
    model = MiniLM(1, layers=1).eval()

    def embed(tokens: Tensor) -> Tensor:
        texts = [bytes(row.tolist()).decode("ascii") for row in tokens]
        ids, mask = minilm_tokens(texts, 48)
        with torch.no_grad():
            return torch.cat(
                [model.embed(a, b) for a, b in zip(ids.split(200), mask.split(200), strict=True)]
            )

    with Measured() as measured:
        value = _similar(embed(problem.setting.train[0]), embed(problem.setting.targets[0]))
    found = Attribution({"none": value}, seconds=measured.seconds, megabytes=measured.megabytes)
    _ENCODED[problem.setting.name] = found
    return found


def measure(options: argparse.Namespace, cells: Cells) -> tuple[str, ...]:
    """Fill the cells; returns the names of the sources."""
    known = methods()
    known["own embeddings"] = Method("own embeddings", own_embeddings)
    known["MiniLM embeddings"] = Method("MiniLM embeddings", minilm_embeddings)
    setting = load("bytes", *((240, 42) if options.quick else ()), device=options.device)
    assert setting.origin is not None
    train, targets = (origin.numpy() for origin in setting.origin)
    todo = [
        (seed, method, k)
        for seed in range(options.seeds)
        for method in chosen(ORDER, options)
        for k in (options.proj_dims if known[stages_of(method)[0]].sized else [0])
        if not cells.all(seed=seed, method=method, k=k)
    ]
    for seed, method, k in tqdm(todo, desc="methods"):
        base, stages = stages_of(method)
        models = checkpoints(setting, seed, options.cache, stages)
        problem = Problem(setting, models, seed, batch_size=256)
        found = run(known[base], problem, k)
        shares: Row = {"seed": seed, "method": method, "k": k, "normalized": False, "top1": None}
        if found is None:
            cells.add(shares)
            continue
        for normalized, values in ((False, found.values), (True, found.normalized)):
            if not values:
                continue
            row = {**shares, "normalized": normalized}
            for top in (1, 10):
                row[f"top{top}"] = {
                    str(d): same_source(v, train, targets, top) for d, v in values.items()
                }
            row["by_source"] = {
                str(d): [
                    same_source(v[:, targets == s], train, targets[targets == s], 1)
                    for s in range(len(setting.sources))
                ]
                for d, v in values.items()
            }
            cells.add(row | {"seconds": found.seconds, "megabytes": found.megabytes})
    return setting.sources


def summarize(cells: list[Row], sources: tuple[str, ...]) -> list[Row]:
    """Mean and interval over seeds of each method and k."""
    rows = []
    measured = [c for c in cells if c["top1"]]
    for method, normalized, k in dict.fromkeys(
        (c["method"], c["normalized"], c["k"])
        for c in sorted(measured, key=lambda c: ORDER.index(c["method"]))
    ):
        here = [
            c for c in measured
            if (c["method"], c["normalized"], c["k"]) == (method, normalized, k)
        ]  # fmt: skip
        top1, top10 = ([c[key] for c in here] for key in ("top1", "top10"))
        rows.append(
            {
                "method": method + (NORMALIZED if normalized else ""),
                "k": k,
                "top1": interval(cross_fitted(top1)),
                "top10": interval(cross_fitted(top10)),
                "auto_top1": interval([a["auto"] for a in top1]) if "auto" in top1[0] else None,
                "by_source": {
                    source: interval(
                        fitted_to(
                            top1, [{d: v[i] for d, v in c["by_source"].items()} for c in here]
                        )
                    )
                    for i, source in enumerate(sources)
                },
                "seconds": statistics.median(c["seconds"] for c in here),
            }
        )
    return rows


def label(row: Row) -> str:
    """A row's name: its method, and k where it has one."""
    return f"{row['method']}, k = {row['k']}" if row["k"] else row["method"]


def compared(rows: list[Row]) -> list[Row]:
    """Our schemes minus others at the same k, or at none; gradients normalized alike."""
    return [
        {
            "scheme": ours["method"], "peer": other["method"], "k": ours["k"],
            "top1": difference(ours["top1"], other["top1"]),
            "top10": difference(ours["top10"], other["top10"]),
        }
        for ours in rows
        if "dropout" in ours["method"]
        for other in rows
        if "dropout" not in other["method"] and other["k"] in (0, ours["k"])
        if other["method"] in (*EMBEDDINGS, "random")
        or other["method"].endswith(NORMALIZED) == ours["method"].endswith(NORMALIZED)
    ]  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """Draw both shares of every method."""
    figure = Figure(figsize=(9, 0.32 * len(rows) + 1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = [label(r) for r in rows]
    for panel, key in zip(panels, ("top1", "top10"), strict=True):
        means = [r[key]["mean"] for r in rows]
        error = [max(0.0, r[key]["high"] - r[key]["mean"]) for r in rows]
        panel.barh(names, means, xerr=error)
        panel.set(xlabel=f"share of {key} from the same source", xlim=(0, 1))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the study."""
    options_parser = parser(__doc__, "crosssource")
    # A seed is cheap, and the intervals are what tells the methods apart.
    options_parser.set_defaults(seeds=7)
    options_parser.add_argument("--proj-dims", nargs="+", type=int, default=[2048])
    options = options_parser.parse_args()
    if options.quick:
        options.seeds, options.proj_dims = 2, [64]
    cells = Cells(options, "crosssource")
    try:
        sources = measure(options, cells)
    except MissingError as error:
        raise SystemExit(f"crosssource: {error}") from error
    rows = summarize(cells.used, sources)
    names = {label(r): r for r in rows}
    print(table(list(names), ["top1", "top10"], lambda n, c: shown(names[n][c]), "same source"))
    write(options.out, options, sources=sources, rows=rows, compared=compared(rows))
    draw(rows, options.out.with_suffix(".png"))
    cells.close()


if __name__ == "__main__":
    main()
