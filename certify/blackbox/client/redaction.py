r"""Redact secrets in text and JSON, in every encoding in which a service may return them.

A match is any run of eight or more characters of the secret (all of a shorter one), compared case-insensitively, in
any of these forms:

- plain;
- escaped, in full or in part and up to eight times over: percent (``%2B``, ``%u002B``, ``+`` for a space), JSON,
  JavaScript and C (``\/``, ``\u002B``, ``\u{2B}``, ``\x2B``, ``\053``), HTML (``&#43;``, ``&#x2B;``, ``&plus;``),
  quoted-printable (``=2B``);
- broken by line ends, tabs, NUL bytes (wrapped lines, UTF-16) or other ASCII control characters;
- base64, standard and URL-safe, at any of its three alignments (as part of a longer encoded text), of the secret, of
  its percent, JSON and HTML escapes, and of its base64;
- hexadecimal.

If the secret is itself base64 of printable text, such as ``user:password`` for HTTP Basic, that text and the
password are secrets, too. Hashes, ciphers, compression, reversal, other characters in between and other transformations
are not recognised.
"""

from __future__ import annotations

import base64
import binascii
import functools
import html
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from html.entities import html5
from typing import Any
from urllib.parse import quote

import numpy as np

HIDDEN = "[key]"
"""Replacement for the secret."""

_LENGTH, _BASE64, _HEX = 8, 10, 16  # shortest match, plain and encoded: the characters that 8 bytes determine
_SHORTEST = 4  # shorter secrets are ignored: they would match everywhere
_GRAM, _STRIDE = 4, 5  # every run of 8 characters contains 4 that start at a multiple of 5
_TABLE_BITS = 20
_DEPTH = 8  # maximum levels of nested escapes

_UPPER = bytes(range(0x41, 0x5B))
_ALIKE = bytes.maketrans(_UPPER + b"-_", _UPPER.lower() + b"+/")  # case, and the two alphabets of base64
_BREAKS = bytes((*range(0x20), 0x7F))

_ESCAPE = (
    rb"(?:\\u000000|\\u00|\\x|%u00|%)([0-7][0-9a-f])|(?:\\u\{0*|&#x0*)([0-9a-f]{1,2})[;}]|&#0*([0-9]{1,3});"
    rb"|\\([01][0-7]{2})|&([a-z]{2,8});|\\(?!u[0-9a-f]{4})(.)"
)
_ESCAPES = re.compile(_ESCAPE, re.DOTALL)
_QUOTED_PRINTABLE = re.compile(rb"=\r?\n|" + _ESCAPE.replace(b"|%)", b"|%|=)"), re.DOTALL)
_QUOTED = re.compile(rb"=(?:\r?\n|[0-7][0-9a-f])")
_SIGNS = (b"\\", b"%", b"&", b"=")
_NAMED = {name[:-1].lower().encode(): text for name, text in html5.items() if name.endswith(";") and text.isascii()}


