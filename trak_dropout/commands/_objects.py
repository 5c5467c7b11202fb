"""Objects of the user's own, named on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any


def load_object(name: str, option: str) -> Any:
    """Import what ``package.module:name`` or ``file.py:name`` stands for; functions are called.

    Args:
        name: where it is; without ``:name`` there would be nothing to take.
        option: the option that it was given for, for error messages.

    Returns:
        The object, or what it returns where it is a function or a class.

    Raises:
        ValueError: the module, the file or the name in it does not exist, or is to be called with
            arguments.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(
            f"{option}: give package.module:function or file.py:function, got {name!r}"
        )
    if place.endswith(".py"):
        module = _module_of_file(Path(place), option)
    else:
        if "" not in sys.path:
            sys.path.insert(0, "")  # as for ``python -m``: modules of the current directory
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there, what it imports is not
            raise ValueError(f"{option}: there is no module {place}") from error
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{option}: {place} has no {attribute}")
        found = getattr(found, part)
    # The class of a data set has its items' method, too.
    if not callable(found) or (hasattr(found, "__getitem__") and not isinstance(found, type)):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ValueError(
            f"{option}: {attribute} of {place} is called without arguments: {error}"
        ) from error
    return found()


def _module_of_file(file: Path, option: str) -> Any:
    if not file.is_file():
        raise ValueError(f"{option}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    # Beside the file may lie modules that it imports.
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module
