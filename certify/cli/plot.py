"""``certify plot``: figures of runs, comparisons, trainings and speed measurements."""

from __future__ import annotations

import click

from certify.cli.console import tell, warn
from certify.cli.option_groups import CurveOptions
from certify.cli.options import command, flag, option, refuse_given
from certify.cli.show import ONLY_CERTIFICATES, named_curves, refuse_beside_comparison
from certify.errors import UserError

_CURVE_OPTIONS = ("no_band", "envelope", "names", "image", "samples")


class PlotOptions(CurveOptions):
    """Contents of a figure."""

    out: str = option("-o", "--out", metavar="FILE", default="curve.png", help="Figure to write: .png, .svg or .pdf.")
    title: str | None = option(help="Title above the axes.")
    no_band: bool = flag(help="Leave out the shaded 95 % interval over images.")
    image: str | None = option(metavar="ID", help="Show the votes of this image of RUN, and the bounds they give.")
    samples: bool = flag(help="Show radius against samples: what fewer of the votes would have certified.")


@command("Draw certified accuracy over radius.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
def plot(runs: tuple[str, ...], options: PlotOptions) -> None:
    """Draw certified accuracy over radius, one line per run.

    RUN is a run file of certify, or a log with columns idx label predict radius correct time. The file of a comparison
    gives a figure of the comparison, folders of trainings give learning curves, and lines of `certify bench --json`
    give speeds.
    """
    from analysis.figures import check_format
    from analysis.learning import is_training
    from analysis.runs import is_comparison
    from analysis.speed_plot import is_speeds

    check_format(options.out)
    if options.image is not None and options.samples:
        raise UserError("--image and --samples are two figures; pass one of them")
    if any(is_training(path) for path in runs):
        _plot_trainings(runs, options)
    elif any(is_speeds(path) for path in runs):
        _plot_speeds(runs, options)
    elif any(is_comparison(path) for path in runs):
        _plot_comparison(runs, options.out)
    elif options.image is not None:
        _plot_votes(runs, options.image, options)
    else:
        _plot_certificates(runs, options)
    tell(f"wrote {options.out}")


def _plot_certificates(runs: tuple[str, ...], options: PlotOptions) -> None:
    from analysis.runs import read_all

    read = read_all(runs, warn)
    if options.samples:
        from analysis.vote_plots import plot_samples

        refuse_given(("no_band", "envelope", "names"), f"{ONLY_CERTIFICATES} radius against samples")
        plot_samples(read, options.out, title=options.title)
        return
    from analysis.envelope import group
    from analysis.plots import plot_curves

    curves = named_curves(read, options)
    lines = group(curves) if options.envelope else curves
    plot_curves(lines, options.out, title=options.title, band=not options.no_band)


def _plot_votes(runs: tuple[str, ...], image: str, options: PlotOptions) -> None:
    from analysis.vote_plots import plot_votes
    from certify.runs.run_file import read_run

    refuse_given(("no_band", "envelope", "names"), f"{ONLY_CERTIFICATES} the votes of one image")
    if len(runs) > 1:
        raise UserError(f"--image {image} with {len(runs)} runs: the votes of an image belong to one run; name one")
    plot_votes(read_run(runs[0], allow_partial=True), image, options.out, title=options.title)


def _plot_comparison(runs: tuple[str, ...], out: str) -> None:
    from analysis.comparison.plot import draw_comparison
    from analysis.runs import read_comparison

    refuse_beside_comparison(runs, ("title", *_CURVE_OPTIONS))
    comparison = read_comparison(runs[0])
    comparison.require_sound()
    draw_comparison(comparison, out)


def _plot_trainings(folders: tuple[str, ...], options: PlotOptions) -> None:
    from analysis.learning import is_training, plot_learning, read_learning

    for path in folders:
        if not is_training(path):
            raise UserError(f"{path} is no training, unlike the others; draw runs and trainings apart")
    refuse_given(_CURVE_OPTIONS, f"{ONLY_CERTIFICATES} trainings")
    plot_learning([read_learning(path) for path in folders], options.out, title=options.title)


def _plot_speeds(files: tuple[str, ...], options: PlotOptions) -> None:
    from analysis.speed_plot import is_speeds, plot_speeds, read_speeds

    for path in files:
        if not is_speeds(path):
            raise UserError(f"{path} holds no lines of certify bench --json, unlike the others; draw them apart")
    refuse_given(_CURVE_OPTIONS, f"{ONLY_CERTIFICATES} speeds")
    plot_speeds([speed for path in files for speed in read_speeds(path)], options.out, title=options.title)
