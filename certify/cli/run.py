"""``certify run`` (the default) and ``certify predict``: plan, run, table, curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from certify.cli.console import clock, few_warnings, progress_bar, silent, speaker, warn
from certify.cli.distribute import distribution_from, workers_for
from certify.cli.load import check_classifier, check_noise, demo_data, load_image_set, load_smoothed, procedure_from
from certify.cli.option_groups import (
    ClusterOptions,
    DataOptions,
    ModelOptions,
    NoiseOptions,
    OutputOptions,
    RadiiOptions,
    SampleOptions,
    StatisticsOptions,
)
from certify.cli.options import check_radii, command, command_line, option
from certify.cli.output_files import output_path, stoppable
from certify.cli.plan import check_base, show_engine, show_plan
from certify.cli.summary import summarise
from certify.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from certify.cli.load import AnyProcedure
    from certify.cli.plan import Engine
    from certify.cluster.driver import WorkerPool
    from certify.engine.execution import Execution
    from certify.images.dataset import ImageSet
    from certify.runs.config import Settings
    from certify.runs.records import RunHeader
    from certify.runs.run_file import RunFile
    from certify.smoothed_classifier import SmoothedClassifier


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
    output: OutputOptions,
) -> None:
    """Certify images: a class and a radius for each, or an abstention.

    n0 noisy copies choose a class, n fresh ones give a lower bound on its probability (Clopper-Pearson at alpha), and
    the radius is sigma * Phi^-1 of the bound (Cohen, Rosenfeld and Kolter, 2019). The largest possible radius is 1.50
    sigma at n = 100, 2.46 at 1,000, 3.20 at 10,000 and 3.81 at 100,000 (alpha = 0.001). --radius asks yes or no, which
    most images answer within a few hundred samples.

    Results go to a run file; the same command resumes an interrupted run.
    """
    check_noise(noise)
    procedure = procedure_from(statistics)
    check_classifier(model.model, model, noise.denoiser)
    check_radii(table.radii)
    _execute(procedure, model, noise, data, compute, output, norm=statistics.norm, radii=table.radii)


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
    _execute(Predict(statistics.n, statistics.alpha), model, noise, data, compute, output)


def _execute(
    procedure: AnyProcedure,
    model: ModelOptions,
    noise: NoiseOptions,
    data: DataOptions,
    compute: ClusterOptions,
    output: OutputOptions,
    *,
    norm: str | None = None,
    radii: list[float] | None = None,
) -> None:
    """Load, show the plan, sample, and summarise."""
    distribution = distribution_from(compute)
    say = speaker(quiet=output.quiet or output.as_json)
    demonstration = ""
    if data.data is None:
        data, procedure, demonstration = demo_data(model.model, data, procedure)
    local = compute if distribution.address is None else replace(compute, device="cpu")
    smoothed = load_smoothed(model.model, model, noise, local, norm=norm)
    images = load_image_set(data, smoothed.classifier)  # type: ignore[arg-type]
    places = distribution.places(len(images))

    from certify.runs.config import Settings, execution_of, run_header, with_execution
    from certify.runs.records import RunHeader
    from certify.runs.run_file import RunFile, peek_header, read_run
    from certify.smoothing.procedures import expected_samples

    settings = Settings(procedure, noise.seed)
    header = run_header(
        smoothed,
        images,
        settings,
        model=model.model,
        data=str(data.data),
        denoiser=noise.denoiser,
        command=command_line(),
    )
    first = images.first_usable()
    if first is not None and any("fingerprint" in step for step in header.pipeline):
        smoothed.check_contract(first)  # before fingerprints are compared: randomness would look like another model
    with workers_for(distribution, model, noise, compute, norm, smoothed, len(places)) as pool:
        header = header if pool is None else header.replace(**pool.facts())
        header = header if distribution.shard is None else distribution.shard.header(header)
        path = output_path(output.out, [*_file_words(header), *distribution.words()], header)
        show_plan(smoothed, images, settings, header, say)
        begun = peek_header(path)
        engine: Engine = smoothed if pool is None else pool
        if isinstance(begun, RunHeader):
            execution = execution_of(begun, smoothed.options)
        else:
            count = len(images) if distribution.shard is None else distribution.shard.largest(len(images))
            work = count * expected_samples(settings.procedure)  # alike in all shards, and so the execution
            execution = _choose_execution(engine, first, work, say, sharded=distribution.shard is not None)
        if execution is not None:
            show_engine(execution, smoothed, say, "" if pool is None else pool.where())
            header = with_execution(header, execution)
        with RunFile(path, header, trust_identity=output.trust_identity) as file:
            present = f": {len(file.done):,} of {len(places):,} images are there already" if file.resumed else ""
            say(f"run file   {path}{present}")
            if demonstration:
                say(demonstration)
            rate = None
            with stoppable(file, len(places), "images"):
                if len(file.done) < len(places) and first is not None and execution is not None:
                    if engine.execution is None:
                        _prepare_as(engine, first, execution, f"{file.path} was begun")
                    check_base(engine, smoothed, images)
                    rate = engine.measure_rate(first)
                _process(pool, smoothed, images, places, settings, file, rate, strict=data.strict, say=say)
    summarise(read_run(path), radii, as_json=output.as_json, rate=rate)


def _choose_execution(
    engine: Engine, image: Tensor | None, samples: int, say: Callable[[str], None], *, sharded: bool
) -> Execution | None:
    """Choose how to run the base classifier for this number of samples; None if no image can be read."""
    if image is None:
        return None
    say("engine     preparing the classifier ...")
    execution = engine.prepare(image, samples)
    if execution.failed:
        advice = "; shards that are compiled cannot be merged with it: pass --compile off to all" if sharded else ""
        warn(f"{execution.failed}{advice}")
    return execution


def _prepare_as(engine: Engine, image: Tensor, execution: Execution, what: str) -> None:
    """Run the base classifier with these settings; refuse where this machine cannot."""
    real = engine.prepare(image, 1, execution)
    if not real.runs_like(execution):
        raise UserError(
            f"{what} as {execution.describe()}; here it can only resume as {real.describe()} ({real.why[-1]}): "
            "name another --out"
        )


def _process(
    pool: WorkerPool | None,
    smoothed: SmoothedClassifier,
    images: ImageSet,
    places: Sequence[int],
    settings: Settings,
    file: RunFile,
    rate: float | None,
    *,
    strict: bool,
    say: Callable[[str], None],
) -> None:
    """Show the cost, then process the images that are not in the file yet."""
    from certify.smoothing.procedures import samples

    left, each = len(places) - len(file.done), samples(settings.procedure)
    if rate is not None:
        total, speed = left * each, rate * (1 if pool is None else len(pool))
        most = "at most " if settings.procedure.sequential else ""
        work = f"{left:,} images x {most}{each:,} samples = {total:,}"
        say(f"cost       {work}: {most}about {clock(total / speed)}")
    by_image = settings.procedure.sequential or pool is not None
    total, unit = (left, "images") if by_image else (left * each, "samples")
    with (
        progress_bar(total, unit, hidden=say is silent, scaled=not by_image) as bar,
        few_warnings("; the run file says why") as left_out,
    ):
        if pool is None:
            from certify.runs.runner import process

            process(smoothed, images, settings, file, places=places, strict=strict, progress=bar.update, warn=left_out)
        else:
            from certify.cluster.run import process_on

            process_on(pool, images, settings, file, places=places, strict=strict, progress=bar.update, warn=left_out)


def _file_words(header: RunHeader) -> list[str]:
    """Return the words of a run file's name."""
    words = [Path(header.model).stem, Path(header.data).stem, f"sigma{header.sigma:g}", f"n{header.n}"]
    return words if header.kind == "certify" else [header.kind, *words]
