"""Train on digits with flipped labels, find them, and write a page with pictures.

Trains a small network on scikit-learn's digits with a tenth of the labels flipped, collects
compressed gradients meanwhile, finds the flipped labels, and compares with TRAK's Gaussian
projection in the same run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXTRA = "demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_results"),
        help="directory for report.html, results.json and the store (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from trak_dropout.demo import run as run_demo

    run_demo(options.out, options.seed)
    return 0
