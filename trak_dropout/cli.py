"""The ``trak-dropout`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from inspect import getdoc
from types import ModuleType

from trak_dropout import RankError, __version__
from trak_dropout.commands import demo, estimate, inspect, report, score, select, verify

COMMANDS: tuple[ModuleType, ...] = (demo, estimate, inspect, report, score, select, verify)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the command; those of the process when None.

    Returns:
        The exit code: 0; 1 when the command says in one line what is wrong, such as a store that
        is not there, is incomplete or damaged, or a package that is missing; 2 for arguments that
        cannot be understood.
    """
    parser = argparse.ArgumentParser(
        prog="trak-dropout",
        description="Training-data attribution by dropout of gradient coordinates.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        description = getdoc(module) or ""
        summary = description.partition("\n")[0].rstrip(".")
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=summary[:1].lower() + summary[1:],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(module=module)
    options = parser.parse_args(arguments)
    module = options.module
    del options.module  # a command may hand its options to other processes
    try:
        return int(module.run(options))
    except ModuleNotFoundError as error:
        extra = getattr(module, "EXTRA", None)
        if extra is None or (error.name or "").partition(".")[0] == "trak_dropout":
            raise
        message = f"needs {error.name}: pip install 'trak_dropout[{extra}]'"
    except (ValueError, OSError, RankError) as error:
        message = str(error)
    print(f"trak-dropout {options.command}: {message}", file=sys.stderr)
    return 1
