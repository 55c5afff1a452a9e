"""``certify table``, ``recompute``, ``replay`` and ``report``: tables, certificates and reports from saved results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli.audit_messages import print_replay
from certify.cli.console import tell, warn, warn_of_precisions, warn_of_samples
from certify.cli.option_groups import TABLE_FORMATS, CurveOptions, JsonOptions, RadiiOptions, RecomputeOptions
from certify.cli.options import check_radii, command, command_line, flag, option, refuse_given
from certify.cli.parameter_types import Positive
from certify.cli.summary import summarise
from certify.errors import RunFault, UserError
from certify.smoothing.rounding import exact

if TYPE_CHECKING:
    from analysis.curves import Curve
    from analysis.envelope import Line
    from analysis.tables import TableLayout
    from certify.runs.run_file import Run

ONLY_CERTIFICATES = "applies to runs of certificates; leave it out for"
"""Reason of :func:`refuse_given` where something else is shown."""


class TableOptions(CurveOptions):
    """Form and statistics of a table."""

    style: str = option("--format", type=TABLE_FORMATS, default="text", help="Format of the table.")
    intervals: bool = flag(
        help="Add the 95 % interval over images to each cell (csv and --simultaneous always have one)."
    )
    relative_to: float | None = option(
        type=Positive("a number above 0 and at most 1, such as 0.832", below=math.nextafter(1.0, 2.0)),
        help="Divide every accuracy by this one, such as that of the classifier without noise.",
    )
    per_class: bool = flag(help="One line for each class of the labels, in place of each run.")
    simultaneous: bool = flag(
        help="One line per radius: the share that holds for all images at once, with an interval that allows for wrong "
        "certificates."
    )
    correction: str | None = option(
        type=click.Choice(["holm", "bonferroni"]),
        help="For --simultaneous: holm (at one radius) or bonferroni (at all radii together). Default: holm, and "
        "bonferroni for runs of a sequential test.",
    )
    columns: str | None = option(
        metavar="NAMES", help="Columns before those of the radii, separated by commas: images,abstained,ACR; none."
    )
    bold_best: bool = flag(help="Print the largest accuracy at each radius in bold (LaTeX, Markdown).")
    caption: str | None = option(metavar="TEXT", help="Caption of a LaTeX table; your own LaTeX is not escaped.")
    label: str | None = option(metavar="NAME", help="Label of a LaTeX table, for references.")
    out: str | None = option("-o", "--out", metavar="FILE", help="File to write, in place of stdout.")

    @property
    def layout(self) -> TableLayout:
        """Columns, bold figures and the frame of a LaTeX table."""
        from analysis.tables import TableLayout

        chosen = None if self.columns is None else [name for name in self.columns.split(",") if name != "none"]
        return TableLayout(self.caption, self.label, chosen, self.bold_best, self.names)


_OF_LAYOUT = ("columns", "bold_best", "caption", "label")


@command("Tabulate certified accuracy at given radii.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
def table(runs: tuple[str, ...], columns: RadiiOptions, options: TableOptions) -> None:
    """Tabulate certified accuracy at given radii, one line per run.

    RUN is a run file of certify, or a log with columns idx label predict radius correct time. A certificate is a
    statement about one image; --simultaneous derives from the votes what holds for all images of a run at once.
    """
    from analysis.curves import by_class, default_radii
    from analysis.envelope import group
    from analysis.runs import is_comparison, read_all
    from analysis.tables import compare, compare_families

    if any(is_comparison(path) for path in runs):
        _show_comparison(runs, options)
        return
    radii = columns.radii
    check_radii(radii)
    if options.correction and not options.simultaneous:
        raise UserError(f"--correction {options.correction} is for all images at once; pass --simultaneous too")
    if options.simultaneous and options.envelope:
        raise UserError("--simultaneous is about one run, --envelope chooses among several; pass one of them")
    if options.simultaneous and options.relative_to is not None:
        raise UserError("--relative-to divides accuracies, and --simultaneous shows more than those; pass one of them")
    curves = named_curves(read_all(runs, warn), options)
    if options.per_class:
        if options.envelope or options.simultaneous:
            raise UserError("--per-class is about one run; leave out --envelope and --simultaneous")
        curves = [part for whole in curves for part in by_class(whole)]
    lines: Sequence[Line] = group(curves) if options.envelope else curves
    if radii is None:
        decided = sorted({r for line in lines for r in line.decided}) if all(line.decided for line in lines) else []
        radii = decided or default_radii(max((float(line.radii[-1]) for line in lines if len(line.radii)), default=0.0))
    if options.simultaneous:
        refuse_given(_OF_LAYOUT, f"{ONLY_CERTIFICATES} --simultaneous")
        text = compare_families(curves, radii, options.style, options.correction)
    else:
        if options.style != "latex":
            refuse_given(("caption", "label"), "is for --format latex; leave it out here")
        shown: Any = {"intervals": options.intervals, "relative_to": options.relative_to, "layout": options.layout}
        text = compare(lines, radii, options.style, **shown)
    _write(text, options.out, runs)


def named_curves(runs: Sequence[Run], options: CurveOptions, *, short: bool = False) -> list[Curve]:
    """Return the curves of these runs, under the names that were given; warn if precisions differ."""
    from analysis.curves import curves

    if options.envelope and options.names:
        raise UserError("--name names runs, --envelope shows methods; pass one of them")
    warn_of_precisions(runs)
    warn_of_samples(runs)
    return curves(runs, options.names, short=short)


def _write(text: str, out: str | None, runs: Sequence[str]) -> None:
    """Print the text, or write it to a file; refuse to replace a run file or one of the inputs."""
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


def _show_comparison(paths: tuple[str, ...], options: TableOptions) -> None:
    """Show the file of one `certify compare`, which has columns of its own."""
    from analysis.comparison.tables import tabulate_comparison
    from analysis.runs import read_comparison

    refuse_beside_comparison(
        paths, ("radii", "intervals", "envelope", "names", "relative_to", "simultaneous", "per_class", *_OF_LAYOUT)
    )
    comparison = read_comparison(paths[0], warn)
    _write(tabulate_comparison(comparison, options.style), options.out, paths)
    comparison.require_sound()


def refuse_beside_comparison(paths: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Refuse a comparison among other files, and options that do not apply to it."""
    if len(paths) > 1:
        raise UserError(f"{len(paths)} files, a comparison among them: a comparison is shown alone; name one")
    refuse_given(names, f"{ONLY_CERTIFICATES} a comparison")


