"""Files under the name of another kind: what a failed download leaves, and other formats by their first bytes."""

from __future__ import annotations

import shlex
import zlib
from pathlib import Path

_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")


def mistaken_for(head: bytes, expected: str) -> str | None:
    """Name a web page or a Git LFS pointer that lies under the name of another file.

    Args:
        head: the file's first bytes; 512 are enough.
        expected: what the file should have been, such as ``"an image"``.

    Returns:
        The rest of a sentence about the file, with the remedy, or None where it is neither.
    """
    if head.startswith(b"version https://git-lfs"):
        return f"is a Git LFS pointer, not {expected}; fetch the file itself (git lfs pull)"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGES) and b"<svg" not in text:
        return f"is a web page, not {expected}: the download saved an HTML page; fetch the file itself"
    return None


_SIGNATURES = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"MATLAB": "a MATLAB file",
    b"PAR1": "a Parquet file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x00\x00\x00\x0cJXL": "a JPEG XL image",
    b"\x00\x00\x00\x0cjP": "a JPEG 2000 image",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
}
_FTYP = {b"avif": "an AVIF image", b"avis": "an AVIF image", b"heic": "a HEIC image", b"heix": "a HEIC image"}
_FTYP |= {b"mif1": "a HEIF image", b"msf1": "a HEIF image"}


_PACKED = {"a tar archive": "tar -xf {file} -C {folder}", "a 7-Zip archive": "7z x {file} -o{folder}"}
_PACKED |= {"a RAR archive": "unrar x {file} {folder}/"}


def describe_other_kind(path: Path, expected: str) -> str:
    """Return the rest of a sentence about a file that should be a zip archive of some kind, with the remedy.

    Args:
        path: of the file.
        expected: what it should be, such as ``"a zip file"`` or ``"an .npz file"``.

    Returns:
        Such as ``"is a tar archive, not a zip file; unpack it ..."``; empty for a zip file and for unknown content.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return ""
    if mistake := mistaken_for(head, expected):
        return mistake
    kind = name_content(head)
    if not kind or head.startswith(b"PK"):
        return ""
    text = f"is {kind}, not {expected}"
    if kind in _PACKED:
        folder = shlex.quote(str(path.with_suffix("")))
        unpack = _PACKED[kind].format(file=shlex.quote(str(path)), folder=folder)
        return f"{text}; unpack it and name the folder: mkdir -p {folder} && {unpack}"
    if kind == "a NumPy array":
        return f"{text}; save images and labels with numpy.savez(FILE, x=images, y=labels)"
    return f"{text}; unpack it" if kind.startswith("compressed") else text


def name_content(head: bytes) -> str:
    """Return what a file's first 512 bytes say it is, such as ``"a tar archive"``; empty where they say nothing."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head.startswith(b"\x1f\x8b"):
        try:
            if zlib.decompressobj(31).decompress(head, 512)[257:262] == b"ustar":
                return "a tar archive"
        except zlib.error:
            pass
    if head[4:8] == b"ftyp":
        return _FTYP.get(head[8:12], "a video or HEIF file")
    return next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), "")
