"""Folders and archives of image files as sources; a file is read when its image is wanted."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path

from certify.errors import ImageError, UserError
from certify.images.decode import MAX_BYTES
from certify.images.items import Item, Source
from certify.images.listing import arrange, list_archive, list_folder
from certify.models.placeholders import describe_other_kind


def read_file(path: Path) -> bytes:
    """The content of an image file.

    Raises:
        ImageError: larger than the limit, or it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(f"is a file of {path.stat().st_size:,} bytes; the limit is {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from None


def open_folder(root: Path) -> Source:
    """The image files below a folder: in the folder itself, or in one folder a class.

    Raises:
        UserError: none, in other arrangements, or a folder that cannot be read.
    """
    files, unread = list_folder(root)
    lie = arrange(files, str(root), unread)
    items = [Item(lie.id(key), functools.partial(read_file, files[key]), lie.name(key)) for key in lie.keys]
    return Source(root.resolve().name, items, names=lie.names, strays=lie.strays, unread=unread.summary())


def open_zip(path: Path, folder: str = "") -> Source:
    """The image files of a zip file, or of a folder in it.

    Raises:
        UserError: no zip file, no such folder, no images, or in other arrangements.
    """
    try:
        archive = zipfile.ZipFile(path)  # stays open: members are read one at a time, nothing is extracted
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        why = describe_other_kind(path, "a zip file") or f"is not a readable zip file ({error})"
        raise UserError(f"{path} {why}") from None
    members, unread = list_archive(archive, str(path), folder)
    where, name = (f"{at}/{folder}" if folder else str(at) for at in (path, path.name))

    def read(info: zipfile.ZipInfo) -> bytes:
        if info.file_size > MAX_BYTES:
            raise ImageError(f"unpacks to {info.file_size:,} bytes; the limit is {MAX_BYTES:,}")
        try:
            with archive.open(info) as member:
                return member.read(MAX_BYTES + 1)
        except Exception as error:  # BadZipFile, zlib.error, lzma.LZMAError: each compression has its own
            raise ImageError(f"cannot be unpacked ({error})") from None

    def item(key: str) -> Item:
        info = members[key]
        return Item(lie.id(key), functools.partial(read, info), lie.name(key), f"{info.CRC:08x}-{info.file_size}")

    lie = arrange(members, where, unread)
    items = [item(key) for key in lie.keys]
    one = lie.names is not None and len(lie.names) == 1
    return Source(name, items, names=lie.names, wrapped=one, strays=lie.strays, unread=unread.summary())
