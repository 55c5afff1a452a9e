"""Write files without losing finished work: append under a lock, or write a temporary file and rename it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from certify.errors import UserError
from certify.runs.identity import identity_digest

_SHARED, _PRIVATE = 0o666, 0o600  # file modes, before the umask
_PROBE = 0.05  # seconds
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none


def file_name(words: Sequence[str]) -> str:
    """Join words to a part of a file's name."""
    return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in word) for word in words)


def run_path(out: str | Path | None, folder: Path, name: str) -> Path:
    """Return the path of a run file: ``out`` if it ends in .jsonl, else ``name`` in the folder ``out`` or ``folder``.

    Raises:
        UserError: ``out`` has another suffix and is no folder, or is no path.
    """
    if not isinstance(out, str | os.PathLike | None):
        raise UserError(f"--out {out!r}: expected a file ending in .jsonl, or a folder")
    target = Path(out or folder)
    if target.suffix == ".jsonl" and out:
        return target
    if target.suffix and out and not str(out).endswith("/") and not target.is_dir():
        raise UserError(f"--out {out}: expected a file ending in .jsonl, or a folder (a new one: end it with /)")
    return target / name


def output_path(out: str | Path | None, words: Sequence[str], header: Mapping[str, Any]) -> Path:
    """Return :func:`run_path` for a name of these words and a digest of the settings, by default in ``runs/``."""
    return run_path(out, Path("runs"), f"{file_name(words)}-{identity_digest(header)}.jsonl")


def new_run_file(path: str | Path) -> Path:
    """Return the path of a derived run file, checked before anything is read or computed for it.

    Raises:
        UserError: not the name of a run file, or the file exists.
    """
    target = Path(path)
    if target.suffix != ".jsonl":
        raise UserError(f"--out {path}: expected a file ending in .jsonl")
    if target.exists():
        raise UserError(f"{path} is there already and is left alone: name another --out")
    return target


@contextlib.contextmanager
def replacing(path: str | Path, *, sync: bool = False, private: bool = False) -> Iterator[Path]:
    """Yield an empty file in the folder of ``path``, made if need be; after the block it replaces ``path``.

    If the block fails, the file is removed and ``path`` is untouched. Its name cannot be predicted and it is created
    exclusively, so that nobody who may write to the folder can put a link in its place.

    Args:
        path: to be replaced.
        sync: flush the file to the disk before it replaces ``path``.
        private: let nobody but its owner read it.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{secrets.token_hex(8)}.part")
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE if private else _SHARED))
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


def open_to_append(path: Path, *, private: bool = False) -> io.FileIO:
    """Open a file, made with its folder if need be, that this process alone writes to as long as it is open.

    Args:
        path: of the file.
        private: let nobody but its owner read a new file or a new folder, and refuse a symbolic link.

    Raises:
        UserError: it cannot be written, or another process is writing to it.
    """

    def open_file(name: str, flags: int) -> int:
        return os.open(name, flags | _NOFOLLOW, _PRIVATE) if private else os.open(name, flags, _SHARED)

    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file; name another --out")
        path.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        # unbuffered: nothing is left behind in a buffer when the disk is full
        file = io.FileIO(path, "ab", opener=open_file)
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP and path.is_symlink() else error.strerror
        raise UserError(f"cannot write {path}: {why}; name another --out") from None
    _lock(file, path)
    return file


def is_locked(path: Path) -> bool | None:
    """True if a process writes to a file that :func:`open_to_append` opened; None where that cannot be known."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PROBE)  # perhaps of is_locked, which holds the lock for a moment
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path} is being written by another process; wait for it or name another --out") from None
    except OSError:  # a file system without locks
        return
