"""Text from outside, as files hold it and as a reader may safely see it."""

from __future__ import annotations

import codecs
import unicodedata
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


def printable(text: str) -> str:
    r"""Return text from outside as one line that is displayed as it is: control and invisible characters as escapes.

    Labels, ids, names and messages come from services, files and archives. A control character could move a terminal's
    cursor, a bidirectional override could reverse what stands around it, and a line break could fake a line of a table.
    Each such character becomes its escape, such as ``\x1b``, ``\n`` or ``\u202e``; so do unassigned characters and lone
    surrogates. Letters of all scripts, marks, symbols and spaces stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return text of several lines with each line as :func:`printable` makes it."""
    return "\n".join(map(printable, text.split("\n")))
