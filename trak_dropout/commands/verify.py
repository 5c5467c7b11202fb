"""Check all of a store.

Reads every number: rows must be there, finite, and as they were written, weights and statistics
whole and those of the manifest. Nothing is changed. The exit code is 1 if there is a problem.
"""

from __future__ import annotations

import argparse

from trak_dropout.commands import inspect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    inspect.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    code = inspect.run(options, thorough=True)
    if code == 0 and not options.json:
        print("everything is as it was written")
    return code
