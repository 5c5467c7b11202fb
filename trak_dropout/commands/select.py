"""Choose training samples by their influence on targets.

Takes influences from one of: a matrix in a .npy file, training samples by targets; a store and an
experiment in it; or an InfluenceNetwork with embeddings of training samples and targets. Prints
the numbers of the chosen samples, one per line, or writes them to --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--influences", type=Path, metavar="NPY", help="matrix (n, m)")
    parser.add_argument("--store", type=Path, metavar="DIR", help="a store, with --experiment")
    parser.add_argument("--experiment", metavar="NAME", help="the store's targets to help")
    parser.add_argument(
        "--network",
        type=Path,
        metavar="FILE",
        help="what InfluenceNetwork.save wrote, with --sources and --targets",
    )
    parser.add_argument("--sources", type=Path, metavar="NPY", help="embeddings (n, d)")
    parser.add_argument("--targets", type=Path, metavar="NPY", help="embeddings (m, d)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--share", type=float, default=0.3, help="share to choose (default: 0.3)")
    size.add_argument("--count", type=int, help="how many to choose instead")
    parser.add_argument(
        "--method",
        choices=["facility_location", "top"],
        default="facility_location",
        help="cover every target by its best sample, or take the largest mean influences "
        "(default: facility_location)",
    )
    parser.add_argument(
        "--given", type=Path, metavar="NPY", help="numbers of samples that are there anyway"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="facility location as in the paper: do not put off samples that harm on the whole",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write; .npy or text")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    import numpy as np

    from trak_dropout._files import replacing
    from trak_dropout.surrogate import select

    chosen = select(
        _influences(options),
        options.share,
        count=options.count,
        method=options.method,
        given=() if options.given is None else _array(options.given),
        helpful_first=not options.plain,
    )
    if options.out is None:
        print("\n".join(map(str, chosen.tolist())))
        return 0
    with replacing(options.out) as file:
        if options.out.suffix == ".npy":
            np.save(file, chosen, allow_pickle=False)
        else:
            file.write("".join(f"{i}\n" for i in chosen.tolist()).encode())
    print(f"{len(chosen)} training samples, first {chosen[:5].tolist()}, written to {options.out}")
    return 0


def _influences(options: argparse.Namespace) -> Any:
    """The matrix that the options name, or predictions that stand for one."""
    from trak_dropout import open_store
    from trak_dropout.surrogate import InfluenceNetwork, PredictedInfluences, sampled_influences

    ways = {
        "--influences": (options.influences,),
        "--store and --experiment": (options.store, options.experiment),
        "--network, --sources and --targets": (options.network, options.sources, options.targets),
    }
    begun = {name: given for name, given in ways.items() if any(x is not None for x in given)}
    if len(begun) != 1 or any(x is None for given in begun.values() for x in given):
        raise ValueError(f"give exactly one of: {'; '.join(ways)}")
    if options.influences is not None:
        return _array(options.influences)
    if options.store is not None:
        return sampled_influences(open_store(options.store), options.experiment)
    return PredictedInfluences(
        InfluenceNetwork.load(options.network), _array(options.sources), _array(options.targets)
    )


def _array(path: Path) -> Any:
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array in NumPy's format: {error}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays; write one of them with numpy.save")
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds {found.dtype}, expected real numbers")
    return found
