"""``certify plot``: figures of runs, comparisons, trainings and speed measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click

from certify.cli.console import tell, warn
from certify.cli.option_groups import CurveOptions
from certify.cli.options import Options, command, flag, option, refuse_given
from certify.cli.parameter_types import Positive
from certify.cli.show import ONLY_CERTIFICATES, named_curves, refuse_beside_comparison
from certify.errors import UserError

_OF_CURVES = ("no_band", "envelope", "names", "xmax")


class PlotOptions(CurveOptions):
    """Contents of a figure."""

    out: str = option("-o", "--out", metavar="FILE", default="curve.png", help="Figure to write: .png, .svg or .pdf.")
    title: str | None = option(help="Title above the axes.")
    no_band: bool = flag(help="Leave out the shaded 95 % interval over images.")
    image: str | None = option(metavar="ID", help="Show the votes of this image of RUN, and the bounds they give.")
    samples: bool = flag(help="Show radius against samples: what fewer of the votes would have certified.")


class StyleOptions(Options, section="Figure"):
    """Size and style of a figure."""

    style: str = option(
        type=click.Choice(["screen", "paper", "slides"]),
        default="screen",
        help="Style: paper is 3.25 in wide with 8 pt text and dashes that survive grey print, slides 8 in with 16 pt.",
    )
    width: float | None = option(type=Positive("a width in inches"), metavar="IN", help="Width in inches.")
    height: float | None = option(type=Positive("a height in inches"), metavar="IN", help="Height in inches.")
    font_size: float | None = option(
        type=Positive("a size in points"), metavar="PT", help="Size of the text in points."
    )
    legend: str = option(
        type=click.Choice(["outside", "inside", "none"]), default="outside", help="Place of the legend."
    )
    xmax: float | None = option(type=Positive("a radius above 0"), help="Largest radius on the axis of curves.")


@command("Draw certified accuracy over radius.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
def plot(runs: tuple[str, ...], options: PlotOptions, style: StyleOptions) -> None:
    """Draw certified accuracy over radius, one line per run.

    RUN is a run file of certify, or a log with columns idx label predict radius correct time. The file of a comparison
    gives a figure of the comparison, folders of trainings give learning curves, and lines of `certify bench --json`
    give speeds.
    """
    from analysis.figures import FigureStyle, check_format, figure_style

    check_format(options.out)
    with figure_style(FigureStyle(style.style, style.width, style.height, style.font_size, style.legend, style.xmax)):
        _draw(runs, options, short=style.style != "screen")
    tell(f"wrote {options.out}")


def _draw(runs: tuple[str, ...], options: PlotOptions, *, short: bool) -> None:
    """Draw the figure that these files are for."""
    from analysis import learning, speed_plot, vote_plots
    from analysis.runs import is_comparison, read_all

    out, title = options.out, options.title
    if options.image is not None and options.samples:
        raise UserError("--image and --samples are two figures; pass one of them")
    if any(map(learning.is_training, runs)):
        _refuse_others(runs, learning.is_training, "is no training", "trainings")
        learning.plot_learning([learning.read_learning(path) for path in runs], out, title=title)
    elif any(map(speed_plot.is_speeds, runs)):
        _refuse_others(runs, speed_plot.is_speeds, "holds no lines of certify bench --json", "speeds")
        speeds = [speed for path in runs for speed in speed_plot.read_speeds(path)]
        speed_plot.plot_speeds(speeds, out, title=title)
    elif any(map(is_comparison, runs)):
        _plot_comparison(runs, out)
    elif options.image is not None:
        from certify.runs.run_file import read_run

        refuse_given(_OF_CURVES, f"{ONLY_CERTIFICATES} the votes of one image")
        if len(runs) > 1:
            raise UserError(
                f"--image {options.image} with {len(runs)} runs: the votes of an image belong to one run; name one"
            )
        vote_plots.plot_votes(read_run(runs[0], allow_partial=True), options.image, out, title=title)
    elif options.samples:
        read = read_all(runs, warn)
        refuse_given(_OF_CURVES, f"{ONLY_CERTIFICATES} radius against samples")
        vote_plots.plot_samples(read, out, title=title)
    else:
        from analysis.envelope import group
        from analysis.plots import plot_curves

        curves = named_curves(read_all(runs, warn), options, short=short)
        plot_curves(group(curves) if options.envelope else curves, out, title=title, band=not options.no_band)


def _refuse_others(paths: Sequence[str], is_kind: Callable[[str], bool], why: str, what: str) -> None:
    """Refuse files of another kind among these, and options of curves."""
    for path in paths:
        if not is_kind(path):
            raise UserError(f"{path} {why}, unlike the others; draw them apart")
    refuse_given((*_OF_CURVES, "image", "samples"), f"{ONLY_CERTIFICATES} {what}")


def _plot_comparison(runs: tuple[str, ...], out: str) -> None:
    from analysis.comparison.plot import draw_comparison
    from analysis.runs import read_comparison

    refuse_beside_comparison(runs, ("title", *_OF_CURVES, "image", "samples"))
    comparison = read_comparison(runs[0])
    comparison.require_sound()
    draw_comparison(comparison, out)
