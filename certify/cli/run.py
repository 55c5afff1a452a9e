"""``certify run`` (the default), ``certify predict`` and ``certify merge``: options -> a run -> its summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from certify.cli.console import tell_dry_run
from certify.cli.load import check_classifier, check_data, check_noise, demo_data, ids_from, options_for, procedure_from
from certify.cli.option_groups import (
    ClusterOptions,
    DataOptions,
    JsonOptions,
    ModelOptions,
    NoiseOptions,
    OutputOptions,
    RadiiOptions,
    SampleOptions,
    StatisticsOptions,
)
from certify.cli.options import Options, check_radii, command, command_line, flag, option
from certify.cli.summary import summarise

if TYPE_CHECKING:
    from certify.runs.run_file import Run
    from certify.smoothing.procedures.choose import AnyProcedure


class PictureOptions(Options, section="Output"):
    """The figure beside the run file."""

    no_curve: bool = flag(help="Draw no curve beside the run file.")


class RunStatistics(StatisticsOptions):
    """The question about each image, and the norm of its radius."""

    norm: str | None = option(
        type=click.Choice(["l1", "l2", "linf"]),
        help="Norm of the radii, implied by the noise's own norm (the default), which is l2 for Gaussian noise.",
    )


@command(
    "Certify images (the default command).",
    main=("model", "data", "max_images", "sigma", "denoiser", "n", "radius", "out"),
)
def run(
    model: ModelOptions,
    noise: NoiseOptions,
    data: DataOptions,
    statistics: RunStatistics,
    compute: ClusterOptions,
    table: RadiiOptions,
    picture: PictureOptions,
    output: OutputOptions,
) -> None:
    """Certify images: a class and a radius for each, or an abstention.

    n0 noisy copies choose a class, n fresh ones give a lower bound on its probability (Clopper-Pearson at alpha), and
    the radius is sigma * Phi^-1 of the bound (Cohen, Rosenfeld and Kolter, 2019). The largest possible radius is 1.51
    sigma at n = 100, 2.47 at 1,000, 3.20 at 10,000 and 3.82 at 100,000 (alpha = 0.001). --radius asks yes or no, which
    most images answer within a few hundred samples.

    Results go to a run file; the same command resumes an interrupted run.
    """
    check_noise(noise)
    procedure = procedure_from(statistics)
    check_classifier(model.model, model, noise.denoiser)
    check_radii(table.radii)
    do_run(procedure, (model, noise, data, statistics, compute, output), radii=table.radii, draw=not picture.no_curve)


@command(
    "Predict with the smoothed classifier, without radii.",
    main=("model", "data", "max_images", "sigma", "denoiser", "n", "alpha", "out"),
)
def predict(
    model: ModelOptions,
    noise: NoiseOptions,
    data: DataOptions,
    statistics: SampleOptions,
    compute: ClusterOptions,
    output: OutputOptions,
) -> None:
    """Predict with the smoothed classifier: a class for each image, or an abstention, without a radius.

    PREDICT of Cohen, Rosenfeld and Kolter (2019): n noisy copies, and a two-sided binomial test at alpha between the
    two leading classes.
    """
    from certify.smoothing.procedures import Predict

    check_noise(noise)
    check_classifier(model.model, model, noise.denoiser)
    do_run(Predict(statistics.n, statistics.alpha), (model, noise, data, statistics, compute, output))


class MergeOptions(Options):
    """File of the whole run."""

    out: str = option("-o", "--out", required=True, metavar="RUN", help="Run file to write (.jsonl).")
    if_needed: bool = flag(help="Do nothing if RUN is there already, finished.")


@command("Merge the shards of a run into one run file.")
@click.argument("shards", nargs=-1, required=True, metavar="SHARD|FOLDER...")
def merge(
    shards: tuple[str, ...], target: MergeOptions, table: RadiiOptions, picture: PictureOptions, output: JsonOptions
) -> None:
    """Merge the files of all shards of a run (`--shard i/n`) into the file of the whole run, images in their order.

    A folder stands for the shards in it. Shards that overlap, are missing, unfinished or belong to another run are
    refused by name. The shards are kept.
    """
    from certify.runs.files import new_run_file
    from certify.runs.run_file import Run, write_derived
    from certify.runs.shards import merge_shards
    from certify.runs.status import find_shards

    check_radii(table.radii)
    if target.if_needed and Path(target.out).exists():
        summarise(Run.read(target.out), table.radii, as_json=output.as_json, draw=not picture.no_curve)
        return
    path = new_run_file(target.out)
    parts = (Run.read(shard, allow_partial=True) for shard in find_shards(shards))
    run = write_derived(path, *merge_shards(parts, command=command_line()))
    summarise(run, table.radii, as_json=output.as_json, draw=not picture.no_curve)


Groups = tuple[ModelOptions, NoiseOptions, DataOptions, Options, ClusterOptions, OutputOptions]


def do_run(
    procedure: AnyProcedure,
    groups: Groups,
    *,
    radii: list[float] | None = None,
    draw: bool = True,
    summary: Callable[[Run], None] | None = None,
) -> None:
    """Do the run, show it on the terminal, and summarise it: by ``summary``, or as certificates or predictions."""
    model, noise, data, _, _, output = groups
    if data.data is None:
        data, procedure, demonstration = demo_data(model.model, data, procedure)
    else:
        check_data(data.data, data.root)
        demonstration = ""

    from certify.api import Options as RunOptions
    from certify.api import load_job
    from certify.cli.plan import Console
    from certify.runs.files import output_path
    from certify.runs.transaction import execute, run_words

    options = {**options_for(RunOptions, *groups, data), "ids": ids_from(data)}
    job = load_job(procedure, model.model, data.data, data.labels, sigma=noise.sigma, seed=noise.seed, options=options)
    job = replace(job, dry=output.dry_run)
    with Console(demonstration, output) as console:
        run = execute(
            job,
            lambda header: output_path(output.out, run_words(header), header),
            command=command_line(),
            observer=console,
        )
    if output.dry_run:
        tell_dry_run(f"{run.path} is not written", output, samples=console.samples, seconds=console.seconds)
    elif summary is not None:
        summary(run)
    else:
        summarise(run, radii, as_json=output.as_json, rate=console.rate, draw=draw)
