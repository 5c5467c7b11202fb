"""Top influences of many targets over many training samples: time and memory.

Writes random compressed gradients in TRAK's layout, float16, and finds the 100 most influential of
each of 1000 targets. Reported: the rate of the score product (everything beyond Gram matrix and
solve: reading, converting, multiplying, keeping the best) beside a plain ``torch.matmul`` of the
same size in memory, and the largest resident memory of the process that did it.

    python benchmarks/scoring.py               # n = 100 000, k = 4096, and n = 1 000 000, k = 1024
    python benchmarks/scoring.py --quick
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import resident

from trak_dropout import DampedScoreComputer, top_influences
from trak_dropout.store import FeatureFiles
from trak_dropout.streaming import gram_of


def write(root: Path, n: int, k: int, targets: int) -> None:
    """Write a store as a plain TRAKer leaves it."""
    (root / "0").mkdir(parents=True)
    about = {"JL dimension": k, "train set size": n}
    (root / "metadata.json").write_text(json.dumps(about))
    (root / "id_0.json").write_text(json.dumps({"0": {"is_featurized": 1, "is_finalized": 1}}))
    random = np.random.default_rng(0)
    for name, rows in (("grads", n), ("test_grads", targets)):
        file = np.lib.format.open_memmap(root / "0" / f"{name}.mmap", "w+", np.float16, (rows, k))
        for start in range(0, rows, 4096):
            shape = file[start : start + 4096].shape
            file[start : start + 4096] = random.standard_normal(shape, dtype=np.float32)
        file.flush()
    np.save((root / "0" / "out_to_loss.mmap").open("wb"), np.ones((n, 1), np.float16))


def run(root: str, n: int, k: int, targets: int, top: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    files, computer = FeatureFiles(root), DampedScoreComputer()
    few = files.file(0, "test_grads").rows()
    started = time.perf_counter()
    gram = gram_of(computer, files.file(0, "grads"))
    computer.cancellation(gram, computer.solve(computer.decompose(gram, n, k), few))
    del gram
    before = time.perf_counter() - started
    started = time.perf_counter()
    top_influences(files, "test", top)
    whole = time.perf_counter() - started
    return {
        "n": n,
        "k": k,
        "targets": targets,
        "gram_and_solve_seconds": before,
        "seconds": whole,
        "product_seconds": whole - before,
        "peak_rss_megabytes": resident("VmHWM"),
    }


def plain(n: int, k: int, targets: int) -> float:
    """Seconds of a plain product of that size, from a tenth of its rows."""
    x, t = torch.randn(n // 10, k), torch.randn(k, targets)
    x @ t
    started = time.perf_counter()
    x @ t
    return 10 * (time.perf_counter() - started)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="n = 20 000, k = 512")
    parser.add_argument("--folder", help="where to write the gradients; a temporary folder if none")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "scoring.json"
    )
    options = parser.parse_args()
    sizes = [(20_000, 512)] if options.quick else [(100_000, 4096), (1_000_000, 1024)]
    rows = []
    for n, k in sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write(Path(folder) / "store", n, k, 1000)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(run, (str(Path(folder) / "store"), n, k, 1000, 100))
        row["matmul_seconds"] = plain(n, k, 1000)
        row["rate_of_matmul"] = row["matmul_seconds"] / row["product_seconds"]
        rows.append(row)
        print(
            f"n = {n}, k = {k}: Gram and solve {row['gram_and_solve_seconds']:.0f} s, products "
            f"{row['product_seconds']:.1f} s at {row['rate_of_matmul']:.2f} of the rate of a plain "
            f"matmul, peak {row['peak_rss_megabytes']:.0f} MB resident",
            flush=True,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
