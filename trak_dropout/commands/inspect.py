"""Say what is in a store.

Lists its settings, its checkpoints (complete or not, how many rows, how large, from which epoch
and file) and experiments, and the problems that show without reading all of it. Nothing is changed.
The exit code is 1 if there is a problem.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("store", type=Path, metavar="STORE", help="directory of the store")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, *, thorough: bool = False) -> int:
    """Run the command; returns the exit code."""
    from trak_dropout.inspection import inspect_store

    report = inspect_store(options.store, thorough=thorough)
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print("\n".join(report.lines()))
    return 1 if report.all_problems else 0