class Redactor:
    """Hide secrets in replies of a service, in time linear in their length.

    Args:
        secrets: texts to hide; those of fewer than four characters are ignored.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._windows: dict[int, set[bytes]] = {}
        for secret in set().union(*map(_readings, secrets)):
            for text, length in _forms(secret):
                form = text.translate(_ALIKE)
                size = min(length, len(form))
                if size >= _SHORTEST:
                    windows = (form[i : i + size] for i in range(len(form) - size + 1))
                    self._windows.setdefault(size, set()).update(windows)
        self._short = [window for size, windows in self._windows.items() if size < _LENGTH for window in windows]
        long = (window for size, windows in self._windows.items() if size >= _LENGTH for window in windows)
        self._grams = {window[i : i + _GRAM] for window in long for i in range(_STRIDE)}
        self._table = np.zeros(2**_TABLE_BITS, dtype=bool)
        self._table[_hashes(b"".join(self._grams), _GRAM)] = True

    def text(self, text: str) -> str:
        """Return the text with ``HIDDEN`` in place of every match."""
        data = text.encode("utf-8", "surrogatepass")
        spans = self._spans(data)
        return _replace(data, spans).decode("utf-8", "surrogatepass") if spans else text

    def json(self, value: Any) -> Any:
        """Return parsed JSON with all strings and object keys redacted.

        An integer that contains the secret becomes the string ``HIDDEN``.
        """
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(name): self.json(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.json(inner) for inner in value]
        if isinstance(value, int) and abs(value) >= 10 ** (_SHORTEST - 1):
            return value if self.text(str(value)) == str(value) else HIDDEN
        return value

    def body(self, body: bytes) -> bytes:
        """Return the body of a reply without the secret; unchanged if it contains none.

        JSON stays JSON, with floats unchanged. Anything else keeps its length, since binary formats store it
        elsewhere.
        """
        spans = self._spans(body)
        if not spans:
            return body
        try:
            return json.dumps(self.json(json.loads(body.decode("utf-8")))).encode()
        except (ValueError, RecursionError):
            return _replace(body, spans, keep_length=True)

    def _spans(self, data: bytes) -> list[tuple[int, int]]:
        """Return the matches as sorted (start, end) pairs; adjacent matches are merged."""
        data = data.translate(_ALIKE)
        spans = set(self._in_layers(*_without_breaks(data), _ESCAPES))
        if _QUOTED.search(data):
            spans.update(self._in_layers(*_unescape(data, _QUOTED_PRINTABLE), _QUOTED_PRINTABLE))
        merged: list[tuple[int, int]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return merged

    def _in_layers(self, data: bytes, origin: _Origin, escapes: re.Pattern[bytes]) -> Iterator[tuple[int, int]]:
        """Yield matches in the data and after each level of unescaping, as spans of the original data."""
        origins = [origin]
        for _ in range(_DEPTH):
            for span in self._matches(data):
                yield functools.reduce(lambda inner, layer: layer.span(*inner), reversed(origins), span)
            shorter, origin = _unescape(data, escapes)
            if len(shorter) == len(data):
                return
            data = shorter
            origins.append(origin)

    def _matches(self, data: bytes) -> list[tuple[int, int]]:
        """Return the spans of the secret's forms in unescaped bytes."""
        spans, first, last = list[tuple[int, int]](), 0, -1
        for i in (_STRIDE * np.flatnonzero(self._table[_hashes(data, _STRIDE)])).tolist():
            if data[i : i + _GRAM] not in self._grams:
                continue
            for size, windows in self._windows.items():
                for start in range(max(0, i + _GRAM - size, last - size + 1), min(i, len(data) - size) + 1):
                    if data[start : start + size] in windows:
                        if start > last >= 0:
                            spans.append((first, last))
                        first, last = start if start > last else min(first, start), start + size
        spans += [(first, last)] * (last >= 0)
        for secret in self._short:
            spans += (match.span() for match in re.finditer(re.escape(secret), data))
        return spans


