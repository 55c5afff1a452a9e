"""``certify accuracy``: the expected accuracy of all images together under attack, from one noisy copy of each."""

from __future__ import annotations

import json
import textwrap
from dataclasses import fields
from typing import TYPE_CHECKING

import click

from certify.cli.console import tell, warn
from certify.cli.load import check_classifier, check_noise
from certify.cli.option_groups import (
    ClusterOptions,
    DataOptions,
    ModelOptions,
    NoiseOptions,
    OutputOptions,
    RadiiOptions,
    SampleOptions,
)
from certify.cli.options import Options, check_radii, command, flag, option, overridden, refuse_given
from certify.cli.parameter_types import Count
from certify.cli.run import do_run
from certify.errors import UserError

if TYPE_CHECKING:
    from analysis.accuracy_bound import AccuracyBound
    from certify.runs.run_file import Run


class AccuracyModelOptions(ModelOptions):
    """A frozen classifier; required without a run file, and then checked."""

    model: str = overridden(ModelOptions, "model", required=False, default=None)


class AccuracyNoiseOptions(NoiseOptions):
    """Smoothing distribution, denoiser and seed; sigma is required without a run file."""

    sigma: float = overridden(NoiseOptions, "sigma", required=False, default=None)


class AccuracyStatistics(Options, section="Statistics"):
    """The statement about all images."""

    draws: int = option(type=Count("noisy copies of each image"), default=1, help="Noisy copies of each image.")
    alpha: float | None = overridden(
        SampleOptions,
        "alpha",
        default=None,
        help="Failure probability of the statement about all images and all radii (default: 0.001, or RUN's).",
    )
    population: bool = flag(
        help="Take the images as a random sample and bound the accuracy over their population; without this option, "
        "over these images."
    )


class BesideOptions(RadiiOptions):
    """Contents of the table and the figure."""

    beside: str | None = option(
        metavar="RUN", help="Run of certificates whose certified accuracy (of the majority vote) is shown beside."
    )


_OF_A_NEW_RUN = {
    field.name
    for group in (AccuracyModelOptions, AccuracyNoiseOptions, DataOptions, ClusterOptions, OutputOptions)
    for field in fields(group)
} - {"as_json"} | {"draws"}


@command(
    "Bound the accuracy of all images together under attack, from one noisy copy of each.",
    main=("model", "data", "max_images", "sigma", "denoiser", "draws", "population", "out"),
)
@click.argument("run", required=False, metavar="[RUN]")
def accuracy(
    run: str | None,
    model: AccuracyModelOptions,
    noise: AccuracyNoiseOptions,
    data: DataOptions,
    statistics: AccuracyStatistics,
    compute: ClusterOptions,
    table: BesideOptions,
    output: OutputOptions,
) -> None:
    """Bound the accuracy under attack of a classifier that answers each request from one fresh noisy copy.

    One noisy copy of each image is labelled, so 1,000 images cost 1,000 samples. From the number of correct answers
    follows a lower bound on the mean accuracy, without an attack and if every image is changed by at most r. It holds
    at all r at once, and says nothing about a single image.

    RUN is a run file of this command, or of certificates or predictions at a fixed n, whose votes then serve; no model
    is needed. Otherwise --model and --sigma are.
    """
    check_radii(table.radii)
    beside = None if table.beside is None else _read(table.beside)
    if run is not None:
        refuse_given(_OF_A_NEW_RUN, "is for a new run; leave it out, or leave out RUN")
        show_bound(_read(run), table.radii, statistics, beside, as_json=output.as_json)
        return
    if model.model is None or noise.sigma is None:
        raise UserError("expected a run file, or --model and --sigma for a new run")
    if data.data is None and model.model != "digits":
        raise UserError("--data is missing: expected images, such as a folder, a .zip or an .npz")
    from certify.smoothing.procedures import Accuracy

    check_noise(noise)
    alpha = 0.001 if statistics.alpha is None else statistics.alpha
    procedure = Accuracy(statistics.draws, alpha, statistics.population)
    check_classifier(model.model, model, noise.denoiser)

    def summary(run: Run) -> None:
        show_bound(run, table.radii, None, beside, as_json=output.as_json)

    do_run(procedure, (model, noise, data, statistics, compute, output), summary=summary)


def _read(path: str) -> Run:
    from certify.runs.identity import unproven
    from certify.runs.run_file import read_run

    run = read_run(path)
    if doubt := unproven(run.header):
        warn(f"{path}: {doubt}")
    return run


def show_bound(
    run: Run,
    radii: list[float] | None,
    statistics: AccuracyStatistics | None = None,
    beside: Run | None = None,
    *,
    as_json: bool,
) -> None:
    """Print the table (or one JSON object) and draw the curve beside the run file.

    Args:
        run: with a fixed number of samples.
        radii: of the table; None for round numbers.
        statistics: alpha and the images that the statement is about, where they are not the run's own.
        beside: run of certificates for the table and the figure, or None.
        as_json: print JSON.

    Raises:
        UserError: no image could be used, or a run that does not support the statement.
    """
    from analysis.accuracy_bound import accuracy_bound
    from certify.runs.transaction import warn_of_results

    warn_of_results(run)
    alpha, population = (None, False) if statistics is None else (statistics.alpha, statistics.population)
    bound = accuracy_bound(run, alpha=alpha, population=population or None)
    name = run.path.stem if run.header.without_radii else f"{run.path.stem}-accuracy"
    picture = run.path.with_name(f"{name}.png")
    if as_json:
        tell(json.dumps(bound.to_dict(radii, beside) | {"curve": str(picture)}))
    else:
        tell(describe(bound, radii, beside))
        tell(f"\nrun file   {run.path}\ncurve      {picture}")
    bound.plot(picture, beside=beside)  # last: when it cannot be written, the numbers are out already


def describe(bound: AccuracyBound, radii: list[float] | None = None, beside: Run | None = None) -> str:
    """Return title, table, counts and statement."""
    from certify.cli.summary import title

    result, run = bound.result, bound.run
    each = "1 noisy copy of each" if result.draws == 1 else f"{result.draws:,} noisy copies of each"
    lines = [f"{title(run)}, {each}", "", bound.table(radii, beside=beside), ""]
    right = "correct answers" if bound.labelled else "same as the clean answer"
    lines.append(f"{right:<26} {result.correct:,} of {result.images * result.draws:,}")
    if bound.missing:
        lines.append(f"{'without a result':<26} {bound.missing:,} of {result.images:,} images, which count as wrong")
    return "\n".join([*lines, "", textwrap.fill(bound.statement(), 110)])
