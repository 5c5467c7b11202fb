"""Time and peak memory of compressed per-sample gradients of a batch, beside a training step.

For an MLP, ResNet-9 and a GPT-NeoX language model, in one run: (a) a plain forward and backward,
(b) TRAK's gradient computer with its BasicProjector (CudaProjector on a GPU), (c) TRAK's gradient
computer with DropoutProjector, (d) FactoredGradientComputer with DropoutProjector, over schemes, k
and fold. Times are medians over interleaved rounds; memory is what a process of its own takes above
model and batch.

    python benchmarks/featurize.py             # about ten minutes on 2 cores
    python benchmarks/featurize.py --quick     # the MLP, few rounds
    python benchmarks/featurize.py --device cuda --dtype bfloat16 --settings gpt2 pythia-1.4b
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _models
import torch
from _measure import Call, interleaved, peak, peak_of_tensors
from matplotlib.figure import Figure
from torch import Tensor, nn
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import BasicProjector, CudaProjector

from trak_dropout import CausalLMOutput, DropoutProjector, FactoredGradientComputer

PLAIN, THEIRS, SWAPPED = "plain forward + backward", "TRAK", "TRAK's computer + dropout"


@dataclass(frozen=True)
class Setting:
    """A model and a batch."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, ...]]
    task: Any
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    unit: str = "samples"


def mlp() -> nn.Module:
    """An MLP of 1.9M parameters."""
    return _models.mlp(784, 1024, 1000, 64, 10)


def images(count: int, channels: int, side: int) -> Callable[[], tuple[Tensor, ...]]:
    """Random images and labels."""
    return lambda: (torch.randn(count, channels, side, side), torch.randint(10, (count,)))


