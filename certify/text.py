"""Text files as people's editors and spreadsheets write them."""

from __future__ import annotations

import codecs
from pathlib import Path


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark, or in UTF-16 with one.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: another encoding, or no text.
    """
    content = Path(path).read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig")
