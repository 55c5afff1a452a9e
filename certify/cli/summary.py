"""Results of a run as text, as one JSON object and as a figure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.cli.console import tell
from certify.runs.progress import duration
from certify.smoothing.rounding import exact, floor_to
from certify.text import printable

if TYPE_CHECKING:
    from analysis.curves import Curve
    from certify.runs.records import ImageRow, RunHeader
    from certify.runs.run_file import Run


_LISTED = 20  # images without labels, each with its answer
_EACH = ("id", "label", "base", "prediction", "class", "radius", "p_lower", "decisions", "error")  # of images, in JSON
_NAMED = 5  # images that were set aside, by name


def summarise(
    run: Run, radii: list[float] | None, *, as_json: bool, rate: float | None = None, draw: bool = True
) -> None:
    """Print the table (or one JSON object) on stdout; for certificates, draw the curve beside the run file.

    A shard has neither table nor curve as text: it is merged first.

    Args:
        run: the run.
        radii: of the table; None: round ones.
        as_json: print one JSON object.
        rate: samples per second, which give the time that the saved samples would have taken.
        draw: draw the curve.

    Raises:
        UserError: no image could be used.
    """
    from certify.runs.transaction import warn_of_results

    shard = run.header.shard
    if shard is not None and not as_json:
        warn_of_results(run)
        tell(f"shard {shard.index}/{shard.of}: {len(run.images):,} of {run.header.expected:,} images in {run.path}")
        return
    from certify.smoothing.procedures import Accuracy  # here, as it imports numpy

    if run.header.kind == Accuracy.kind:
        from certify.cli.accuracy import show_bound

        show_bound(run, radii, as_json=as_json)
        return
    warn_of_results(run)
    curve, picture = None, None
    if not run.header.without_radii:
        from analysis.curves import curves, table_radii

        (curve,) = curves([run])
        radii = radii or table_radii(run)
        picture = run.path.with_suffix(".png") if draw and shard is None else None
    if as_json:
        tell(json.dumps(_as_json(run, curve, radii or [], picture, rate)))
    else:
        tell(_describe(run, curve, radii or [], rate))
        tell(f"\nrun file   {run.path}" + (f"\ncurve      {picture}" if picture else ""))
    if curve is not None and picture is not None:
        from analysis.plots import plot_curves

        plot_curves([curve], picture)  # last: when it cannot be written, the numbers are out already


def how_it_ran(header: RunHeader) -> str:
    """Describe precision, folding, compilation, batch size and device."""
    from certify.engine.execution import Execution

    execution = Execution(header.precision, header.folded, header.compiled, header.batch_size)  # type: ignore[arg-type]
    return f"{execution.describe()}, on {header.accelerator or header.device}"


def _count(rows: list[ImageRow]) -> tuple[int, int, int]:
    """Return the numbers of images correct without noise, correct when smoothed, and abstained."""
    return (
        sum(row.base == row.label for row in rows),
        sum(row.prediction == row.label for row in rows),
        sum(row.abstained for row in rows),
    )


def _samples(run: Run) -> tuple[int, int]:
    """Return the samples that were labelled, and those that a fixed n takes for the same images."""
    rows, header = run.usable, run.header
    drawn = sum(row.trials + header.n0 if row.drawn is None else row.drawn for row in rows)
    return drawn, len(rows) * (header.n + header.n0)


def _outcomes(run: Run) -> dict[str, dict[str, int]]:
    """Count the images that are robust, not certifiable and undecided at each radius."""
    outcomes: dict[str, dict[str, int]] = {}
    for row in run.usable:
        for decision in row.outcomes:
            at = outcomes.setdefault(exact(decision.radius), {"robust": 0, "not certifiable": 0, "undecided": 0})
            at[decision.outcome] += 1
    return outcomes


def _correct(rows: list[ImageRow], radius: str) -> int:
    """Count the images that are robust at a radius with the right class."""
    right = [row for row in rows if row.prediction == row.label]
    return sum(exact(one.radius) == radius and one.outcome == "robust" for row in right for one in row.outcomes)


def _accuracies(rows: list[ImageRow], *, denoised: bool, smoothed: bool) -> list[str]:
    """Return the accuracies of the classifier alone, of the base classifier without noise, and smoothed."""
    from analysis.tables import share

    base, predicted, _ = _count(rows)
    counts = {"denoised, without noise" if denoised else "base accuracy (no noise)": base}
    if all(row.alone is not None for row in rows):
        counts = {"classifier alone": sum(row.alone == row.label for row in rows), **counts}
    if smoothed:
        counts["smoothed accuracy"] = predicted
    return [f"{name:<26} {share(count, len(rows))}" for name, count in counts.items()]


def _as_json(
    run: Run, curve: Curve | None, radii: list[float], picture: Path | None, rate: float | None
) -> dict[str, Any]:
    rows = run.usable
    drawn, fixed = _samples(run)
    seconds = sum(row.seconds for row in rows)
    shares, intervals = None, None
    if curve is not None:
        known = [r for r in radii if not curve.at_least(r)]
        shares = {exact(r): float(a) for r, a in zip(known, curve.accuracy(known), strict=True)}
        ends = zip(*(part.tolist() for part in curve.interval(known)), strict=True)
        intervals = dict(zip(shares, ends, strict=True))
    labelled = rows[0].label is not None
    base, smoothed, abstained = _count(rows)
    deciding = bool(run.header.radii)  # makes no statement about the prediction alone
    same, compared = run.agreement
    header = run.header
    return {
        "run": str(run.path),
        **{key: header[key] for key in ("model", "data", "noise", "sigma", "n0", "n", "alpha", "bound", "seed")},
        "version": header.versions.get("certify-toolkit"),
        "expected": header.expected,
        "partial": run.partial,
        "images": len(rows),
        "norm": header.norm,
        "certified_accuracy": shares if labelled else None,
        "certified_fraction": None if labelled else shares,
        "intervals_95": intervals,
        "largest_radius": curve.limit if curve is not None and math.isfinite(curve.limit) else None,
        "decisions": _outcomes(run) or None,
        "base_accuracy": base / len(rows) if labelled else None,
        "smoothed_accuracy": smoothed / len(rows) if labelled and not deciding else None,
        "abstained": None if deciding else abstained,
        "unreadable": len(run.images) - len(rows),
        "ran_as": {k: run.header[k] for k in ("precision", "folded", "compiled", "batch_size", "device")},
        "agreement_with_float32": same / compared if compared else None,
        "samples": drawn,
        "samples_at_fixed_n": fixed,
        "samples_per_second": round(drawn / seconds, 1) if seconds else None,
        "seconds": round(seconds, 3),
        "seconds_at_fixed_n": round(fixed / rate, 1) if rate else None,
        "curve": str(picture) if picture else None,
        "results": [{k: v for k, v in row.to_json().items() if k in _EACH} for row in run.images],
    }


def title(run: Run) -> str:
    """Return the first line of a run's table."""
    h = run.header
    model, data = printable(str(h.model)), printable(str(h.data))
    return f"{model}, sigma = {exact(h.sigma)} ([0, 1] pixels), {len(run.usable):,} images of {data}"