class RecomputeTarget(JsonOptions):
    """The new run file."""

    out: str | None = option(metavar="PATH", help="New run file (.jsonl), or a folder for it (default: RUN's).")


@command("Recompute a run's certificates at another alpha or bound.")
@click.argument("run", metavar="RUN")
def recompute(run: str, options: RecomputeOptions, columns: RadiiOptions, output: RecomputeTarget) -> None:
    """Recompute certificates from the votes of RUN, at another alpha or with another bound: no model, no images.

    Choose both before you see results: the smallest of several radii has no guarantee. A bound that is invalid for
    the run is refused: fixed-n bounds for a sequential test, or where no selection votes chose the class.
    """
    from certify.runs.files import new_run_file, run_path
    from certify.runs.recompute import recompute as recomputed
    from certify.runs.run_file import Run, write_derived
    from certify.smoothing.bounds import BOUNDS
    from certify.smoothing.stopping_rules import RULES

    alpha, bound = options.alpha, options.bound
    if bound is not None and bound not in RULES:
        BOUNDS.get(bound)
    check_radii(columns.radii)
    source = Path(run)
    words = [source.stem, *([f"alpha{exact(alpha)}"] if alpha is not None else []), *([bound] if bound else [])]
    if len(words) == 1:
        raise UserError("recompute without --alpha and --bound would change nothing; pass one of them")
    target = new_run_file(run_path(output.out, source.parent, "-".join(words) + ".jsonl"))
    changed = recomputed(Run.read(source), alpha=alpha, bound=bound, command=command_line())
    summarise(write_derived(target, *changed), columns.radii, as_json=output.as_json)


class ReplayOutput(JsonOptions):
    """Run file of the recomputed certificates, and the form of the result on stdout."""

    out: str | None = option(metavar="FILE", help="Also write the certificates as a run file (.jsonl).")


@command("Recompute an audit's certificates from its logged replies.")
@click.argument("folder", metavar="RUN")
def replay(folder: str, options: RecomputeOptions, output: ReplayOutput) -> None:
    """Recompute an audit's certificates from the replies in its ledger: no data, no model, no service.

    States whether they equal those of RUN/run.jsonl. With another --alpha or --bound, the same replies are evaluated
    anew; an image of a sequential test is then settled by the replies that exist, or is undecided.
    """
    from certify.blackbox.results import replay as recompute
    from certify.runs.files import new_run_file
    from certify.runs.run_file import write_derived

    target = None if output.out is None else new_run_file(output.out)
    replayed = recompute(folder, alpha=options.alpha, bound=options.bound, command=command_line())
    if target is not None:
        run = write_derived(target, replayed.run.header, replayed.run.images)
        replayed = dataclasses.replace(replayed, run=run)
    if output.as_json:
        run = replayed.run
        rows = [row.to_json() for row in run.images]
        tell(json.dumps({"header": run.header.to_json(), "images": rows, "differing": replayed.differing}))
    else:
        print_replay(replayed, anew=options.alpha is not None or options.bound is not None)
    if replayed.differing:
        raise RunFault(
            f"{len(replayed.differing)} of {len(replayed.run.images)} certificates differ from the run file's; first: "
            f"{replayed.differing[0]}: run.jsonl or ledger.jsonl was changed, or an audit was killed: its command "
            "resumes it"
        )


@command("Write an audit's report again, as one HTML file.")
@click.argument("folder", metavar="RUN")
def report(folder: str) -> None:
    """Write RUN/report.html from the records in RUN, the folder of a finished or unfinished audit.

    One self-contained file without scripts: verdict, certified accuracy, every image, failures, cost, method.
    """
    from analysis.report.page import write_report

    tell(f"wrote {write_report(folder)}")
