"""Run every study of docs/evidence.md at its small setting, one after the other.

Each study goes on where it was interrupted; one that has finished in this round is not run again
until the round is complete. Results go to benchmarks/results, and docs/evidence.md is written anew.

    python benchmarks/run_all.py                   # what `make benchmarks` does
    python benchmarks/run_all.py --quick           # minutes; results to benchmarks/cache/quick
    python benchmarks/run_all.py --only lds scale
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from _study import HERE

STUDIES = ("lds", "mislabel", "crosssource", "retrain", "scale")


def main() -> None:
    """Run the studies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute for each study")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    options = parser.parse_args()
    folder = HERE / "cache" / "quick" if options.quick else HERE / "results"
    finished = HERE / "cache" / f"finished{'-quick' if options.quick else ''}"
    finished.parent.mkdir(parents=True, exist_ok=True)
    done = set(finished.read_text().split()) if finished.is_file() else set()
    for name in options.only:
        if name in done:
            print(f"{name}: finished in this round already", flush=True)
            continue
        print(f"\n{name}", flush=True)
        started = time.perf_counter()
        command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(folder / f"{name}.json")]
        code = subprocess.run([*command, *(["--quick"] if options.quick else [])]).returncode
        if code:
            sys.exit(f"{name} failed ({code}); what it measured is kept, run again to go on")
        print(f"{name}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
        done.add(name)
        finished.write_text(" ".join(sorted(done)))
    if set(options.only) <= done:
        finished.unlink(missing_ok=True)
    if not options.quick:
        subprocess.run([sys.executable, str(HERE / "document.py")], check=True)


if __name__ == "__main__":
    main()
