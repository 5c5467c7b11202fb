"""Time and memory of drawing a mask over models as large as GPT-NeoX-6.9B: shapes only.

python benchmarks/drawing.py
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trak_dropout.masks import SCHEMES, Layout, draw_mask
from trak_dropout.statistics import GradientStatistics, as_matrix


def neox(width: int, layers: int, vocabulary: int = 50_432) -> Layout:
    """Return the parameters of a GPT-NeoX model."""
    block = {
        "input_layernorm.weight": (width,),
        "input_layernorm.bias": (width,),
        "post_attention_layernorm.weight": (width,),
        "post_attention_layernorm.bias": (width,),
        "attention.query_key_value.weight": (3 * width, width),
        "attention.query_key_value.bias": (3 * width,),
        "attention.dense.weight": (width, width),
        "attention.dense.bias": (width,),
        "mlp.dense_h_to_4h.weight": (4 * width, width),
        "mlp.dense_h_to_4h.bias": (4 * width,),
        "mlp.dense_4h_to_h.weight": (width, 4 * width),
        "mlp.dense_4h_to_h.bias": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_in.weight": (vocabulary, width)}
    for i in range(layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"final_layer_norm.weight": (width,), "final_layer_norm.bias": (width,)}
    shapes["embed_out.weight"] = (vocabulary, width)
    return Layout(tuple(shapes), tuple(shapes.values()))


MODELS = {"160M": neox(768, 12), "1.4B": neox(2048, 24), "6.9B": neox(4096, 32)}


def heavy_tailed(layout: Layout) -> GradientStatistics:
    """Return made-up statistics whose rows and columns differ by orders of magnitude."""
    random = np.random.default_rng(0)
    rows, columns = [], []
    for shape in layout.shapes:
        height, width = as_matrix(shape)
        rows.append(random.lognormal(0, 2, height))
        share = random.lognormal(0, 2, width)
        columns.append(share * rows[-1].sum() / share.sum())
    return GradientStatistics(tuple(rows), tuple(columns), 1)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proj-dim", type=int, default=16_384)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "drawing.json"
    )
    options = parser.parse_args()
    rows = []
    print(f"{'model':>6} {'p':>14}  {'scheme':18} {'fold':>4} {'seconds':>8} {'MB':>7}")
    for name, layout in MODELS.items():
        statistics = heavy_tailed(layout)
        for scheme in SCHEMES:
            for fold in (1, 16):
                arguments = (scheme, layout, options.proj_dim, 0, 0, fold, statistics)
                started = time.perf_counter()
                draw_mask(*arguments)
                seconds = time.perf_counter() - started
                tracemalloc.start()
                draw_mask(*arguments)
                megabytes = tracemalloc.get_traced_memory()[1] / 2**20
                tracemalloc.stop()
                rows.append(
                    {
                        "model": name,
                        "p": layout.grad_dim,
                        "scheme": scheme,
                        "fold": fold,
                        "seconds": seconds,
                        "megabytes": megabytes,
                    }
                )
                print(
                    f"{name:>6} {layout.grad_dim:>14,}  {scheme:18} {fold:>4} {seconds:8.3f} "
                    f"{megabytes:7.1f}",
                    flush=True,
                )
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(
        json.dumps({"proj_dim": options.proj_dim, "rows": rows}, indent=1) + "\n"
    )
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for scheme in SCHEMES:
        for fold, style in ((1, "-"), (16, "--")):
            here = [row for row in rows if (row["scheme"], row["fold"]) == (scheme, fold)]
            axes.plot(
                [row["p"] for row in here],
                [row["seconds"] for row in here],
                style,
                marker=".",
                label=f"{scheme}, fold {fold}",
            )
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="seconds to draw a mask")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(options.out.with_suffix(".png"), dpi=120)
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
