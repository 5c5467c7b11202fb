"""The ``trak-dropout`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trak_dropout import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the command; those of the process when None.

    Returns:
        The exit code: 0, or 1 when a package that the command needs is missing.
    """
    parser = argparse.ArgumentParser(
        prog="trak-dropout",
        description="Training-data attribution by dropout of gradient coordinates.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train on digits with flipped labels, find them, and write a page with pictures",
        description="Train a small network on scikit-learn's digits with a tenth of the labels "
        "flipped, collect compressed gradients meanwhile, find the flipped labels, and compare "
        "with TRAK's Gaussian projection in the same run.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo_results"),
        help="directory for report.html, results.json and the store (default: %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    options = parser.parse_args(arguments)
    return _demo(options.out, options.seed)


def _demo(out: Path, seed: int) -> int:
    try:
        from trak_dropout.demo import run
    except ModuleNotFoundError as error:
        print(
            f"trak-dropout demo needs {error.name}: pip install 'trak_dropout[demo]'",
            file=sys.stderr,
        )
        return 1
    run(out, seed)
    return 0
