"""Time and peak memory of compressing a batch of per-sample gradients.

Over p and k, in one run: ``DropoutProjector`` (pure, folded, unit, weighted) on a mapping of
gradients; TRAK's ``BasicProjector``, and ``CudaProjector`` and dattri's random projection and
random mask where they are installed and run; and two floors, an ``index_select`` of as many columns
from one matrix and a copy of all gradients. Times are medians over repeats of interleaved rounds;
memory is what a process of its own takes above its gradients.

    python benchmarks/projection.py            # a few minutes on 2 cores
    python benchmarks/projection.py --quick
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, peak
from matplotlib.figure import Figure
from torch import Tensor, nn
from trak.projectors import BasicProjector, CudaProjector

from trak_dropout import DropoutProjector

BATCH = 32
WIDTHS = {"1.9M": (784, 1024, 1000, 64, 10), "11M": (784, 2900, 2900, 96, 10)}
OURS = {
    "dropout, fold 1": {"proj_type": "dropout", "fold": 1},
    "dropout, default fold": {"proj_type": "dropout"},
    "unit dropout, fold 1": {"proj_type": "unit_dropout", "fold": 1},
    "weighted dropout, fold 1": {"proj_type": "weighted_dropout", "fold": 1},
}
FLOORS = ("index_select of k columns", "copy of all gradients")
RAW = FLOORS[0]


def network(widths: tuple[int, ...]) -> nn.Module:
    """Return an MLP."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def gradients(model: nn.Module, device: str) -> dict[str, Tensor]:
    """Return random per-sample gradients."""
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: torch.randn(BATCH, *shape, device=device) for name, shape in sizes.items()}


def method(name: str, model: nn.Module, k: int, device: str) -> Callable[[], Any] | None:
    """Return a call that compresses a batch by a method; None where it does not run."""
    grads = gradients(model, device)
    p = sum(parameter.numel() for parameter in model.parameters())
    if name in OURS:
        projector: Any = DropoutProjector.from_model(model, k, device=device, **OURS[name])
        projector.calibrate(grads)
        return lambda: projector.project(grads, 0)
    if name in FLOORS:
        matrix = torch.cat([grad.flatten(1) for grad in grads.values()], 1)
        columns = torch.randperm(p, device=device)[:k].sort().values
        return (lambda: matrix.index_select(1, columns)) if name == RAW else matrix.clone
    if name == "TRAK BasicProjector":
        projector = BasicProjector(p, k, 0, "normal", device)
        return lambda: projector.project(grads, 0)
    try:
        if name == "TRAK CudaProjector":
            projector = CudaProjector(p, k, 0, "rademacher", device, max_batch_size=BATCH)
            return lambda: projector.project(grads, 0)
        from dattri.func.projection import random_project

        kind = {"dattri Gaussian": "normal", "dattri random mask": "random_mask",
                "dattri SJLT": "sjlt"}[name]  # fmt: skip
        project = random_project(grads, BATCH, k, BATCH, 0, kind, device=device)
        project(grads)  # some fail only here
        return lambda: project(grads)
    except Exception as error:
        print(f"{name} does not run here: {type(error).__name__}: {error}"[:150])
        return None


NAMES = (*FLOORS, *OURS, "TRAK BasicProjector", "TRAK CudaProjector", "dattri Gaussian",
         "dattri SJLT", "dattri random mask")  # fmt: skip


def sized(name: str, size: str, k: int, device: str) -> Callable[[], Any] | None:
    """Return a call that compresses a batch for a model of a size; None where it does not run."""
    return method(name, network(WIDTHS[size]), k, device)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw times over methods."""
    cells = sorted({(row["p"], row["k"]) for row in rows}, key=str)
    figure = Figure(figsize=(2.8 * len(cells) + 1, 3.4), layout="constrained")
    panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for panel, (p, k) in zip(panels, cells, strict=True):
        here = [row for row in rows if (row["p"], row["k"]) == (p, k)]
        panel.barh([row["method"] for row in here], [1e3 * row["seconds"] for row in here])
        panel.set(title=f"p = {p}, k = {k}", xlabel="ms for a batch of 32", xscale="log")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="p = 1.9M, k = 2048, fewer repeats")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "projection.json"
    )
    options = parser.parse_args()
    repeats = 5 if options.quick else options.repeats
    rows: list[dict[str, Any]] = []
    for size in list(WIDTHS)[: 1 if options.quick else None]:
        model = network(WIDTHS[size])
        for k in (2048,) if options.quick else (512, 2048, 8192):
            calls = {}
            for name in NAMES:
                slow = name in ("TRAK BasicProjector", "dattri Gaussian")
                if slow and (size != "1.9M" or k != 2048) and options.device == "cpu":
                    continue  # seconds to minutes for a batch
                calls[name] = method(name, model, k, options.device)
            runnable = {name: call for name, call in calls.items() if call}
            slow = dict.fromkeys(("TRAK BasicProjector", "dattri Gaussian"), 2)
            seconds = interleaved(runnable, repeats, slow, options.device)
            del calls, runnable
            for name, times in seconds.items():
                rows.append(
                    {
                        "p": size,
                        "k": k,
                        "method": name,
                        "seconds": statistics.median(times),
                        "megabytes": peak(
                            sized, name, size, k, options.device, device=options.device
                        ),
                    }
                )
    print(f"\n{'p':>5} {'k':>5}  {'method':28} {'ms':>10} {'of index_select':>16} {'MB':>8}")
    for row in rows:
        raw = next(r for r in rows if (r["p"], r["k"], r["method"]) == (row["p"], row["k"], RAW))
        row["of_index_select"] = row["seconds"] / raw["seconds"]
        print(
            f"{row['p']:>5} {row['k']:>5}  {row['method']:28} {1e3 * row['seconds']:10.3f} "
            f"{row['of_index_select']:16.2f} {row['megabytes']:8.1f}"
        )
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({"batch": BATCH, "rows": rows}, indent=1) + "\n")
    draw(rows, options.out.with_suffix(".png"))
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