def _describe(run: Run, curve: Curve | None, radii: list[float], rate: float | None) -> str:
    from analysis.tables import one_run
    from certify.runs.run_file import SET_ASIDE
    from certify.smoothing.norms import IN_WORDS

    rows, header = run.usable, run.header
    lines = [title(run)]
    if run.omissions:
        lines.append(run.omissions)
        aside = [row for row in run.images if (row.error or "").startswith(SET_ASIDE)]
        lines += [f"image {printable(row.id)} {printable(row.error or '')}" for row in aside[:_NAMED]]
    lines.append("")
    if curve is not None:
        lines += [one_run(curve, radii), ""]
    deciding = bool(header.radii)
    for radius, outcomes in _outcomes(run).items():
        right = f" ({_correct(rows, radius)} of them correct)" if rows[0].label is not None else ""
        counts = [f"{count} {outcome}{right * (outcome == 'robust')}" for outcome, count in outcomes.items()]
        lines.append(f"{f'decided at {radius}':<26} {', '.join(counts)}")
    if rows[0].label is not None:
        lines += _accuracies(rows, denoised=header.denoiser not in (None, "none"), smoothed=not deciding)
    else:
        lines += _each(rows, header.norm)
    if not deciding:
        lines.append(f"abstained                  {_count(rows)[2]} of {len(rows)}")
    if header.stopping is not None:
        lines.append(f"samples                    {_saved(run, rate)}")
    lines.append(f"ran as                     {how_it_ran(header)}")
    same, compared = run.agreement
    if compared:
        lines.append(f"agreement with float32     {same:,} of {compared:,} labels")
    error = f"wrong with probability at most {exact(header.alpha)}"
    norm = IN_WORDS[header.norm]
    if deciding:
        lines.append(
            f"\nRobust at r: no change of {norm} norm below r alters the smoothed classifier's prediction.\n"
            "Not certifiable: the top class's probability is too low for r (--bound best may still certify it).\n"
            f"For each image all of this is {error} over the noise draws."
        )
    elif curve is not None:
        lines.append(
            f"\nEach certificate says: no change of {norm} norm below its radius alters the smoothed classifier's\n"
            f"prediction. For its image it is {error} over the noise draws."
        )
    else:
        lines.append(
            f"\nEach prediction is the smoothed classifier's; for its image it is {error} over the noise draws."
        )
    return "\n".join(lines)


def _saved(run: Run, rate: float | None) -> str:
    """Describe the samples and time saved by stopping early."""
    (drawn, fixed), seconds = _samples(run), sum(row.seconds for row in run.usable)
    text = f"{drawn:,} instead of {fixed:,} (n = {run.header.n:,} each){_fewer(fixed / max(drawn, 1))}"
    if rate is None or 2 * seconds > fixed / rate:
        return text
    return f"{text}; {duration(seconds)} instead of about {duration(fixed / rate)}"


def _fewer(ratio: float) -> str:
    """Describe how many times fewer samples were drawn; empty if they were not fewer."""
    if ratio < 1.01:
        return ""
    if ratio < 2:
        return f": {100 * (1 - 1 / ratio):.0f} % fewer"
    return f": {ratio:.1f} times fewer" if ratio < 10 else f": {ratio:,.0f} times fewer"


def _each(rows: list[ImageRow], norm: str) -> list[str]:
    """Return the predictions themselves, for images without labels."""
    from analysis.tables import render
    from certify.smoothing.norms import DECIMALS, IN_WORDS

    def radius(row: ImageRow) -> str:
        return "-" if row.radius is None else floor_to(row.radius, DECIMALS[norm])

    shown = [[row.id, _class_or_outcome(row), radius(row), row.base_class] for row in rows[:_LISTED]]
    more = [f"... and {len(rows) - _LISTED} more, in the run file"] if len(rows) > _LISTED else []
    return [
        render(["image", "smoothed class", f"{IN_WORDS[norm]} radius", "class without noise"], shown, "text"),
        *more,
        "",
    ]


def _class_or_outcome(row: ImageRow) -> str:
    if not row.abstained:
        return str(row.class_name)
    outcomes = [decision.outcome for decision in row.outcomes]
    return outcomes[0] if outcomes else "abstains"
