"""The frame of all figures: format, colours, style, title, and atomic writing."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.errors import RunFault, UserError
from certify.runs.files import replacing
from certify.text import printable

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
DPI = 200

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Colours of Okabe and Ito, distinguishable for colour-blind readers and in grey; black is for text."""

LINES = ("-", "--", ":", "-.")
"""Line styles, for more lines than colours."""

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "svg.hashsalt": "certify",  # the same run gives the same file
    "pdf.fonttype": 42,
}


def check_format(path: str | Path) -> None:
    """Refuse unknown picture formats, before any work is done."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"cannot write a picture as {str(path)!r}; expected a name ending in {', '.join(FORMATS)}")


@contextlib.contextmanager
def canvas(
    width: float,
    height: float,
    path: str | Path | None = None,
    *,
    columns: int = 1,
    rows: Sequence[float] = (1.0,),
    grid: str = "both",
    title: str | None = None,
) -> Iterator[tuple[Figure, Any]]:
    """Create a figure in this package's style, which applies within the block, and write it at the end of the block.

    Yields ``(figure, axes)``; ``axes`` is an array if there are several. The state of pyplot, such as a notebook's own
    figures and backend, is not touched.

    Args:
        width: in inches.
        height: in inches.
        path: file to write (.png, .svg or .pdf); None writes none.
        columns: number of axes, side by side.
        rows: relative height of each row of axes.
        grid: axes with grid lines: ``"x"``, ``"y"``, ``"both"`` or ``"neither"``.
        title: above the axes, wrapped.

    Raises:
        UserError: an unknown format.
        RunFault: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if path is not None:
        check_format(path)
    lines = {"axes.grid": grid != "neither", "axes.grid.axis": "both" if grid == "neither" else grid}
    with rc_context({**STYLE, **lines}):
        figure = Figure(figsize=(width, height), layout="constrained")
        if title:
            figure.suptitle(title, fontsize=9, x=0.01, ha="left", wrap=True)
        yield figure, figure.subplots(len(rows), columns, squeeze=len(rows) == 1, height_ratios=rows)
        if path is not None:
            save_figure(figure, Path(path))


def literal(text: str, limit: int | None = None) -> str:
    """Return text from outside for a figure: printable, at most ``limit`` characters, with dollar signs escaped."""
    text = printable(text)
    return (text if limit is None or len(text) <= limit else text[: limit - 1] + "…").replace("$", r"\$")


LABEL = 40
"""Maximum number of characters of a label beside an axis."""


def log_ticks(axis: Axis, text: str, subs: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Put ticks on a logarithmic axis at these multiples of powers of ten, labelled by plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(text)
    axis.set_minor_formatter("")


def wrapped(labels: Sequence[str]) -> tuple[list[str], float]:
    """Wrap labels to fit below the axes; also return the height in inches that lines beyond the second need."""
    lines = [textwrap.fill(label, 66, subsequent_indent="   ") for label in labels]
    return lines, 0.17 * max(0, sum(1 + label.count("\n") for label in lines) - 2)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically; the same figure gives the same bytes.

    Raises:
        RunFault: the file cannot be written.
    """
    kind = path.suffix.lower()[1:]
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    try:
        with replacing(path) as temporary:
            dpi = min(DPI, 2**14 / max(figure.get_size_inches()))
            figure.savefig(temporary, format=kind, dpi=dpi, metadata=metadata)
    except OSError as error:
        raise RunFault(f"could not write {path}: {error.strerror}; the run files are untouched") from None
