"""Image files of a folder or an archive, in their classes; everything that is not read is counted and named."""

from __future__ import annotations

import os
import shlex
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from certify.errors import UserError
from certify.images.decode import SUFFIXES
from certify.images.items import Unread

_TEST_SPLITS = ("test", "val", "valid", "validation")


def list_folder(root: Path) -> tuple[dict[str, Path], Unread]:
    """Image files below a folder by their relative path; links to folders are followed.

    A link to one of the folders it lies in is not followed: it has no end.

    Raises:
        UserError: a folder that cannot be read.
    """
    files: dict[str, Path] = {}
    unread = Unread()
    pending: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(root), "", frozenset())]
    while pending:
        folder, prefix, above = pending.pop()
        try:
            about = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            kinds = [_kind(entry) for entry in entries]
        except OSError as error:
            raise UserError(
                f"cannot list {folder}: {error.strerror}; make it readable: chmod -R u+rX {shlex.quote(str(root))}"
            ) from None
        above |= {(about.st_dev, about.st_ino)}
        below = []
        for entry, kind in zip(entries, kinds, strict=True):
            key = prefix + entry.name
            if kind == "folder" and not _hidden(entry.name):
                inside = entry.stat()
                if (inside.st_dev, inside.st_ino) in above:
                    unread.add("link{s} back to a folder around it", key)
                else:
                    below.append((entry.path, f"{key}/", above))
            elif (reason := _reason(entry.name, "" if kind == "file" else kind)) is not None:
                unread.add(reason, key)
            else:
                files[key] = Path(entry.path)
        pending += reversed(below)
    return files, unread


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # links in a circle
        if not entry.is_symlink():
            raise
    return "dangling link{s}" if entry.is_symlink() else "special file{s}"


def list_archive(archive: zipfile.ZipFile, where: str, folder: str = "") -> tuple[dict[str, zipfile.ZipInfo], Unread]:
    """Image files of an archive, or of a folder in it, by their path, with slashes where Windows wrote backslashes.

    Raises:
        UserError: no such folder.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    unread = Unread()
    for key, info in _members(archive, where, folder):
        kind = "link{s} inside the archive" if stat.S_ISLNK(info.external_attr >> 16) else ""
        if (reason := _reason(key, kind)) is not None:
            unread.add(reason, key)
            continue
        if key in members:
            unread.add("overwritten member{s}", key)
        members[key] = info
    return members, unread


def _members(archive: zipfile.ZipFile, where: str, folder: str) -> list[tuple[str, zipfile.ZipInfo]]:
    """Every file below a folder by its path there; folders around everything may be left out of the folder's path."""
    named = [(info.filename.replace("\\", "/"), info) for info in archive.infolist()]
    members = [("/".join(p for p in n.split("/") if p not in ("", ".")), i) for n, i in named if not n.endswith("/")]
    around = ""
    while folder:
        prefix = f"{around}{folder}/"
        if inside := [(key.removeprefix(prefix), info) for key, info in members if key.startswith(prefix)]:
            return inside
        tops = {key[len(around) :].partition("/")[:2] for key, _ in members if not _hidden(key)}
        if len(tops) != 1 or not all(slash for _, slash in tops):
            folders = sorted(top for top, slash in tops if slash)
            raise UserError(f"no folder {folder!r} in {where}; expected one such as {', '.join(folders[:4]) or 'none'}")
        around += "".join(*tops)
    return members


def _reason(key: str, kind: str) -> str | None:
    """Why this file is not read, as a noun; None for an image."""
    if _hidden(key):
        return "hidden file{s}"
    suffix = PurePosixPath(key).suffix.lower()
    if kind or suffix in SUFFIXES:
        return kind or None
    return f"{suffix} file{{s}}" if suffix else "file{s} without a suffix"


def _hidden(key: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in key.split("/"))


@dataclass(frozen=True)
class Arrangement:
    """How image files lie in folders.

    Attributes:
        keys: of the files, sorted.
        strip: folders around all of them, which belong to no id.
        classes: whether the folder of each file is its class.
        strays: what is wrong with class folders beside which other images lie; empty when nothing is.
    """

    keys: Sequence[str]
    strip: int
    classes: bool
    strays: str = ""

    def id(self, key: str) -> str:
        """The stable id of a file."""
        return "/".join(key.split("/")[self.strip :])

    def name(self, key: str) -> str | None:
        """The class of a file, or None."""
        return key.split("/")[-2] if self.classes else None

    @property
    def names(self) -> tuple[str, ...] | None:
        """All classes, sorted; None where folders are no classes."""
        return tuple(sorted({key.split("/")[-2] for key in self.keys})) if self.classes else None


def arrange(keys: Collection[str], where: str, unread: Unread) -> Arrangement:
    """Files as one flat folder or as one folder a class, without the folders around them.

    Raises:
        UserError: no files, or folders of folders: splits beside each other, say.
    """
    if not keys:
        there = f"; it holds {', '.join(unread.summary())}" if unread.reasons else ""
        raise UserError(f"no images in {where}; expected files ending in {', '.join(SUFFIXES)}{there}")
    ordered = sorted(keys, key=lambda key: key.split("/"))
    strip, depths = _depths(ordered)
    if set(depths) in ({1}, {2}):
        return Arrangement(ordered, strip, classes=set(depths) == {2})
    parts = [key.split("/") for key in ordered]
    if 2 * depths[2] > len(keys):  # class folders
        strays = ["/".join(p[strip:]) for p in parts if len(p) - strip != 2]
        shown = ", ".join(strays[:3]) + ", ..." * (len(strays) > 3)
        folders = len({p[strip] for p in parts if len(p) - strip == 2})
        problem = (
            f"{len(strays):,} of {len(keys):,} images in {where} lie outside its {folders:,} class folders ({shown})"
        )
        return Arrangement(ordered, strip, classes=False, strays=problem)
    below: dict[str, list[str]] = {}
    for p in parts:
        if len(p) - strip > 1:
            below.setdefault(p[strip], []).append("/".join(p[strip + 1 :]))
    sound = [top for top, inside in below.items() if set(_depths(inside)[1]) in ({1}, {2})]
    advised = next((top for top in _TEST_SPLITS if top in sound), (sound or list(below))[0])
    path = "/".join([where.rstrip("/"), *parts[0][:strip], advised])
    lie = "at several depths" if len(depths) > 1 else "in several folders of folders"
    raise UserError(
        f"images in {where} lie {lie} (under {', '.join(list(below)[:4])}{', ...' if len(below) > 4 else ''}); "
        f"expected one flat folder or one folder a class: name one of them, such as --data {shlex.quote(path)}"
    )


def _depths(ordered: Sequence[str]) -> tuple[int, Counter[int]]:
    """How many folders lie around all files (but for their classes), and how many files lie how deep below those."""
    parts = [key.split("/") for key in ordered]
    depth, shallowest = (choose(map(len, parts)) for choose in (max, min))
    strip = 0
    while depth - strip > 2 and parts[0][strip] == parts[-1][strip] and shallowest > strip + 1:
        strip += 1
    return strip, Counter(len(p) - strip for p in parts)
