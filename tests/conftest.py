"""Settings for all tests."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from trak_dropout.cli import main

# Processes that are forked, as some tests' are, wait forever in a convolution where this asks for
# several threads; Lightning sets it to one where it is not set.
os.environ.pop("OMP_NUM_THREADS", None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` writes, and what it prints, as ``printed.txt``."""
    out = tmp_path_factory.mktemp("demo")
    (out / "report.html").write_text("of an earlier run")
    with open(out / "printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
        assert main(["demo", "--out", str(out)]) == 0
    return out