def _hashes(data: bytes, stride: int) -> np.ndarray:
    """Return hashes of the 4 bytes at each multiple of ``stride``."""
    count = max(0, (len(data) - _GRAM) // stride + 1)
    grams = np.ndarray((count,), dtype="<u4", buffer=data if count else bytes(_GRAM), strides=(stride,))
    hashes: np.ndarray = (grams * np.uint32(2_654_435_761)) >> np.uint32(32 - _TABLE_BITS)
    return hashes


class _Origin:
    """Map positions in shortened bytes to positions in the original.

    Args:
        here: nondecreasing positions from 0; the bytes between neighbours are copies. A repeated position marks bytes
            that were replaced or removed.
        there: the corresponding positions in the original.
    """

    def __init__(self, here: Sequence[int] = (0,), there: Sequence[int] = (0,)) -> None:
        self._here, self._there = here, there

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Return the original span of the bytes from ``start`` to ``end``."""
        first, after = bisect_right(self._here, start) - 1, bisect_left(self._here, end)
        if after == len(self._here) or self._here[after] > end:
            after -= 1
        return self._there[first] + start - self._here[first], self._there[after] + end - self._here[after]


def _without_breaks(data: bytes) -> tuple[bytes, _Origin]:
    """Return the data without line ends, tabs and NUL bytes."""
    shorter = data.translate(None, _BREAKS)
    if len(shorter) == len(data):
        return data, _Origin()
    kept = np.flatnonzero(~np.isin(np.frombuffer(data, np.uint8), list(_BREAKS)))
    gaps = np.flatnonzero(np.diff(kept, prepend=-1) > 1)
    before = kept[gaps - 1] + 1 if gaps.size and gaps[0] else np.append(0, kept[gaps[1:] - 1] + 1)[: gaps.size]
    here, there = np.repeat(gaps, 2), np.stack([before, kept[gaps]], 1).reshape(-1)
    return shorter, _Origin([0, *here.tolist()], [0, *there.tolist()])


def _unescape(data: bytes, escapes: re.Pattern[bytes]) -> tuple[bytes, _Origin]:
    """Return the data with its escapes undone once."""
    if not any(sign in data for sign in _SIGNS):
        return data, _Origin()
    out, here, there, last = bytearray(), [0], [0], 0
    for match in escapes.finditer(data):
        text = _character(match)
        if text is None:
            continue
        start, end = match.span()
        out += data[last:start]
        here += [len(out), len(out) + len(text)]
        there += [start, end]
        out += text
        last = end
    return bytes(out + data[last:]), _Origin(here, there)


def _character(match: re.Match[bytes]) -> bytes | None:
    """Decode an escape; empty for a line end, None if its character cannot occur in a key."""
    group, text = match.lastindex, match[match.lastindex or 0]
    if group is None:
        return b""
    if group == 5:
        named = _NAMED.get(text)
        return None if named is None else named.encode().translate(_ALIKE, _BREAKS)
    if group == 6:
        return b"" if text in b"\r\nabfnrtv0" else text
    code = int(text, {3: 10, 4: 8}.get(group, 16))
    return bytes([code]).translate(_ALIKE, _BREAKS) if code < 128 else None


def _replace(data: bytes, spans: Iterable[tuple[int, int]], *, keep_length: bool = False) -> bytes:
    """Return the data with the spans hidden."""
    pieces, last, hidden = list[bytes](), 0, HIDDEN.encode()
    for start, end in spans:
        pieces += [data[last:start], hidden.ljust(end - start, b"*")[: end - start] if keep_length else hidden]
        last = end
    return b"".join([*pieces, data[last:]])


def _readings(secret: str) -> set[str]:
    """Return the secret and the printable texts of which its words are the base64."""
    readings = {secret}
    for word in secret.split():
        try:
            text = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True).decode("ascii")
        except (binascii.Error, ValueError):
            continue
        if text.isprintable():
            readings |= {text, text.partition(":")[2]}
    return readings


def _forms(secret: str) -> Iterator[tuple[bytes, int]]:
    """Yield the forms of a secret after unescaping, each with the minimum length of a match."""
    plain = secret.encode("utf-8", "surrogatepass")
    for escapes in (_ESCAPES, _QUOTED_PRINTABLE):
        data = plain.translate(_ALIKE)
        for _ in range(_DEPTH):  # a key that looks escaped is unescaped with the surrounding text
            yield data, _LENGTH
            data, _origin = _unescape(data, escapes)
    yield plain.replace(b" ", b"+"), _LENGTH
    yield plain.hex().encode(), _HEX
    for once in _base64(plain):
        yield once, _BASE64
        yield from ((twice, _BASE64) for twice in _base64(once))
    in_json = json.dumps(secret)[1:-1]
    escaped = {quote(plain, safe=""), quote(plain), html.escape(secret), in_json, in_json.replace("/", "\\/")}
    for text in escaped - {secret}:
        yield from ((form, _BASE64) for form in _base64(text.encode("utf-8", "surrogatepass")))


def _base64(data: bytes) -> Iterator[bytes]:
    """Yield the base64 characters determined by the data, for each of the three alignments."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + data)
        yield encoded[-(-8 * before // 6) : 8 * (before + len(data)) // 6]
