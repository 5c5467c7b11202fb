"""What a long computation has done so far, for another process to go on with."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from trak_dropout._safetensors import load_tensors, save_tensors
from trak_dropout._version import __version__

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing keeps two processes from doing the same at once
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".unfinished_"
_SECONDS = 30.0


class Progress:
    """A folder of intermediate results, each written whole or not at all.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[str, float] = {}

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return what was last kept under a name, if anything."""
        file = self.folder / f"{name}.safetensors"
        self._written[name] = time.monotonic()
        return load_tensors(file) if file.is_file() else None

    def due(self, name: str, seconds: float | None = None) -> bool:
        """Whether so much time has passed since it was loaded or kept that it is worth keeping."""
        seconds = _SECONDS if seconds is None else min(seconds, _SECONDS)
        return time.monotonic() - self._written[name] >= seconds

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, in place of those before."""
        save_tensors(self.folder / f"{name}.safetensors", tensors)
        self._written[name] = time.monotonic()

    def drop(self, name: str) -> None:
        """Forget what is kept under a name."""
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)


@contextmanager
def unfinished(
    root: Path,
    name: str,
    inputs: Any,
    arguments: Any,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Progress]:
    """Open the progress of a computation, of an interrupted one where there is any.

    The folder goes when the computation ends, by a result or by an error of its own, and stays when
    it is interrupted or killed. Those left behind by other inputs are removed.

    Args:
        root: the store's directory. Where it cannot be written, progress is kept in a temporary
            directory, and lost when interrupted.
        name: what is computed.
        inputs: JSON values that tell the files read from those once read under the same names.
        arguments: JSON values on which the result depends otherwise.
        rank: number of the process, of those that share the computation.
        world: how many there are.

    Yields:
        The progress.
    """
    now = f"{_PREFIX}{name}_{_digest([__version__, inputs])}"
    mine = f"{now}_{_digest(arguments)}"
    folder = root / f"{mine}_{rank}of{world}"
    lock = None
    try:
        for other in root.glob(f"{_PREFIX}{name}_*"):
            if not other.name.startswith(now):
                _remove(other)
        folder.mkdir(exist_ok=True)
        lock = _lock(folder)
    except OSError:
        pass
    if lock is None:  # not writable, or the same computation runs elsewhere
        with tempfile.TemporaryDirectory(prefix="trak_dropout_") as temporary:
            yield Progress(Path(temporary))
        return
    try:
        yield Progress(folder)
    except Exception:
        lock.close()
        _remove(folder)
        raise
    except BaseException:
        lock.close()
        raise
    lock.close()
    for left in root.glob(f"{mine}_*"):
        _remove(left)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _remove(folder: Path) -> None:
    """Remove a folder unless some process has it."""
    lock = _lock(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _lock(folder: Path) -> BinaryIO | None:
    """Take a folder for this process, if no other has it."""
    try:
        file = (folder / "lock").open("wb")
    except OSError:
        return None
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
    return file