def tokens(count: int, length: int, vocabulary: int) -> Callable[[], tuple[Tensor, ...]]:
    """Random sequences."""
    return lambda: (torch.randint(vocabulary, (count, length)),)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean loss of a classification batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def next_token(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean loss of a batch of sequences."""
    logits = model(input_ids=batch[0], use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[0][:, 1:].flatten())


MARGIN, LM = ImageClassificationModelOutput(), CausalLMOutput()
SETTINGS = {
    "mlp": Setting(mlp, images(64, 1, 28), MARGIN, cross_entropy),
    "resnet9": Setting(_models.ResNet9, images(32, 3, 32), MARGIN, cross_entropy),
    "gpt-neox-10m": Setting(
        _models.neox(320, 8, 8, 512), tokens(16, 64, 512), LM, next_token, "sequences of 64"
    ),
    "gpt2": Setting(_models.gpt2, tokens(8, 512, 50257), LM, next_token, "sequences of 512"),
    "pythia-1.4b": Setting(
        _models.neox(2048, 24, 16, 50304), tokens(4, 512, 50304), LM, next_token, "sequences of 512"
    ),
}
ON_CPU = ("mlp", "resnet9", "gpt-neox-10m")
# Scheme, k and fold of what is measured: as many columns as coordinates, and the defaults.
OURS = {
    f"factored, {name}, k = {k}" + (f", fold {fold}" if fold > 1 else ""): (scheme, k, fold)
    for k, fold in ((2048, 1), (16384, 1), (2048, 16))
    for name, scheme in (
        ("unit", "unit_dropout"),
        ("uniform", "dropout"),
        ("weighted", "weighted_dropout"),
    )
}


def method(setting: str, name: str, device: str, dtype: torch.dtype) -> Call | None:
    """Return a call that does a batch by a method; None where it does not run."""
    torch.manual_seed(0)
    chosen = SETTINGS[setting]
    model = chosen.model().to(device, dtype).eval()
    batch = tuple(
        part.to(device, dtype if part.is_floating_point() else None) for part in chosen.batch()
    )
    if name == PLAIN:

        def step() -> None:
            chosen.loss(model, batch).backward()
            model.zero_grad(set_to_none=True)

        return step
    p = sum(parameter.numel() for parameter in model.parameters())
    scheme, k, fold = OURS.get(name, ("dropout", 2048, 16))
    computer: Any = FactoredGradientComputer if name in OURS else FunctionalGradientComputer
    try:
        if name == THEIRS and device == "cpu":
            projector: Any = BasicProjector(p, k, 0, "normal", device)
        elif name == THEIRS:
            projector = CudaProjector(p, k, 0, "rademacher", device, max_batch_size=8)
        else:
            projector = DropoutProjector.from_model(model, k, 0, scheme, device, fold=fold)
        gradients = computer(model, chosen.task, p, dtype, device)

        def features() -> Tensor:
            return projector.project(gradients.compute_per_sample_grad(batch), 0)

        features()
    except Exception as error:
        print(f"{setting}: {name} does not run here: {type(error).__name__}: {error}"[:200])
        return None
    return features


def measure(setting: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all methods in a setting."""
    dtype = getattr(torch, options.dtype)
    names = [PLAIN, THEIRS, SWAPPED, *OURS]
    if options.skip_trak or (options.device == "cpu" and setting not in ("mlp", "resnet9")):
        names.remove(THEIRS)  # minutes for a batch
    calls = {name: method(setting, name, options.device, dtype) for name in names}
    runnable = {name: call for name, call in calls.items() if call is not None}
    slow = {THEIRS: 1 if options.device == "cpu" else 5, SWAPPED: 5}
    seconds = interleaved(runnable, options.repeats, slow, options.device)
    del calls, runnable
    plain = statistics.median(seconds[PLAIN])
    count = len(SETTINGS[setting].batch()[0])
    rows = []
    for name, times in seconds.items():
        used = peak(method, setting, name, options.device, dtype, device=options.device)
        rows.append(
            {
                "setting": setting,
                "method": name,
                "seconds": statistics.median(times),
                "of_plain": statistics.median(times) / plain,
                "per_second": count / statistics.median(times),
                "megabytes": used,
                "tensor_megabytes": peak_of_tensors(method, setting, name, options.device, dtype)
                if name != THEIRS
                else None,
            }
        )
    base = next(row for row in rows if row["method"] == PLAIN)
    for row in rows:
        row["memory_of_plain"] = row["megabytes"] / base["megabytes"]
        if row["tensor_megabytes"] is not None:
            row["tensors_of_plain"] = row["tensor_megabytes"] / base["tensor_megabytes"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the measurements."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        unit = SETTINGS[setting].unit
        lines.append(
            f"\n{setting:38} {'ms':>10} {'of plain':>9} {'MB':>8} {'of plain':>9} "
            f"{'tensors of plain':>17}  {unit} a second"
        )
        lines += [
            f"{row['method']:38} {1e3 * row['seconds']:10.1f} {row['of_plain']:9.2f} "
            f"{row['megabytes']:8.0f} {row['memory_of_plain']:9.2f} "
            f"{row.get('tensors_of_plain', float('nan')):17.2f}  {row['per_second']:.0f}"
            for row in rows
            if row["setting"] == setting
        ]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory of each method beside the plain step."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure = Figure(figsize=(3.4 * len(settings) + 2, 6), layout="constrained")
    panels = figure.subplots(2, len(settings), sharey=True, squeeze=False)
    for column, setting in enumerate(settings):
        here = [row for row in rows if row["setting"] == setting]
        for panel, key, what in (
            (panels[0, column], "of_plain", "time"),
            (panels[1, column], "memory_of_plain", "peak memory"),
        ):
            panel.barh([row["method"] for row in here], [row[key] for row in here])
            panel.axvline(1, color="gray", linewidth=0.8, linestyle=":")
            panel.set(title=setting, xlabel=f"{what}, of a plain step", xscale="log")
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the benchmark."""
    warnings.filterwarnings("ignore", message="There is a performance drop")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the MLP, few rounds, without (b)")
    parser.add_argument("--settings", nargs="+", default=ON_CPU, choices=SETTINGS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--skip-trak", action="store_true", help="leave out TRAK's projector")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "featurize.json"
    )
    options = parser.parse_args()
    if options.quick:
        options.settings, options.repeats, options.skip_trak = ["mlp"], 5, True
    rows = [row for setting in options.settings for row in measure(setting, options)]
    print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"device": options.device, "dtype": options.dtype, "threads": torch.get_num_threads()}
    options.out.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    draw(rows, options.out.with_suffix(".png"))
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
