"""What importing the package brings along, and what it offers."""

import subprocess
import sys
from importlib.metadata import requires, version

import trak_dropout


def test_import_brings_neither_lightning_nor_matplotlib() -> None:
    code = (
        "import sys, trak_dropout; trak_dropout.plugin, trak_dropout.metrics;"
        "print([m for m in sys.modules if m.split('.')[0] in"
        " ('pytorch_lightning', 'lightning', 'matplotlib', 'jinja2', 'sklearn', 'scipy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented() -> None:
    for name in trak_dropout.__all__:
        assert getattr(trak_dropout, name).__doc__


def test_core_dependencies() -> None:
    assert version("trak_dropout") == trak_dropout.__version__
    core = [r for r in requires("trak_dropout") if "extra ==" not in r]
    names = {r.split(">")[0].split("<")[0].strip() for r in core}
    assert names == {"torch", "traker", "pytorch-lightning", "numpy"}
