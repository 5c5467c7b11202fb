"""A few runs of the crash benchmark: killed, resumed, and bit-equal in the end."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import crash


@pytest.mark.parametrize("when", ["epoch", "checkpoint"])
def test_killed_runs_end_bit_equal(tmp_path: Path, when: str) -> None:
    seconds = crash.undisturbed(tmp_path / "whole", when)
    # Seeds whose kills come in the middle of writing files, as others depend on the clock.
    kills = crash.killed(tmp_path / "killed", when, seconds, random.Random(4), most=2)
    assert kills
    assert crash.differences(tmp_path / "whole", tmp_path / "killed") == []


def test_differences_are_found(tmp_path: Path) -> None:
    import json

    import torch

    for name, value in (("a", 1.0), ("b", 2.0)):
        root = tmp_path / name
        (root / "store" / "0").mkdir(parents=True)
        torch.save({"w": torch.tensor(value)}, root / "weights.pt")
        (root / "store" / "0" / "grads.mmap").write_bytes(bytes([int(value)]))
        manifest = {"run": {"id": name}, "model_ids": {"0": {"seconds": value, "epoch": 0}}}
        (root / "store" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "b" / "store" / "extra.tmp").touch()
    assert crash.differences(tmp_path / "a", tmp_path / "b") == [
        "weights w",
        "only one has extra.tmp".replace("extra", "store/extra"),
        "store/0/grads.mmap",
    ]
