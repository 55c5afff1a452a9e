"""Files written so that nothing that was done is lost: appended under a lock, or written beside and renamed."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from certify.errors import UserError


@contextlib.contextmanager
def replacing(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """A file beside ``path`` to write in its folder, made if need be; after the block it replaces ``path``.

    Where writing fails it goes, and what was there is untouched. ``sync``: it is on the disk before it replaces.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.part")
    try:
        yield beside
        if sync:
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
        beside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_all(file: io.FileIO, line: bytes) -> None:
    """Write every byte: a file without a buffer may take a part of them at a time."""
    while line:
        line = line[file.write(line) :]


def open_to_append(path: Path) -> io.FileIO:
    """A file that this process alone writes to, as long as it is open; made with its folder where it is not there.

    Raises:
        UserError: it cannot be written, or another process is writing to it.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file; name another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: nothing is left behind in a buffer when the disk is full
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another --out") from None
    _lock(file, path)
    return file


def _lock(file: io.FileIO, path: Path) -> None:
    """Keep other processes from writing to an open file, as long as it is open.

    Raises:
        UserError: one is writing already; the file is closed.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two writers are not caught
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path} is being written by another process; wait for it or name another --out") from None
    except OSError:  # a file system without locks
        return
