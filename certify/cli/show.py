"""``certify plot`` and ``certify table``: from run files (and the field's logs) to pictures and numbers."""

from __future__ import annotations

from pathlib import Path

import click

from certify.cli import options
from certify.cli.summary import warn
from certify.errors import RunFault

runs_argument = click.argument("runs", nargs=-1, required=True, metavar="RUN...")


@click.command()
@runs_argument
@click.option("-o", "--out", default="curve.png", show_default=True, help="Picture to write: .png, .svg or .pdf.")
@click.option("--title", help="Title above the axes.")
@click.option("--no-band", is_flag=True, help="Leave out the shaded 95 % interval over images.")
def plot(runs: tuple[str, ...], out: str, title: str | None, no_band: bool) -> None:
    """Draw certified accuracy over radius, one line a run.

    RUN is a run file of certify, or a log with columns idx label predict radius correct time.
    """
    from analysis.curves import curves
    from analysis.plots import check_format, plot_curves
    from analysis.runs import read_all

    check_format(out)
    plot_curves(curves(read_all(runs, warn)), out, title=title, band=not no_band)
    click.echo(f"wrote {out}")


@click.command()
@runs_argument
@click.option("--radii", type=options.Numbers(), help="Radii of the columns (default: round numbers).")
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "markdown", "latex", "csv"]),
    default="text",
    show_default=True,
    help="Form of the table.",
)
@click.option("--intervals", is_flag=True, help="Add the 95 % interval over images to each cell (csv always has it).")
@click.option("-o", "--out", help="Write to this file instead of stdout.")
def table(runs: tuple[str, ...], radii: list[float] | None, style: str, intervals: bool, out: str | None) -> None:
    """Tabulate certified accuracy at given radii, one line a run.

    RUN is a run file of certify, or a log with columns idx label predict radius correct time.
    """
    from analysis.curves import curves, default_radii
    from analysis.runs import read_all
    from analysis.tables import compare

    options.check_radii(radii)
    found = curves(read_all(runs, warn))
    if radii is None:
        radii = default_radii(max((float(c.radii[-1]) for c in found if len(c.radii)), default=0.0))
    text = compare(found, radii, style, intervals=intervals)
    if out is None:
        click.echo(text)
        return
    try:
        Path(out).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFault(f"could not write {out}: {error.strerror}") from None
    click.echo(f"wrote {out}")
