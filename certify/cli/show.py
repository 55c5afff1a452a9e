"""``certify table``, ``recompute`` and ``report``: from what runs left to numbers and a page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from certify.cli import options
from certify.cli.console import tell, warn, warn_of_precisions
from certify.cli.output_files import run_path
from certify.errors import RunFault, UserError
from certify.smoothing.rounding import exact

if TYPE_CHECKING:
    from analysis.curves import Curve
    from analysis.envelope import Line
    from certify.runs.run_file import Run


@click.command(short_help="Tabulate certified accuracy at given radii.")
@options.runs_argument
@click.option("--radii", type=options.Numbers(), help="Radii of the columns (default: round numbers).")
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "markdown", "latex", "csv"]),
    default="text",
    help="Form of the table.",
)
@click.option(
    "--intervals",
    is_flag=True,
    help="Add the 95 % interval over images to each cell (csv and --simultaneous always have one).",
)
@options.envelope_option
@options.name_option
@click.option(
    "--relative-to",
    type=options.Positive("a number above 0 and at most 1, such as 0.832", below=math.nextafter(1.0, 2.0)),
    help="Divide every accuracy by this one, such as that of the classifier without noise.",
)
@click.option(
    "--simultaneous",
    is_flag=True,
    help="One line a radius, with the share that holds for all images at once and an interval that allows for wrong "
    "certificates.",
)
@click.option(
    "--correction",
    type=click.Choice(["holm", "bonferroni"]),
    help="For --simultaneous: holm (at one radius) or bonferroni (at all radii together). Default: holm, and "
    "bonferroni where images stopped by themselves.",
)
@click.option("-o", "--out", metavar="FILE", help="Write to this file instead of stdout.")
def table(
    runs: tuple[str, ...],
    radii: list[float] | None,
    style: str,
    intervals: bool,
    envelope: bool,
    given: tuple[str, ...],
    relative_to: float | None,
    simultaneous: bool,
    correction: str | None,
    out: str | None,
) -> None:
    """Tabulate certified accuracy at given radii, one line a run.

    RUN is a run file of certify, or a log with columns idx label predict radius correct time. A certificate speaks for
    its image alone; --simultaneous says from the votes what holds for all images of a run at once.
    """
    from analysis.curves import default_radii
    from analysis.envelope import group
    from analysis.runs import is_comparison, read_all
    from analysis.tables import compare, compare_families

    if any(is_comparison(path) for path in runs):
        _table_of_comparison(runs, style, out)
        return
    options.check_radii(radii)
    if correction and not simultaneous:
        raise UserError(f"--correction {correction} is for all images at once; pass --simultaneous too")
    if simultaneous and envelope:
        raise UserError("--simultaneous speaks for one run, --envelope chooses among several; pass one of them")
    if simultaneous and relative_to is not None:
        raise UserError("--relative-to divides accuracies, and --simultaneous shows more than those; pass one of them")
    found = curves_of(read_all(runs, warn), given, envelope=envelope)
    lines: Sequence[Line] = group(found) if envelope else found
    if radii is None:
        asked = sorted({r for line in lines for r in line.decided}) if all(line.decided for line in lines) else []
        radii = asked or default_radii(max((float(line.radii[-1]) for line in lines if len(line.radii)), default=0.0))
    if simultaneous:
        text = compare_families(found, radii, style, correction)
    else:
        text = compare(lines, radii, style, intervals=intervals, relative_to=relative_to)
    _put(text, out, runs)


def curves_of(runs: Sequence[Run], given: Sequence[str], *, envelope: bool) -> list[Curve]:
    """The runs' curves under the names that were given, if any; warns where they hardly compare."""
    from analysis.curves import curves

    if envelope and given:
        raise UserError("--name names runs, --envelope shows methods; pass one of them")
    warn_of_precisions(runs)
    return curves(runs, given)


def _put(text: str, out: str | None, runs: Sequence[str]) -> None:
    """Print the text, or write it to a file that is none of these runs, and no run at all."""
    if out is None:
        tell(text)
        return
    from certify.runs.run_file import peek_header

    if peek_header(out) is not None or (os.path.exists(out) and any(os.path.samefile(out, run) for run in runs)):
        raise UserError(f"--out {out} is a run file, which a table does not replace; name another file")
    try:
        Path(out).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFault(f"could not write {out}: {error.strerror}") from None
    tell(f"wrote {out}")


def _table_of_comparison(paths: tuple[str, ...], style: str, out: str | None) -> None:
    """One file of `certify compare`, whose columns are its own."""
    from analysis.comparison.tables import tabulate_comparison
    from analysis.runs import read_comparison

    options.refuse_beside_comparison(paths, ("radii", "intervals", "envelope", "given", "relative_to", "simultaneous"))
    found = read_comparison(paths[0], warn)
    _put(tabulate_comparison(found, style), out, paths)
    found.require_sound()


@click.command(short_help="Certify the votes of a run again, at another alpha or bound.")
@click.argument("run", metavar="RUN")
@options.alpha_and_bound("the run's")
@click.option("--out", metavar="PATH", help="New run file (.jsonl), or a folder for it (default: RUN's).")
@click.option("--radii", type=options.Numbers(), help="Radii of the table (default: round numbers).")
@options.as_json("the table")
def recompute(
    run: str, alpha: float | None, bound: str | None, out: str | None, radii: list[float] | None, as_json: bool
) -> None:
    """Certify the votes of RUN again, at another alpha or with another bound, into a new run file: no model, no images.

    Choose both before you look: the smallest of several tries has no guarantee. A bound that the run's design cannot
    support is refused: fixed-n bounds where images stopped by themselves, or where no selection votes chose the class.
    """
    from certify.cli.summary import summarise
    from certify.runs.recompute import recompute_file
    from certify.smoothing.bounds import BOUNDS
    from certify.smoothing.stopping_rules import RULES

    if bound is not None and bound not in RULES:
        BOUNDS.get(bound)
    options.check_radii(radii)
    source = Path(run)
    words = [source.stem, *([f"alpha{exact(alpha)}"] if alpha is not None else []), *([bound] if bound else [])]
    if len(words) == 1:
        raise UserError("recompute without --alpha and --bound would change nothing; pass one of them")
    name = "-".join(words) + ".jsonl"
    target = run_path(out, source.parent, name)
    renewed = recompute_file(source, target, alpha=alpha, bound=bound, command=options.command_line(), warn=warn)
    summarise(renewed, radii, as_json=as_json)


@click.command(short_help="Write an audit's report again, as one HTML file.")
@click.argument("folder", metavar="RUN")
def report(folder: str) -> None:
    """Write RUN/report.html anew from the records in RUN, the folder of an audit, however far it came.

    One file that loads nothing and runs no script: verdict, certified accuracy, every image, failures, cost, method.
    """
    from analysis.report.page import write_report

    tell(f"wrote {write_report(folder)}")
