"""What all figures share: formats, colours, style, and a file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from certify.errors import RunFault, UserError
from certify.runs.files import replacing
from certify.text import printable

FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, told apart by colour-blind readers and in grey; black stays for text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")

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
    """Refuse a picture format that is not written, before any work is done."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"cannot write a picture as {str(path)!r}; expected a name that ends in {', '.join(FORMATS)}")


@contextlib.contextmanager
def canvas(width: float, height: float, columns: int = 1, style: dict[str, Any] | None = None) -> Iterator[Any]:
    """A figure of so many inches with its axes, in the house's style until the end of the block: save it there.

    Gives ``(figure, axes)``: one pair of axes, or a row of them. A notebook's own figures and backend are left alone.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, **(style or {})}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(1, columns)


def literal(text: str, most: int | None = None) -> str:
    """Return text from outside as a figure displays it: printable, cut to ``most``, dollar signs begin no formula."""
    text = printable(text)
    return (text if most is None or len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


LABEL = 40
"""Characters that a label beside an axis has room for."""


def log_ticks(axis: Any, text: str, subs: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Ticks of a logarithmic axis at these multiples of powers of ten, as plain numbers; none between them is named."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(text)
    axis.set_minor_formatter("")


def wrapped(labels: Sequence[str]) -> tuple[list[str], float]:
    """Labels whose lines fit below the axes, and the inches that those beyond the second add to a figure's height."""
    found = [textwrap.fill(label, 66, subsequent_indent="   ") for label in labels]
    return found, 0.17 * max(0, sum(1 + label.count("\n") for label in found) - 2)


def save_figure(figure: Any, path: Path, dpi: float = 200) -> None:
    """Write it whole or not at all, the same bytes for the same figure.

    Raises:
        RunFault: the file cannot be written.
    """
    kind = path.suffix.lower()[1:]
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    try:
        with replacing(path) as beside:
            figure.savefig(beside, format=kind, dpi=dpi, metadata=metadata)
    except OSError as error:
        raise RunFault(f"could not write {path}: {error.strerror}; the run files are untouched") from None
