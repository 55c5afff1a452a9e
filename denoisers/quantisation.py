"""Quantisation tables of JPEG: the standard's scaled by quality, ones made for a network, and the file of those.

A table holds the steps Q(u, v) of the 64 coefficients of an 8x8 block in grey levels, row by row, u the vertical
frequency. The codec is in ``denoisers/jpeg.py``, what tables are made from is measured in ``training/coefficients.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from certify.errors import UserError, first_line
from certify.runs.files import replacing
from denoisers import SHIPPED

FORMAT = 1
KINDS = ("nn", "std", "flat")
"""Tables of a file: for a network, from the images' standard deviations alone, and one step for all coefficients."""

QUALITIES = (90, 75, 60, 45, 30)
"""Nominal levels: a table of level q leaves as many coefficients as the standard table at quality q."""

_LUMA = """
    16 11 10 16  24  40  51  61    12 12 14 19  26  58  60  55    14 13 16 24  40  57  69  56
    14 17 22 29  51  87  80  62    18 22 37 56  68 109 103  77    24 35 55 64  81 104 113  92
    49 64 78 87 103 121 120 101    72 92 95 98 112 100 103  99
"""
_CHROMA = """
    17 18 24 47 99 99 99 99    18 21 26 66 99 99 99 99    24 26 56 99 99 99 99 99    47 66 99 99 99 99 99 99
"""

Table = tuple[int, ...]

LUMA: Table = tuple(map(int, _LUMA.split()))
CHROMA: Table = (*map(int, _CHROMA.split()), *[99] * 32)
"""The examples of the standard's Annex K (ITU-T T.81), which encoders scale."""


@dataclass(frozen=True)
class Steps:
    """The tables of one level.

    Attributes:
        luma: 64 steps from 1 to 255.
        chroma: the same for both colour differences.
        kappa: what the table's shape was multiplied by, for luma and chroma, or None.
        rate: coefficients a pixel that were not zero on the images that the tables were measured on, or None.
    """

    luma: Table
    chroma: Table
    kappa: float | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        for table in (self.luma, self.chroma):
            if len(table) != 64 or not all(type(step) is int and 1 <= step <= 255 for step in table):
                raise UserError(f"quantisation table of {len(table)} steps: expected 64 whole numbers from 1 to 255")


