"""Plot the votes of a run: the votes of one image, and certified radius over number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.curves import common_norm, names
from analysis.figures import COLOURS, add_legend, canvas, current_style, literal, log_ticks, tick_name, wrapped
from certify.errors import UserError
from certify.runs.records import ImageRow
from certify.runs.run_file import Run
from certify.smoothing.certificates import certificate_from_votes, largest_radius
from certify.smoothing.norms import DECIMALS, IN_TEX
from certify.smoothing.rounding import ceil_to, exact, floor_to
from certify.types import ABSTAIN, Votes

_MAX_BARS = 8  # classes with their own bar
_STEPS, _FEWEST = 13, 20  # number of points of a line, and n at the first of them
_MANY = 10_000  # n from which ticks are at powers of ten only


def plot_votes(run: Run, image_id: str, path: str | Path, *, title: str | None = None) -> None:
    """Plot one image's votes: the share of each class, and the bounds its radius was computed from.

    Args:
        run: a run file of certify.
        image_id: id of one of its images.
        path: .png, .svg or .pdf.
        title: replaces the description of the certificate.

    Raises:
        UserError: an unknown format; no such image; an image without votes.
        RunFault: the file cannot be written.
    """
    row = _row(run, image_id)
    votes = row.estimation_votes
    counts = [(count, label) for label, count in enumerate(votes.counts) if count and label != row.label]
    if row.label is not None:  # always has its own bar, even without votes
        counts.append((dict(enumerate(votes.counts)).get(row.label, 0), row.label))
    counts.sort(key=lambda pair: (pair[1] == row.label, pair[0]), reverse=True)
    shown, rest = counts[:_MAX_BARS], counts[_MAX_BARS:]
    shown, rest = (counts, []) if len(rest) == 1 else (shown, rest)
    bars = [
        (_name(row, label) + " (label)" * (label == row.label), count, label == row.prediction)
        for count, label in sorted(shown, reverse=True)
    ]
    if rest:
        bars.append((f"{len(rest)} others", sum(count for count, _ in rest), False))
    if votes.failures:
        bars.append(("no answer", votes.failures, False))
    heading = title or literal(_describe(run, row))
    with canvas(4.8, 1.1 + 0.28 * len(bars), path, grid="x", title=heading) as (figure, axes):
        for place, (_, count, leads) in enumerate(bars):
            share = count / votes.trials
            axes.barh(place, share, height=0.62, color=COLOURS[0] if leads else "#B8C4CE")
            axes.text(share + 0.01, place, f"{count:,}", va="center", fontsize="small")
        lower, other = row.p_lower, row.p_other
        if lower:
            label = f"lower bound of the prediction: {floor_to(lower)}"
            axes.axvline(lower, color=COLOURS[1], lw=1.4, label=label)
        if other and other < 1 - (lower or 0):
            label = f"upper bound of every other class: {ceil_to(other)}"
            axes.axvline(other, color=COLOURS[2], ls="--", lw=1.4, label=label)
        axes.set_yticks(range(len(bars)), [tick_name(name) for name, _, _ in bars])
        axes.set(xlim=(0, 1.12), ylim=(len(bars) - 0.4, -0.6), xlabel=f"share of {votes.trials:,} votes under noise")
        if axes.get_legend_handles_labels()[0]:
            add_legend(figure, axes, 2)


def _row(run: Run, image_id: str) -> ImageRow:
    row = next((row for row in run.images if row.id == image_id), None)
    if row is None:
        some = ", ".join(row.id for row in run.images[:3])
        raise UserError(f"{run.path} holds no image {image_id!r}; expected one of its ids, such as {some}")
    if not row.has("votes") or row.error is not None:
        raise UserError(
            f"{run.path} holds no votes for image {image_id}; expected an image that was certified without error"
        )
    return row


def _name(row: ImageRow, label: int) -> str:
    base = row.base if row.has("base") else None
    if label == row.prediction and row.class_name:
        return row.class_name
    if label == base and row.base_class:
        return row.base_class
    numbered = str(label) if row.base_class == str(base) else f"class {label}"
    return (row.classes or {}).get(str(label), numbered)


def _describe(run: Run, row: ImageRow) -> str:
    header = run.header
    if row.prediction == ABSTAIN:
        answer = "abstains"
    else:
        digits = DECIMALS[header.norm]
        right = {True: "right", False: "wrong"}[row.prediction == row.label] if row.label is not None else ""
        radius = f", radius {floor_to(row.radius, digits)}" if row.radius is not None else ""
        answer = f"{_name(row, row.prediction)}{f' ({right})' if right else ''}{radius}"
    return f"image {row.id}, sigma {exact(header.sigma)}: {answer}"


def sample_sizes(n: int) -> list[int]:
    """Return numbers of samples from 20 to n, evenly spaced on a logarithmic axis."""
    return sorted({round(size) for size in np.geomspace(min(_FEWEST, n), n, _STEPS)})


def radii_with(run: Run, size: int, seed: int = 0) -> np.ndarray:
    """Return each usable image's radius if only ``size`` samples had been drawn, float64; 0 for an abstention.

    Votes are subsampled from the recorded ones without replacement, which has the distribution of as many new samples.
    The class remains the one that the recorded selection votes chose.

    Args:
        run: run with votes at a fixed n.
        size: number of samples, at most that n.
        seed: seed of the subsampling.
    """
    header = run.header
    rng = np.random.default_rng([seed, size])
    radii = []
    for row in run.usable:
        selection, votes = row.selection_votes, row.estimation_votes
        drawn = rng.multivariate_hypergeometric([*votes.counts, votes.failures], size)
        certificate = certificate_from_votes(
            selection,
            Votes(tuple(int(count) for count in drawn[:-1]), int(drawn[-1])),
            noise=header.radii_for(row.size),
            alpha=header.alpha,
            bound=header.bound,
            uniform=row.recorded.uniform,
        )
        radii.append(certificate.radius)
    return np.array(radii)


def plot_samples(runs: Sequence[Run], path: str | Path, *, title: str | None = None) -> None:
    """Plot median and middle half of the images' radii over n, and the largest radius that n samples can certify.

    Raises:
        UserError: an unknown format; radii in different norms; a run without votes at a fixed n, or without a usable
            image.
        RunFault: the file cannot be written.
    """
    for run in runs:
        if not run.header.has("kind") or run.header.kind != "certify" or run.header.stopping is not None:
            raise UserError(
                f"{run.path} has no votes at a fixed n; expected a run file of `certify --n N`, without --radius and "
                "--tolerance"
            )
    norm = common_norm(runs)
    labels, more = wrapped([*map(literal, names(runs)), "largest radius that n samples can certify"])
    with canvas(4.8, 3.3 + more, path, title=title) as (figure, axes):
        for i, (run, name) in enumerate(zip(runs, labels, strict=False)):
            sizes = sample_sizes(run.header.n)
            radii = [radii_with(run, size) for size in sizes]
            if not radii[0].size:
                raise UserError(f"{run.path} holds no usable image")
            low, middle, high = np.array([np.percentile(values, (25, 50, 75)) for values in radii]).T
            colour, _ = current_style().line(i)
            axes.plot(sizes, middle, color=colour, marker="o", ms=3, lw=1.6, label=name)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(sizes, [largest_with(run, size) for size in sizes], color=colour, ls=":", lw=1.2)
        axes.plot([], [], color="#555555", ls=":", lw=1.2, label=labels[-1])
        axes.set(xscale="log", xlabel="samples n per image", ylim=(0, None))
        many = max(run.header.n for run in runs) >= _MANY
        log_ticks(axes.xaxis, "{x:,.0f}", (1.0,) if many else (1.0, 2.0, 5.0))
        axes.set_ylabel(f"{IN_TEX[norm]} radius\n(median and middle half of images)")
        add_legend(figure, axes, 1)


def largest_with(run: Run, size: int) -> float:
    """Return the radius of an image whose ``size`` votes are unanimous."""
    header = run.header
    values = next((row.size for row in run.images if row.size), None)
    return largest_radius(header.radii_for(values), size, header.alpha, header.bound, selected=header.n0 > 0)
