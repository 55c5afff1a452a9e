"""``certify plot``: pictures out of what runs, comparisons, trainings and measurements left."""

from __future__ import annotations

import click

from certify.cli import options
from certify.cli.console import tell, warn
from certify.cli.show import curves_of
from certify.errors import UserError

_CURVES = ("no_band", "envelope", "given", "image", "samples")


@click.command(short_help="Draw certified accuracy over radius.")
@options.runs_argument
@click.option("-o", "--out", metavar="FILE", default="curve.png", help="Picture to write: .png, .svg or .pdf.")
@click.option("--title", help="Title above the axes.")
@click.option("--no-band", is_flag=True, help="Leave out the shaded 95 % interval over images.")
@options.envelope_option
@options.name_option
@click.option("--image", metavar="ID", help="The votes of this image of RUN instead, and the bounds they give.")
@click.option(
    "--samples", is_flag=True, help="Radius against samples instead: what fewer of the votes would have certified."
)
def plot(
    runs: tuple[str, ...],
    out: str,
    title: str | None,
    no_band: bool,
    envelope: bool,
    given: tuple[str, ...],
    image: str | None,
    samples: bool,
) -> None:
    """Draw certified accuracy over radius, one line a run.

    RUN is a run file of certify, or a log with columns idx label predict radius correct time. The file of a comparison
    gives the comparison's own figure, folders of trainings their learning curves, and lines of `certify bench --json`
    the speeds.
    """
    from analysis.figures import check_format
    from analysis.learning import is_training
    from analysis.runs import is_comparison
    from analysis.speed_plot import is_speeds

    check_format(out)
    if image is not None and samples:
        raise UserError("--image and --samples are two pictures; pass one of them")
    if any(is_training(path) for path in runs):
        _trainings(runs, out, title)
    elif any(is_speeds(path) for path in runs):
        _speeds(runs, out, title)
    elif any(is_comparison(path) for path in runs):
        _comparison(runs, out)
    elif image is not None:
        _votes(runs, image, out, title)
    else:
        _certificates(runs, out, title, given, band=not no_band, envelope=envelope, samples=samples)
    tell(f"wrote {out}")


def _certificates(
    runs: tuple[str, ...],
    out: str,
    title: str | None,
    given: tuple[str, ...],
    *,
    band: bool,
    envelope: bool,
    samples: bool,
) -> None:
    from analysis.runs import read_all

    found = read_all(runs, warn)
    if samples:
        from analysis.vote_plots import plot_samples

        options.refuse_given(("no_band", "envelope", "given"), f"{options.FOR_CERTIFICATES} radius against samples")
        plot_samples(found, out, title=title)
        return
    from analysis.envelope import group
    from analysis.plots import plot_curves

    lines = curves_of(found, given, envelope=envelope)
    plot_curves(group(lines) if envelope else lines, out, title=title, band=band)


def _votes(runs: tuple[str, ...], image: str, out: str, title: str | None) -> None:
    from analysis.vote_plots import plot_votes
    from certify.runs.run_file import read_run

    options.refuse_given(("no_band", "envelope", "given"), f"{options.FOR_CERTIFICATES} the votes of one image")
    if len(runs) > 1:
        raise UserError(f"--image {image} with {len(runs)} runs: the votes of an image are one run's; name one")
    plot_votes(read_run(runs[0], allow_partial=True), image, out, title=title)


def _comparison(runs: tuple[str, ...], out: str) -> None:
    from analysis.comparison.plot import draw_comparison
    from analysis.runs import read_comparison

    options.refuse_beside_comparison(runs, ("title", *_CURVES))
    comparison = read_comparison(runs[0])
    comparison.require_sound()
    draw_comparison(comparison, out)


def _trainings(folders: tuple[str, ...], out: str, title: str | None) -> None:
    """Trainings are drawn together, and options for certificates say nothing about them."""
    from analysis.learning import is_training, plot_learning, read_learning

    for path in folders:
        if not is_training(path):
            raise UserError(f"{path} is no training, unlike the others; draw runs and trainings apart")
    options.refuse_given(_CURVES, f"{options.FOR_CERTIFICATES} trainings")
    plot_learning([read_learning(path) for path in folders], out, title=title)


def _speeds(files: tuple[str, ...], out: str, title: str | None) -> None:
    from analysis.speed_plot import is_speeds, plot_speeds, read_speeds

    for path in files:
        if not is_speeds(path):
            raise UserError(f"{path} holds no lines of certify bench --json, unlike the others; draw them apart")
    options.refuse_given(_CURVES, f"{options.FOR_CERTIFICATES} speeds")
    plot_speeds([speed for path in files for speed in read_speeds(path)], out, title=title)
