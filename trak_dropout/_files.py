"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_BLOCK = 2**22
_CANNOT_ALLOCATE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` when the block ends well.

    Until then, and after an exception or a crash, ``path`` is what it was.

    Args:
        path: the file to replace.

    Yields:
        A binary file beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` with ``content`` as JSON.

    Args:
        path: the file.
        content: what JSON can hold; NaN and infinities are refused.
    """
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block, of those that give the same file.

    The operating system lets go if a process dies. A block must not hold another one on the same
    file. Where the system or the file system has no such locks, nobody is kept out.

    Args:
        path: a file to lock, made if it is not there; it stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def allocate_matrix(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Make a file of zeros in NumPy's format whose room on the disk is taken at once.

    A full disk is an error here, where a file with holes would let a write into a memory map kill
    the process.

    Args:
        path: the file; one that is there is replaced.
        shape: of the array.
        dtype: of the array.

    Raises:
        OSError: the disk has no room for it; no file is left then.
    """
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        with open(path, "r+b") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except (AttributeError, OSError) as error:  # not on every system and file system
                if getattr(error, "errno", errno.ENOTSUP) not in _CANNOT_ALLOCATE:
                    raise
                start = np.load(path, mmap_mode="r").offset
                file.seek(start)
                for at in range(start, size, _BLOCK):
                    file.write(bytes(min(_BLOCK, size - at)))
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def checksum(path: Path) -> str:
    """Return the CRC-32 of a file, eight hexadecimal digits.

    Args:
        path: the file.
    """
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_BLOCK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def remove_leftovers(directory: Path) -> None:
    """Delete files that `replacing` was writing in a process that died.

    Args:
        directory: whose files to look at; its subdirectories are left alone.
    """
    for file in directory.glob("*.tmp"):
        match = re.fullmatch(r".+\.(\d+)\.tmp", file.name)
        if match and not _is_running(int(match[1])):
            file.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()
