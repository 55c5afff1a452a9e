"""Common layer of all figures: format, colours, style, title, and atomic writing."""

from __future__ import annotations

import contextlib
import contextvars
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.errors import RunFault, UserError
from certify.runs.files import replacing
from certify.smoothing.numeric import as_float
from certify.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
DPI = 200

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Colours of Okabe and Ito, distinguishable for colour-blind readers and in grey; black is for text."""

LINES = ("-", "--", ":", "-.")
"""Line styles, for more lines than colours."""

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "certify",  # the same run gives the same file
    "pdf.fonttype": 42,
}


_PRESETS: dict[str, tuple[float | None, float]] = {"screen": (None, 9.0), "paper": (3.25, 8.0), "slides": (8.0, 16.0)}
LEGENDS = ("outside", "inside", "none")


@dataclass(frozen=True)
class FigureStyle:
    """Size and style of figures, in place of their own; see :func:`figure_style`.

    Attributes:
        name: ``"screen"``; ``"paper"``: 3.25 inches wide, 8 pt, a different dash pattern per line, for grey print; or
            ``"slides"``: 8 inches wide, 16 pt.
        width: width in inches.
        height: height in inches.
        font_size: font size in points.
        legend: ``"outside"`` (below the axes), ``"inside"`` or ``"none"``.
        xmax: largest radius on the axis of a curve.

    Raises:
        UserError: an unknown name or legend, or sizes that are not positive.
    """

    name: str = "screen"
    width: float | None = None
    height: float | None = None
    font_size: float | None = None
    legend: str = "outside"
    xmax: float | None = None

    def __post_init__(self) -> None:
        for option, value, known in (("style", self.name, tuple(_PRESETS)), ("legend", self.legend, LEGENDS)):
            if value not in known:
                raise UserError(f"--{option} {value!r}: expected one of {', '.join(known)}")
        for option in ("width", "height", "font_size", "xmax"):
            value = getattr(self, option)
            if value is not None and not 0 < as_float(value, option) <= _MOST:
                raise UserError(f"--{option.replace('_', '-')} {value}: expected a number above 0, at most {_MOST:g}")

    @property
    def points(self) -> float:
        """Font size of axis labels; the legend's is one point smaller."""
        return self.font_size or _PRESETS[self.name][1]

    def size(self, width: float, height: float) -> tuple[float, float]:
        """Return a figure's size in inches, given its default size."""
        wide = self.width or _PRESETS[self.name][0] or width
        return wide, self.height or max(_LOWEST, height * wide / width)

    def line(self, place: int) -> tuple[str, str]:
        """Return colour and dash pattern of a line by its index."""
        dashes = place if self.name == "paper" else place // len(COLOURS)
        return COLOURS[place % len(COLOURS)], LINES[dashes % len(LINES)]


_MOST, _LOWEST = 100.0, 1.8  # inches, points or pixels; inches
_SCREEN = FigureStyle()
_style = contextvars.ContextVar("figure_style", default=_SCREEN)


def current_style() -> FigureStyle:
    """Return the current style of figures."""
    return _style.get()


@contextlib.contextmanager
def figure_style(style: FigureStyle) -> Iterator[None]:
    """Draw figures in this style within the block."""
    token = _style.set(style)
    try:
        yield
    finally:
        _style.reset(token)


def add_legend(figure: Figure, axes: Axes, columns: int, **options: Any) -> None:
    """Add a legend as the style requires, with at most ``columns`` columns and no more than fit side by side.

    ``options`` are passed to matplotlib.
    """
    style = _style.get()
    if style.legend == "none":
        return
    if style.legend == "inside":
        axes.legend(loc="best", **options)
        return
    handles = options.get("handles") or axes.get_legend_handles_labels()[0]
    longest = max((max(map(len, str(handle.get_label()).split("\n"))) for handle in handles), default=1)
    fit = int(_characters(figure.get_figwidth()) / (longest + 3))
    figure.legend(loc="outside lower center", ncols=max(1, min(columns, fit)), **options)


def _characters(width: float) -> float:
    """Return the number of characters of the legend that fit into a width in inches."""
    return 66 * (width / 4.8) * 8 / (_style.get().points - 1)


def check_format(path: str | Path) -> None:
    """Check the picture format before any work is done."""
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
        width: default width in inches.
        height: default height in inches.
        path: file to write (.png, .svg or .pdf); None writes none.
        columns: number of axes, side by side.
        rows: relative height of each row of axes.
        grid: axes with grid lines: ``"x"``, ``"y"``, ``"both"`` or ``"neither"``.
        title: title above the axes, wrapped.

    Raises:
        UserError: an unknown format.
        RunFault: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if path is not None:
        check_format(path)
    style = _style.get()
    points = style.points
    lines = {"axes.grid": grid != "neither", "axes.grid.axis": "both" if grid == "neither" else grid}
    sizes = {"font.size": points, "legend.fontsize": points - 1, "legend.title_fontsize": points - 1}
    with rc_context({**STYLE, **lines, **sizes}):
        figure = Figure(figsize=style.size(width, height), layout="constrained")
        if title:
            figure.suptitle(title, fontsize=points, x=0.01, ha="left", wrap=True)
        yield figure, figure.subplots(len(rows), columns, squeeze=len(rows) == 1, height_ratios=rows)
        _wrap_axis_labels(figure, len(rows), columns)
        if path is not None:
            save_figure(figure, Path(path))


def _wrap_axis_labels(figure: Figure, rows: int, columns: int) -> None:
    """Wrap axis labels that are longer than their axes."""
    wide, high = _characters(figure.get_figwidth() / columns), _characters(figure.get_figheight() / rows)
    for axes in figure.axes:
        for axis, room in ((axes.xaxis, 0.95 * wide), (axes.yaxis, 0.7 * high)):
            text = axis.get_label_text()
            axis.set_label_text("\n".join(textwrap.fill(line, max(8, int(room))) for line in text.split("\n")))


def tick_name(name: str) -> str:
    """Return the name of a row for the axis: printable, at most :data:`LABEL` characters, on two lines if long."""
    name = literal(name, LABEL)
    middle = name.rfind(":", 0, 2 * len(name) // 3) + 1
    narrow = len(name) > _characters(_style.get().size(6.4, 1.0)[0]) / 4
    return f"{name[:middle]}\n{name[middle:]}" if narrow and middle else name


def literal(text: str, limit: int | None = None) -> str:
    """Make untrusted text safe for a figure: printable, at most ``limit`` characters, dollar signs escaped."""
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
    wide = round(_characters(_style.get().size(4.8, 3.3)[0]))
    lines = [textwrap.fill(label, wide, subsequent_indent="   ") for label in labels]
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
