"""Write a store's report: one HTML page with the suspect samples, influences and its health.

Reads what the callback or a TRAKer collected, and fetches nothing. With --data the page shows the
samples, too: name a function that returns the training set (items by number, in the order in
which gradients were collected), or trak_dropout.report.Examples for class names, known labels, a
tokenizer or a render function of your own:

    trak-dropout report trak_store --data my_project.data:train_set
    trak-dropout report trak_store --data data.py:train --targets test=data.py:test --target 3 17
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trak_dropout.curvature import CURVATURES

EXTRA = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("store", type=Path, metavar="STORE", help="directory of the store")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        metavar="OBJECT",
        help="the training set, as package.module:function or file.py:function",
    )
    parser.add_argument(
        "--targets",
        metavar="EXPERIMENT[=OBJECT]",
        help="the experiment whose targets are explained, and their data set",
    )
    parser.add_argument(
        "--target",
        type=int,
        nargs="+",
        metavar="NUMBER",
        help="targets to explain (default: the first eight)",
    )
    parser.add_argument(
        "--model-ids", metavar="M", type=int, nargs="+", help="checkpoints (default: all complete)"
    )
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument("--summary", default="", help="a paragraph below the heading")
    parser.add_argument(
        "--gallery",
        type=int,
        default=10_000,
        help="how many of the most suspect samples the page holds (default: %(default)s)",
    )
    parser.add_argument(
        "--damping", default=None, help="relative damping, a number or auto (default: auto)"
    )
    parser.add_argument(
        "--curvature",
        choices=CURVATURES,
        default="output",
        help="gradients of which the inverted matrix is made (default: output, as TRAK has it)",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from trak_dropout.attribution import open_store
    from trak_dropout.report import write
    from trak_dropout.store import MANIFEST, FeatureFiles

    has_manifest = (options.store / MANIFEST).is_file()
    plain = not has_manifest and (options.store / "metadata.json").is_file()
    store = FeatureFiles(options.store) if plain else open_store(options.store)
    exp_name, _, targets = (options.targets or "").partition("=")
    damping = options.damping
    if damping not in (None, "auto"):
        try:
            damping = float(damping)
        except ValueError:
            raise ValueError(f"--damping: a number or auto, got {damping!r}") from None
    found = write(
        store,
        options.out,
        _examples(options.data, "--data"),
        exp_name=exp_name or None,
        targets=_examples(targets, "--targets"),
        chosen=options.target,
        title=options.title,
        summary=options.summary,
        gallery=options.gallery,
        model_ids=options.model_ids,
        damping=damping,
        curvature=options.curvature,
        progress=sys.stderr.isatty(),
    )
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for warning in found["warnings"]:
            print(f"note: {warning}", file=sys.stderr)
        print(f"{found['page']} ({found['bytes'] / 1e6:.1f} MB)")
    return 0


def _examples(name: str | None, option: str) -> Any:
    """The data set that an option names; what is none is the command line's mistake."""
    from trak_dropout.commands._objects import load_object
    from trak_dropout.report import Examples

    if not name:
        return None
    found = load_object(name, option)
    try:
        return found if isinstance(found, Examples) else Examples(found)
    except TypeError as error:
        raise ValueError(f"{option} {name}: {error}") from error
