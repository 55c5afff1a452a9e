"""Plot the speedup over the plain loop, from the output of `certify bench --json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.figures import COLOURS, LABEL, canvas, literal
from certify.errors import UserError
from certify.runs.schema import POSITIVE, TEXT, fault, parse_object

_KEYS = ("case", "engine", "reference", "ratio", "ratio_min", "ratio_max")
_FIELDS = {"case": TEXT, **dict.fromkeys(_KEYS[1:], POSITIVE)}


@dataclass(frozen=True)
class Speed:
    """One measurement: rates in samples per second, and median, smallest and largest ratio over pairs of runs."""

    case: str
    engine: float
    reference: float
    ratio: float
    ratio_min: float
    ratio_max: float


def is_speeds(path: str | Path) -> bool:
    """Return True if the file begins with a line of `certify bench --json`."""
    try:
        with open(path, "rb") as file:
            first = parse_object(file.readline())
    except OSError:
        return False
    return first is not None and all(key in first for key in _KEYS)


def read_speeds(path: str | Path) -> list[Speed]:
    """Read the measurements in a file, one JSON object per line; other measurements are skipped.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    speeds = []
    for number, line in enumerate(lines, 1):
        row = parse_object(line) if line.strip() else {}
        wrong = "no JSON object" if row is None else fault(row, _FIELDS)
        if row is None or wrong:
            raise UserError(f"{path} is damaged at line {number}: {wrong}")
        if all(key in row for key in _KEYS):
            if not row["ratio_min"] <= row["ratio"] <= row["ratio_max"]:
                raise UserError(f"{path} is damaged at line {number}: 'ratio' is not from 'ratio_min' to 'ratio_max'")
            speeds.append(Speed(**{key: row[key] for key in _KEYS}))
    return speeds


def plot_speeds(speeds: Sequence[Speed], path: str | Path, *, title: str | None = None) -> None:
    """Plot a bar per measurement, with the range over its pairs and both rates; the last of each name counts.

    Raises:
        UserError: an unknown format.
        RunFault: the file cannot be written.
    """
    last = {speed.case: speed for speed in speeds}
    with canvas(5.6, 1.0 + 0.36 * len(last), path, grid="x", title=title) as (figure, axes):
        for place, speed in enumerate(last.values()):
            errors = [[speed.ratio - speed.ratio_min], [speed.ratio_max - speed.ratio]]
            axes.barh(place, speed.ratio, height=0.6, color=COLOURS[0], xerr=errors, ecolor="#333333", capsize=2)
            rates = f"{speed.engine:,.0f} : {speed.reference:,.0f}"
            axes.text(speed.ratio_max + 0.05, place, rates, va="center", fontsize=8)
        axes.axvline(1, color=COLOURS[1], lw=1.2)
        axes.set_yticks(range(len(last)), [literal(name, LABEL) for name in last])
        widest = max(speed.ratio_max for speed in last.values())
        axes.set(xlim=(0, 1.35 * widest), ylim=(len(last) - 0.4, -0.6))
        text = "samples per second, this engine : plain loop; bars: their ratio (line: equally fast)"
        figure.supxlabel(text, fontsize=9, wrap=True)
