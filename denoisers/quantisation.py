"""Quantisation tables of JPEG: the standard's, scaled by quality, and files of tables made for a network.

A table holds the steps Q(u, v) of the 64 coefficients of an 8x8 block in grey levels, row by row, where u is the
vertical frequency. :mod:`denoisers.jpeg` applies tables, :mod:`training.coefficients` measures those of a file.
"""

from __future__ import annotations

import functools
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
"""Kinds of tables in a file: for a network, from the standard deviations of images, one step for all coefficients."""

QUALITIES = (90, 75, 60, 45, 30)
"""Nominal qualities: a table of quality q leaves as many coefficients as the standard table at q."""

_EXPECTED = "expected a file of `python -m training.coefficients`"
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
"""The example tables of the standard (ITU-T T.81, Annex K), which encoders scale."""


@dataclass(frozen=True)
class Steps:
    """The tables of one quality.

    Attributes:
        luma: 64 steps from 1 to 255.
        chroma: 64 steps of both colour differences.
        kappa: factor on the shape of the tables, or None.
        rate: nonzero coefficients per pixel on the images the tables were measured on, or None.

    Raises:
        UserError: not 64 whole numbers from 1 to 255.
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
    """Scale a table to a quality from 1 to 100 by the rule of libjpeg.

    With s = 5000 / q below 50 and s = 200 - 2 q from 50 on: floor((s Q + 50) / 100), clipped to 1..255.

    Raises:
        UserError: no such quality.
    """
    if type(quality) is not int or not 1 <= quality <= 100:
        raise UserError(f"JPEG quality {quality!r}: expected a whole number from 1 to 100, such as 75")
    s = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(min(255, max(1, (s * step + 50) // 100)) for step in base)


def standard(quality: int) -> Steps:
    """Return the tables of a standard encoder."""
    return Steps(scaled(LUMA, quality), scaled(CHROMA, quality))


def flat(quality: int) -> Steps:
    """Return tables with one step for all coefficients: the standard's DC step of 16, scaled by the same rule."""
    step = scaled([16] * 64, quality)
    return Steps(step, step)


def multiplied(shape: Sequence[float], kappa: float, dc_step: int) -> Table:
    """Return Q = clip(kappa * shape, 1, 255), rounded; the DC step is at most kappa * ``dc_step``.

    Args:
        shape: 64 numbers above 0.
        kappa: compression factor; larger is coarser.
        dc_step: of the standard table: 16 for luma, 17 for chroma.
    """
    steps = [kappa * value for value in shape]
    steps[0] = min(steps[0], kappa * dc_step)
    return tuple(min(255, max(1, round(step))) for step in steps)


def shape_of(kind: str, spread: Sequence[float], reach: Sequence[float], gamma: float = 0.5) -> list[float]:
    """Return the shape of a kind of table, which kappa scales. Our design, after the idea of Zhang and Gao (2021).

    ``nn``: 2 p95 (Sref / S)^gamma. Rounding removes a perturbation within half a step of a quantised coefficient, so a
    step of twice the 95th percentile p95 removes most of it; a coefficient with a large standard deviation S carries
    what the network uses and gets a finer step. Sref is the geometric mean of S. gamma = 0 considers perturbations
    only, gamma = 1 orders by information.

    ``std``: 16 Sref / S, from clean images alone, after DeepN-JPEG (Liu et al. 2018) without its piecewise constants.

    ``flat``: 16.

    Args:
        kind: one of ``KINDS``.
        spread: S, 64 standard deviations of clean coefficients in grey levels, above 0.
        reach: p95, 64 percentiles of the absolute coefficients of a perturbation, in grey levels.
        gamma: exponent of ``nn``.
    """
    reference = math.exp(sum(map(math.log, spread)) / len(spread))
    if kind == "nn":
        return [2 * p * (reference / s) ** gamma for p, s in zip(reach, spread, strict=True)]
    return [16 * reference / s for s in spread] if kind == "std" else [16.0] * len(spread)


@dataclass(frozen=True)
class TableSet:
    """Tables that were measured together.

    Attributes:
        image: (C, H, W) of the images.
        tables: kind -> nominal quality -> steps.
        about: statistics, attack, seed, data and classifier with hashes, versions, command.
    """

    image: tuple[int, int, int]
    tables: Mapping[str, Mapping[int, Steps]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def levels(self, kind: str) -> list[int]:
        """Return the nominal qualities of a kind.

        Raises:
            UserError: no such kind.
        """
        if kind not in self.tables:
            raise UserError(f"table={kind}: this file of JPEG tables has {', '.join(self.tables)}")
        return list(self.tables[kind])

    def steps(self, kind: str, quality: int) -> Steps:
        """Return the tables of one kind and nominal quality.

        Raises:
            UserError: not in this set.
        """
        levels = self.levels(kind)
        if quality not in levels:
            raise UserError(f"level {quality!r}: this file of JPEG tables has {', '.join(map(str, levels))}")
        return self.tables[kind][quality]

    def content(self) -> dict[str, Any]:
        """Return the content of a file of these tables, without its hash."""
        tables = {kind: {str(q): asdict(s) for q, s in levels.items()} for kind, levels in self.tables.items()}
        return {"format": FORMAT, "image": list(self.image), "tables": tables, **self.about}

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


def write_tables(path: str | Path, tables: TableSet) -> None:
    """Write a file of tables, atomically."""
    text = json.dumps({**tables.content(), "sha256": tables.sha256}, indent=1)
    text = re.sub(r"\[[^][{}\"]*\]", lambda match: " ".join(match[0].split()), text)  # one table per line
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_tables(path: str | Path) -> TableSet:
    """Read a file of tables.

    Raises:
        UserError: no such file, another kind of file, or one that was changed.
    """
    try:
        raw = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read JPEG tables {path}: {first_line(error)}; {_EXPECTED}") from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT or not isinstance(raw.get("tables"), dict):
        raise UserError(f"{path} holds no JPEG tables of format {FORMAT}; {_EXPECTED}")
    stored = raw.pop("sha256", None)
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
        raise UserError(f"{path} holds tables that cannot be used ({first_line(error)}); {_EXPECTED}") from None
    table_set = TableSet((channels, height, width), tables, raw)
    if stored != table_set.sha256:
        raise UserError(f"{path} was changed after it was written (another SHA-256): do not use it; make it again")
    return table_set


def find_tables(path: str | None, image: tuple[int, int, int] | None, defence: str) -> TableSet:
    """Read a file of tables, or the shipped tables for images of exactly this size.

    Args:
        path: a file, or None for the shipped tables.
        image: (C, H, W) of the classifier's input.
        defence: its name, for the message.

    Raises:
        UserError: none fits, or the file is for another number of channels.
    """
    if path is not None:
        tables = read_tables(path)
        if image is not None and tables.image[0] != image[0]:
            raise UserError(f"{path} holds tables for images of {tables.image[0]} channels, these have {image[0]}")
        return tables
    for file in sorted(SHIPPED.glob("*-jpeg.json")):
        tables = read_tables(file)
        if tables.image == image:
            return tables
    size = "x".join(map(str, image or ())) or "these"
    raise UserError(f"defence {defence}: no shipped tables for {size} images; write {defence}:tables=FILE; {_EXPECTED}")