def scaled(base: Sequence[int], quality: int) -> Table:
    """The table at a quality from 1 to 100 by the rule of libjpeg.

    s = 5000 / q below 50, else 200 - 2 q; floor((s Q + 50) / 100), at least 1 and at most 255.

    Raises:
        UserError: no such quality.
    """
    if type(quality) is not int or not 1 <= quality <= 100:
        raise UserError(f"JPEG quality {quality!r}: expected a whole number from 1 to 100, such as 75")
    s = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(min(255, max(1, (s * step + 50) // 100)) for step in base)


def standard(quality: int) -> Steps:
    """The tables of a stock encoder."""
    return Steps(scaled(LUMA, quality), scaled(CHROMA, quality))


def flat(quality: int) -> Steps:
    """One step for all coefficients: the standard's 16 of the mean, scaled by the same rule."""
    step = scaled([16] * 64, quality)
    return Steps(step, step)


def multiplied(shape: Sequence[float], kappa: float, mean_step: int) -> Table:
    """Q = clip(kappa * shape, 1, 255) in whole numbers; the step of the block's mean is at most kappa * ``mean_step``.

    Args:
        shape: 64 numbers above 0.
        kappa: the compression level; more is coarser.
        mean_step: of the standard table: 16 for luma, 17 for chroma.
    """
    found = [kappa * value for value in shape]
    found[0] = min(found[0], kappa * mean_step)
    return tuple(min(255, max(1, round(step))) for step in found)


def shape_of(kind: str, spread: Sequence[float], reach: Sequence[float], gamma: float = 0.5) -> list[float]:
    """What kappa multiplies: the tables' shape by kind. Our design, after the idea of Zhang and Gao (2021).

    ``nn``: 2 p95 (Sref / S)^gamma. Rounding erases a perturbation within half a step of a clean coefficient on the
    grid, so a step of twice its 95th percentile p95 removes most; a coefficient whose clean standard deviation S is
    large carries what the network looks at and gets a finer step. Sref is the geometric mean of S. gamma = 0 removes
    perturbations only, gamma = 1 orders by information.

    ``std``: 16 Sref / S, from clean images alone: the idea of DeepN-JPEG (Liu et al. 2018), that a large deviation
    wants a small step, without its piecewise linear constants.

    ``flat``: 16.

    Args:
        kind: of ``KINDS``.
        spread: S, 64 standard deviations of clean coefficients in grey levels, above 0.
        reach: p95, 64 percentiles of the size of a perturbation's coefficients in grey levels.
        gamma: exponent of ``nn``.
    """
    middle = math.exp(sum(map(math.log, spread)) / len(spread))
    if kind == "nn":
        return [2 * p * (middle / s) ** gamma for p, s in zip(reach, spread, strict=True)]
    return [16 * middle / s for s in spread] if kind == "std" else [16.0] * len(spread)


@dataclass(frozen=True)
class TableSet:
    """Tables that were measured together, and on what.

    Attributes:
        image: (C, H, W) of the images.
        tables: kind -> nominal quality -> steps.
        about: statistics, attack, seed, data and classifier with their hashes, versions, command.
        sha256: over all of it, once it is written.
    """

    image: tuple[int, int, int]
    tables: Mapping[str, Mapping[int, Steps]]
    about: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def steps(self, kind: str, quality: int) -> Steps:
        """The tables of one kind and level.

        Raises:
            UserError: not in this file.
        """
        levels = self.tables.get(kind)
        if levels is None:
            raise UserError(f"table={kind}: this file of JPEG tables has {', '.join(self.tables)}")
        if quality not in levels:
            raise UserError(f"level {quality!r}: this file of JPEG tables has {', '.join(map(str, levels))}")
        return levels[quality]


def write_tables(path: str | Path, found: TableSet) -> TableSet:
    """Write a file of tables, beside and then over ``path``; the set with its hash."""
    kept = {k: {str(q): asdict(s) for q, s in levels.items()} for k, levels in found.tables.items()}
    content = {"format": FORMAT, "image": list(found.image), "tables": kept, **found.about}
    digest = _digest(content)
    text = json.dumps({**content, "sha256": digest}, indent=1)
    text = re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), text)  # a table a line
    with replacing(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")
    return TableSet(found.image, found.tables, found.about, digest)


def read_tables(path: str | Path) -> TableSet:
    """The tables of a file.

    Raises:
        UserError: no such file, another kind of file, or one that was changed.
    """
    try:
        raw = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read JPEG tables {path}: {first_line(error)}; {_WANTED}") from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT or not isinstance(raw.get("tables"), dict):
        raise UserError(f"{path} holds no JPEG tables of format {FORMAT}; {_WANTED}")
    stated = raw.pop("sha256", None)
    if stated != _digest({"format": FORMAT, **raw}):
        raise UserError(f"{path} was changed after it was written (another SHA-256): do not use it; make it again")
    try:
        channels, height, width = raw.pop("image")
        tables = {
            kind: {
                int(quality): Steps(tuple(s["luma"]), tuple(s["chroma"]), s["kappa"], s["rate"])
                for quality, s in levels.items()
            }
            for kind, levels in raw.pop("tables").items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} holds tables that cannot be used ({first_line(error)}); {_WANTED}") from None
    return TableSet((channels, height, width), tables, raw, stated)


def find_tables(named: str | None, image: tuple[int, int, int] | None, who: str) -> TableSet:
    """The tables of the file that is named, or the shipped ones for images of exactly this size.

    Args:
        named: a file, or None.
        image: (C, H, W) of what the classifier takes.
        who: the defence, for the error.

    Raises:
        UserError: none fits; blocks of another number of channels.
    """
    if named is not None:
        found = read_tables(named)
        if image is not None and found.image[0] != image[0]:
            raise UserError(f"{named} holds tables for images of {found.image[0]} channels, these have {image[0]}")
        return found
    for path in sorted(SHIPPED.glob("*-jpeg.json")):
        shipped = read_tables(path)
        if shipped.image == image:
            return shipped
    size = "x".join(map(str, image or ())) or "these"
    raise UserError(f"defence {who}: no shipped tables for {size} images; write {who}:tables=FILE; {_WANTED}")


_WANTED = "expected a file of `python -m training.coefficients`"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
