"""Radius against samples: what fewer samples would have certified, from the votes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.curves import common_norm, names
from analysis.figures import COLOURS, canvas, check_format, literal, log_ticks, save_figure, wrapped
from certify.errors import UserError
from certify.runs.image_rows import noise_of
from certify.runs.run_file import Run
from certify.smoothing.certificates import certificate_from_votes, largest_radius
from certify.smoothing.norms import IN_TEX
from certify.smoothing.procedures import votes_of
from certify.types import Votes

_STEPS = 13
_LEAST = 20
_MANY = 10_000  # from here on powers of ten alone are ticks enough


def sample_sizes(n: int) -> list[int]:
    """Numbers of samples from 20 to n, evenly on the logarithm."""
    return sorted({round(size) for size in np.geomspace(min(_LEAST, n), n, _STEPS)})


def radii_with(run: Run, size: int, seed: int = 0) -> np.ndarray:
    """The radius of each usable image if ``size`` samples had been drawn, float64, 0 for an abstention.

    The votes are drawn from the recorded ones without replacement, which has the law of as many fresh samples. The
    class is still the one that the recorded selection votes chose.

    Args:
        run: one with votes at a fixed n.
        size: at most that n.
        seed: of what is drawn.
    """
    header = run.header
    chance = np.random.default_rng([seed, size])
    found = []
    for row in run.usable:
        selection, votes = votes_of(row)
        drawn = chance.multivariate_hypergeometric([*votes.counts, votes.failures], size)
        certificate = certificate_from_votes(
            selection,
            Votes(tuple(int(count) for count in drawn[:-1]), int(drawn[-1])),
            noise=noise_of(header, row.get("values")),
            alpha=header["alpha"],
            bound=header["bound"],
            uniform=row.get("uniform", 1.0),
        )
        found.append(certificate.radius)
    return np.array(found)


def plot_samples(runs: Sequence[Run], path: str | Path, *, title: str | None = None) -> None:
    """Write the figure: median radius and middle half of the images over n, and the most that n samples can certify.

    Raises:
        UserError: a format that is not written; radii in different norms; a run without votes at a fixed n, or without
            a usable image.
        RunFault: the file cannot be written.
    """
    check_format(path)
    for run in runs:
        if run.header.get("procedure") != "certify" or run.header.get("stopping"):
            raise UserError(
                f"{run.path} has no votes at a fixed n; expected a run file of `certify --n N`, without --radius and "
                "--tolerance"
            )
    norm = common_norm(runs)
    labels, more = wrapped([*map(literal, names(runs)), "the most that n samples can certify"])
    with canvas(4.8, 3.3 + more) as (figure, axes):
        for i, (run, name) in enumerate(zip(runs, labels, strict=False)):
            sizes = sample_sizes(run.header["n"])
            radii = [radii_with(run, size) for size in sizes]
            if not radii[0].size:
                raise UserError(f"{run.path} holds no usable image")
            low, middle, high = np.array([np.percentile(found, (25, 50, 75)) for found in radii]).T
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(sizes, middle, color=colour, marker="o", ms=3, lw=1.6, label=name)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(sizes, [most_with(run, size) for size in sizes], color=colour, ls=":", lw=1.2)
        axes.plot([], [], color="#555555", ls=":", lw=1.2, label=labels[-1])
        axes.set(xscale="log", xlabel="samples n an image", ylim=(0, None))
        many = max(run.header["n"] for run in runs) >= _MANY
        log_ticks(axes.xaxis, "{x:,.0f}", (1.0,) if many else (1.0, 2.0, 5.0))
        axes.set_ylabel(f"{IN_TEX[norm]} radius\n(median and middle half of images)")
        if title:
            axes.set_title(title, fontsize=9)
        figure.legend(loc="outside lower center", ncols=1)
        save_figure(figure, Path(path))


def most_with(run: Run, size: int) -> float:
    """The radius of an image all of whose ``size`` votes agree."""
    header = run.header
    values = next((row["values"] for row in run.images if row.get("values")), None)
    selected = bool(header["n0"])
    return largest_radius(noise_of(header, values), size, header["alpha"], header["bound"], selected=selected)
