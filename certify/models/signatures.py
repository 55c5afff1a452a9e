"""Recognise files by their first bytes: unexpected formats, and the leftovers of failed downloads."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAD = 512
"""Number of bytes at the start of a file that suffice to recognise it."""

ZIP, TAR, PICKLE = "a zip archive", "a tar archive", "a Python pickle"
HDF5, TFLITE, NUMPY = "an HDF5 file", "a TensorFlow Lite model", "a NumPy array"
COMPRESSED = "compressed by "
"""Prefix of the description of a compressed file, followed by the program's name."""

_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
_SIGNATURES = {
    b"PK\x03\x04": ZIP,
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x1f\x8b": COMPRESSED + "gzip",
    b"BZh": COMPRESSED + "bzip2",
    b"\xfd7zXZ": COMPRESSED + "xz",
    b"\x28\xb5\x2f\xfd": COMPRESSED + "zstd",
    b"\x93NUMPY": NUMPY,
    b"\x89HDF": HDF5,
    b"MATLAB": "a MATLAB file",
    b"PAR1": "a Parquet file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x00\x00\x01\x00": "an icon",
    b"<svg": "an SVG drawing",
    b"\x00\x00\x00\x0cJXL": "a JPEG XL image",
    b"\x00\x00\x00\x0cjP": "a JPEG 2000 image",
    **{bytes([0x80, protocol]): PICKLE for protocol in range(2, 6)},
}
_BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image", b"heic": "a HEIC image", b"heix": "a HEIC image"}
_BRANDS |= {b"mif1": "a HEIF image", b"msf1": "a HEIF image"}
_USTAR = slice(257, 262)  # where the first header of a tar archive says ustar

_OPENERS: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_UNPACK = {
    TAR: "tar -xf {file} -C {folder}",
    "a 7-Zip archive": "7z x {file} -o{folder}",
    "a RAR archive": "unrar x {file} {folder}/",
}


def mistaken_for(head: bytes, expected: str) -> str | None:
    """Recognise a web page or a Git LFS pointer saved in place of the expected file.

    Args:
        head: the file's first bytes, up to ``HEAD``.
        expected: what the file should be, such as ``"an image"``.

    Returns:
        A predicate such as ``"is a web page, not an image: ..."``, with the fix, or None if it is neither.
    """
    if head.startswith(b"version https://git-lfs"):
        return f"is a Git LFS pointer, not {expected}; fetch the file itself (git lfs pull)"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGES) and b"<svg" not in text:
        return f"is a web page, not {expected}: the download saved an HTML page; fetch the file itself"
    return None


def name_content(head: bytes, path: Path | None = None) -> str:
    """Return a file's format from its first bytes, such as ``"a tar archive"``; empty if unknown.

    Args:
        head: the file's first bytes, up to ``HEAD``.
        path: path of the file, to detect a tar archive in a compressed file; or None.
    """
    if head[_USTAR] == b"ustar":
        return TAR
    if head[4:8] == b"TFL3":
        return TFLITE
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video or HEIF file")
    name = next((name for signature, name in _SIGNATURES.items() if head.startswith(signature)), "")
    packer = name.removeprefix(COMPRESSED)
    return TAR if path is not None and packer in _OPENERS and _unpacks_to_tar(path, packer) else name


def _unpacks_to_tar(path: Path, packer: str) -> bool:
    """True if the first block of a compressed file is a tar header; only that block is unpacked."""
    try:
        with _OPENERS[packer](path, "rb") as file:
            return bytes(file.read(HEAD))[_USTAR] == b"ustar"
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return False


def describe_other_kind(path: Path, expected: str) -> str:
    """Describe a file that should be some kind of zip archive but is not.

    Args:
        path: the file.
        expected: what it should be, such as ``"a zip file"`` or ``"an .npz file"``.

    Returns:
        A predicate such as ``"is a tar archive, not a zip file; unpack it ..."``; empty for unknown content.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return ""
    if mistake := mistaken_for(head, expected):
        return mistake
    kind = name_content(head, path)
    if kind in ("", ZIP):
        return ""
    text = f"is {kind}, not {expected}"
    if kind in _UNPACK:
        folder = shlex.quote(str(path.with_suffix("")))
        unpack = _UNPACK[kind].format(file=shlex.quote(str(path)), folder=folder)
        return f"{text}; unpack it and name the folder: mkdir -p {folder} && {unpack}"
    if kind == NUMPY:
        return f"{text}; save images and labels with numpy.savez(FILE, x=images, y=labels)"
    return f"{text}; unpack it" if kind.startswith(COMPRESSED) else text
