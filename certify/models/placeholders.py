"""Files that a failed download leaves in place of the wanted one."""

from __future__ import annotations

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
