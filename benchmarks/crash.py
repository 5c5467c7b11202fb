"""Kill training runs with a collector at random moments, resume them, and compare the bits.

Each run trains a network with dropout and batch norm on digits, with a collector, and is killed
with SIGKILL again and again, at a moment drawn uniformly from the time that it takes. Half of the
kills are aimed at writing: they come in the middle of a file of the store that is being
replaced. It is started again each time, from the last checkpoint if there is one, until it ends.
Then the store and the trained weights must equal those of a run that nobody disturbed.

    python benchmarks/crash.py --runs 50

Runs are forked from a process that has imported everything, so that kills fall into training and
collecting. Writes benchmarks/results/crash.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trak_dropout import _files
from trak_dropout.lightning import GradientCollector

RESULTS = Path(__file__).parent / "results"
VOLATILE = ("seconds",)
MOMENTS = ("epoch", "checkpoint", "step")


# --- the run that is killed -----------------------------------------------------------------------


def train(out: Path, when: str, kill_in_write: int) -> None:
    """Train with a collector, from the last checkpoint on if there is one.

    Args:
        out: directory of store and checkpoints.
        when: the collector's moment.
        kill_in_write: die in the middle of this many-th file to be replaced; never when 0.
    """
    log = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:400] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    data = TensorDataset(images, torch.tensor(labels[:400]))

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
                nn.Linear(288, 10),
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            # Lightning restores neither random states nor the place in an epoch's data, so here
            # both follow from the step.
            step = self.trainer.global_step
            torch.manual_seed(step)
            first = 40 * (step % 10)
            x, y = data[first : first + 40]
            loss = nn.functional.cross_entropy(self(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-3)

    if kill_in_write:
        _die_in_write(_files, kill_in_write)
    torch.manual_seed(0)
    schedule = {"every_n_train_steps": 5} if when == "step" else {}
    saver = ModelCheckpoint(
        out / "ckpt", filename="{step}", save_top_k=-1, save_last=True,
        enable_version_counter=False,
        **({"every_n_train_steps": 4} if when == "step" else {}),
    )  # fmt: skip
    collector = GradientCollector(
        out / "store", proj_dim=256, batch_size=20, when=when, adopt=True, **schedule
    )
    last = out / "ckpt" / "last.ckpt"
    trainer = pl.Trainer(
        max_epochs=4, callbacks=[collector, saver], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Net()
    resume = last if last.is_file() else None
    trainer.fit(module, DataLoader(data, 40, shuffle=False), ckpt_path=resume)
    torch.save(module.state_dict(), out / "weights.pt")


def _die_in_write(files: Any, number: int) -> None:
    """Die when half of the number-th file to be replaced is written."""
    original, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            size = os.path.getsize(source)
            os.truncate(source, size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    files.os.replace = replace


# --- killing and comparing ------------------------------------------------------------------------


def start(out: Path, when: str, kill_in_write: int = 0) -> Any:
    """Start a run."""
    torch.set_num_threads(1)  # a process that has threads must not be forked
    run = multiprocessing.get_context("fork").Process(target=train, args=(out, when, kill_in_write))
    run.start()
    return run


def ended(run: Any, seconds: float | None = None) -> int | None:
    """Wait for a run; returns its exit code, or None where it takes longer."""
    run.join(seconds)
    return run.exitcode


def undisturbed(out: Path, when: str) -> float:
    """Run to the end; returns the seconds it took."""
    out.mkdir(parents=True)
    begun = time.monotonic()
    if ended(start(out, when)):
        raise RuntimeError(f"a run that nobody disturbed failed: {(out / 'log.txt').read_text()}")
    return time.monotonic() - begun


def killed(out: Path, when: str, seconds: float, rng: random.Random, most: int = 3) -> list[str]:
    """Kill a run at random moments until it has been killed ``most`` times, then let it end."""
    out.mkdir(parents=True)
    moments: list[str] = []
    while len(moments) < most:
        aimed = rng.random() < 0.5
        process = start(out, when, rng.randint(1, 14) if aimed else 0)
        code = ended(process, None if aimed else seconds * rng.uniform(0.1, 1.0))
        if code is None:
            process.kill()
            code = ended(process)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise RuntimeError(f"a resumed run failed: {(out / 'log.txt').read_text()[-3000:]}")
        moments.append(("while writing: " if aimed else "at random: ") + _state(out))
    if not (out / "weights.pt").is_file() and ended(start(out, when)):
        raise RuntimeError(f"a resumed run failed: {(out / 'log.txt').read_text()[-3000:]}")
    return moments


def _state(out: Path) -> str:
    """What a killed run left behind."""
    flags = sorted((out / "store").glob("*/_is_featurized.mmap"))
    if not flags:
        return "no collection"
    counts = []
    for file in flags:
        try:
            counts.append(int(np.load(file).sum()))
        except ValueError:
            counts.append(-1)
    return f"rows {counts}, {len(list((out / 'ckpt').glob('step*')))} checkpoints"


def differences(first: Path, second: Path) -> list[str]:
    """Say in what two runs' stores and weights differ."""
    found = []
    weights = [torch.load(out / "weights.pt") for out in (first, second)]
    found += [f"weights {n}" for n, t in weights[0].items() if not torch.equal(t, weights[1][n])]
    listed = [
        {str(f.relative_to(out)) for f in (out / "store").rglob("*") if f.is_file()}
        for out in (first, second)
    ]
    found += [f"only one has {name}" for name in sorted(listed[0] ^ listed[1])]
    for name in sorted(listed[0] & listed[1]):
        contents = [(out / name).read_bytes() for out in (first, second)]
        if name.endswith("manifest.json"):
            contents = [_steady(c, out) for c, out in zip(contents, (first, second), strict=True)]
        if contents[0] != contents[1]:
            found.append(name)
    return found


def _steady(manifest: bytes, out: Path) -> bytes:
    """A manifest without what differs between any two runs: its id, its directory, durations."""
    content = json.loads(manifest.decode().replace(str(out.resolve()), "OUT"))
    content["run"].pop("id")
    for facts in content["model_ids"].values():
        for name in VOLATILE:
            facts.pop(name, None)
    return json.dumps(content, sort_keys=True).encode()


def measure(runs: int, seed: int, moments: Sequence[str] = MOMENTS) -> dict[str, Any]:
    """Kill runs and compare each with one that nobody disturbed."""
    rng = random.Random(seed)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        seconds = {when: undisturbed(root / f"whole_{when}", when) for when in moments}
        for number in range(runs):
            when = moments[number % len(moments)]
            out = root / f"run_{number}"
            kills = killed(out, when, seconds[when], rng)
            different = differences(root / f"whole_{when}", out)
            results.append({"when": when, "kills": kills, "differences": different})
            print(f"{number:3} {when:10} killed {len(kills)}x: {different or 'bit-equal'}", kills)
    return {
        "runs": runs,
        "kills": sum(len(result["kills"]) for result in results),
        "bit_equal": sum(not result["differences"] for result in results),
        "results": results,
    }


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "crash.json")
    options = parser.parse_args()
    found = measure(options.runs, options.seed)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['bit_equal']} of {found['runs']} runs bit-equal after {found['kills']} kills")
    return 0 if found["bit_equal"] == found["runs"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
