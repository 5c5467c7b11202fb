"""Run every study of docs/evidence.md at its small setting.

Each study goes on where it was interrupted; one that has finished in this round is not run again
until the round is complete. Results go to benchmarks/results, and docs/evidence.md is written anew.
A study runs on one thread, unless OMP_NUM_THREADS says otherwise. Those that compare times run
alone; the other two run side by side where there are two cores.

    python benchmarks/run_all.py                   # what `make benchmarks` does
    python benchmarks/run_all.py --quick           # minutes; results to benchmarks/cache/quick
    python benchmarks/run_all.py --only lds scale
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from _study import HERE

# Studies that may run at the same time, with the minutes that each takes on a core.
ROUNDS: tuple[dict[str, int], ...] = (
    {"lds": 15},
    {"mislabel": 10},
    {"crosssource": 24, "retrain": 15},
    {"scale": 6},
)
STUDIES = [name for together in ROUNDS for name in together]


def start(name: str, folder: Path, place: int, quick: bool) -> subprocess.Popen:
    """Start a study; its progress bar goes to line ``place``."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(folder / f"{name}.json")]
    settings = {"OMP_NUM_THREADS": "1", "TQDM_POSITION": str(place), **os.environ}
    return subprocess.Popen([*command, *(["--quick"] if quick else [])], env=settings)


def main() -> None:
    """Run the studies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute for each study")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=STUDIES)
    options = parser.parse_args()
    folder = HERE / "cache" / "quick" if options.quick else HERE / "results"
    finished = HERE / "cache" / f"finished{'-quick' if options.quick else ''}"
    finished.parent.mkdir(parents=True, exist_ok=True)
    done = set(finished.read_text().split()) if finished.is_file() else set()
    started = time.perf_counter()
    for together in ROUNDS:
        wanted = [name for name in together if name in options.only]
        for name in done.intersection(wanted):
            print(f"{name}: finished in this round already", flush=True)
        wanted = [name for name in wanted if name not in done]
        at_once = len(wanted) if (os.cpu_count() or 1) > 1 else 1
        for first in range(0, len(wanted), at_once or 1):
            names = wanted[first : first + at_once]
            for name in names:
                about = "" if options.quick else f", about {together[name]} minutes"
                print(f"\n{name}{about}", flush=True)
            begun = time.perf_counter()
            running = {
                name: start(name, folder, place, options.quick) for place, name in enumerate(names)
            }
            codes = {name: process.wait() for name, process in running.items()}
            done |= {name for name, code in codes.items() if code == 0}
            finished.write_text(" ".join(sorted(done)))
            minutes = (time.perf_counter() - begun) / 60
            print(f"{' and '.join(names)}: {minutes:.1f} minutes", flush=True)
            failed = ", ".join(f"{name} failed ({code})" for name, code in codes.items() if code)
            if failed:
                sys.exit(f"{failed}; what was measured is kept, run again to go on")
    if set(options.only) <= done:
        finished.unlink(missing_ok=True)
    print(f"all: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
    if not options.quick:
        subprocess.run([sys.executable, str(HERE / "document.py")], check=True)


if __name__ == "__main__":
    main()
