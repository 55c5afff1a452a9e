"""Sources of image files in folders and archives; class folders become labels, and files not read are counted."""

from __future__ import annotations

import functools
import os
import shlex
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from certify.errors import ImageError, UserError
from certify.images.decode import MAX_BYTES, SUFFIXES
from certify.images.items import Item, Source, Unread
from certify.models.signatures import ZIP, describe_other_kind, name_content

_TEST_SPLITS = ("test", "val", "valid", "validation")


def read_file(path: Path) -> bytes:
    """Return the content of an image file.

    Raises:
        ImageError: over the size limit, or unreadable.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(f"is a file of {path.stat().st_size:,} bytes; the limit is {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from None


def open_folder(root: Path) -> Source:
    """Return the image files of a folder, either directly in it or in one subfolder per class.

    Raises:
        UserError: no images, an unsupported folder layout, or an unreadable folder.
    """
    files, unread = _list_folder(root)
    layout = _arrange(files, str(root), unread)
    items = [Item(layout.id(key), functools.partial(read_file, files[key]), layout.name(key)) for key in layout.keys]
    return Source(root.resolve().name, items, names=layout.names, strays=layout.strays, unread=unread.summary())


def open_zip(path: Path, folder: str = "") -> Source:
    """Return the image files of a zip file, or of a folder in it.

    Raises:
        UserError: not a zip file, encrypted, no such folder, no images, or an unsupported folder layout.
    """
    try:
        archive = zipfile.ZipFile(path)  # stays open: members are read one at a time, nothing is extracted
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        why = describe_other_kind(path, "a zip file") or f"is not a readable zip file ({_why_unreadable(path, error)})"
        raise UserError(f"{path} {why}") from None
    members, unread = _list_archive(archive, str(path), folder)
    if any(info.flag_bits & 1 for info in members.values()):
        raise UserError(f"{path} is encrypted with a password; unpack it (unzip {path}) and name the folder")
    where, name = (f"{at}/{folder}" if folder else str(at) for at in (path, path.name))

    def read(info: zipfile.ZipInfo) -> bytes:
        if info.file_size > MAX_BYTES:
            raise ImageError(f"unpacks to {info.file_size:,} bytes; the limit is {MAX_BYTES:,}")
        try:
            with archive.open(info) as member:
                return member.read(MAX_BYTES + 1)
        except Exception as error:  # each compression method has its own errors: BadZipFile, zlib.error, lzma.LZMAError
            raise ImageError(f"cannot be unpacked ({error})") from None

    def item(key: str) -> Item:
        info = members[key]
        checksum = f"{info.CRC:08x}-{info.file_size}"
        return Item(layout.id(key), functools.partial(read, info), layout.name(key), checksum)

    layout = _arrange(members, where, unread)
    items = [item(key) for key in layout.keys]
    one = layout.names is not None and len(layout.names) == 1
    return Source(name, items, names=layout.names, wrapped=one, strays=layout.strays, unread=unread.summary())


def _why_unreadable(path: Path, error: Exception) -> str:
    """Return why an archive cannot be read; one with a zip file's header but no directory is truncated."""
    with path.open("rb") as file:
        begins = name_content(file.read(8)) == ZIP
    cut_off = begins and not zipfile.is_zipfile(path)
    return "it is cut off: the list of its files, at its end, is missing; download it again" if cut_off else str(error)


def _list_folder(root: Path) -> tuple[dict[str, Path], Unread]:
    """Return the image files below a folder by relative path, and the content not read.

    Links to folders are followed, except links to a parent folder, which would recurse without end.

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
    """Return ``folder``, ``file``, or a noun for any other kind of directory entry."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # circular links
        if not entry.is_symlink():
            raise
    return "dangling link{s}" if entry.is_symlink() else "special file{s}"


def _list_archive(archive: zipfile.ZipFile, where: str, folder: str) -> tuple[dict[str, zipfile.ZipInfo], Unread]:
    """Return the image files of an archive, or of a folder in it, by path, and the content not read.

    Windows backslashes become slashes.

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
    """Return every file below ``folder`` with its relative path; ``folder`` may omit enclosing single folders."""
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
            expected = f"expected one such as {', '.join(folders[:4])}" if folders else "it holds no folders"
            raise UserError(f"no folder {folder!r} in {where}; {expected}")
        around += "".join(*tops)
    return members


def _reason(key: str, kind: str) -> str | None:
    """Return why a file is not read, as a noun; None for an image."""
    if _hidden(key):
        return "hidden file{s}"
    suffix = PurePosixPath(key).suffix.lower()
    if kind or suffix in SUFFIXES:
        return kind or None
    return f"{suffix} file{{s}}" if suffix else "file{s} without a suffix"


def _hidden(key: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in key.split("/"))


@dataclass(frozen=True)
class _Layout:
    """Arrangement of image files in folders.

    Attributes:
        keys: relative paths, sorted.
        strip: number of enclosing folders common to all files, which ids leave out.
        classes: whether the folder of each file is its class.
        strays: error message if images lie outside the class folders; else empty.
    """

    keys: Sequence[str]
    strip: int
    classes: bool
    strays: str = ""

    def id(self, key: str) -> str:
        """Return the stable id of a file."""
        return "/".join(key.split("/")[self.strip :])

    def name(self, key: str) -> str | None:
        """Return the class of a file, or None."""
        return key.split("/")[-2] if self.classes else None

    @property
    def names(self) -> tuple[str, ...] | None:
        """All classes, sorted; None where folders are not classes."""
        return tuple(sorted({key.split("/")[-2] for key in self.keys})) if self.classes else None


def _arrange(keys: Collection[str], where: str, unread: Unread) -> _Layout:
    """Recognise files as one flat folder or one folder per class, ignoring common enclosing folders.

    Raises:
        UserError: no files, or deeper nesting, such as a training and a test folder side by side.
    """
    if not keys:
        there = f"; it holds {', '.join(unread.summary())}" if unread.reasons else ""
        raise UserError(f"no images in {where}; expected files ending in {', '.join(SUFFIXES)}{there}")
    ordered = sorted(keys, key=lambda key: key.split("/"))
    strip, depths = _depths(ordered)
    if set(depths) in ({1}, {2}):
        return _Layout(ordered, strip, classes=set(depths) == {2})
    parts = [key.split("/") for key in ordered]
    if 2 * depths[2] > len(keys):  # class folders
        strays = ["/".join(p[strip:]) for p in parts if len(p) - strip != 2]
        shown = ", ".join(strays[:3]) + ", ..." * (len(strays) > 3)
        folders = len({p[strip] for p in parts if len(p) - strip == 2})
        problem = (
            f"{len(strays):,} of {len(keys):,} images in {where} lie outside its {folders:,} class folders ({shown})"
        )
        return _Layout(ordered, strip, classes=False, strays=problem)
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
        f"expected one flat folder or one folder per class: choose one, such as --data {shlex.quote(path)}"
    )


def _depths(ordered: Sequence[str]) -> tuple[int, Counter[int]]:
    """Return the number of common enclosing folders (classes excluded) and the count of files at each depth below."""
    parts = [key.split("/") for key in ordered]
    depth, shallowest = (choose(map(len, parts)) for choose in (max, min))
    strip = 0
    while depth - strip > 2 and parts[0][strip] == parts[-1][strip] and shallowest > strip + 1:
        strip += 1
    return strip, Counter(len(p) - strip for p in parts)
