"""``certify run`` (the default) and ``certify predict``: plan, run, table, curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.console import clock, few_warnings, progress_bar, silent, speaker, warn
from certify.cli.distribute import crew_for, spread_from, spread_options
from certify.cli.load import check_first, chosen_images, load_smoothed, procedure_from, without_data
from certify.cli.output_files import output_path, stoppable
from certify.cli.plan import check_base, first_image, show_engine, show_plan
from certify.cli.summary import summarise
from certify.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from certify.cli.plan import Engine
    from certify.cluster.driver import Crew
    from certify.engine.execution import Execution
    from certify.images.dataset import ImageSet
    from certify.runs.config import Settings
    from certify.runs.run_file import RunFile
    from certify.smoothed_classifier import SmoothedClassifier


@click.command(short_help="Certify images (the default verb).")
@options.classifier_options
@options.noise_options
@options.data_options
@options.n0
@options.n
@options.alpha
@options.bound
@click.option(
    "--norm",
    type=click.Choice(["l1", "l2", "linf"]),
    help="Norm of the radii, implied by the noise's own (default), which is l2 for Gaussian noise.",
)
@click.option(
    "--radius",
    type=options.Numbers(),
    help="Only decide whether images are robust at these radii, each with as few "
    "samples as that takes; --n is the most.",
)
@click.option(
    "--tolerance",
    type=options.SHARE,
    help="Stop each image once its radius is known to this relative tolerance; --n is the most samples.",
)
@options.rule
@click.option(
    "--radii", type=options.Numbers(), help="Radii of the table (default: round numbers up to the largest possible)."
)
@options.compute_options
@spread_options
def run(**given: Any) -> None:
    """Certify images: a class and a radius for each, or an abstention.

    Cohen, Rosenfeld and Kolter (2019): n0 noisy copies choose a class, n fresh ones bound its probability from below
    (Clopper-Pearson at alpha), and the radius is sigma * Phi^-1 of the bound. Results go to a run file; the same
    command goes on where it stopped. The largest possible radius is sigma times 1.50 at n = 100, 2.46 at 1,000, 3.20 at
    10,000 and 3.81 at 100,000 (alpha = 0.001). With --radius the question is yes or no, and most images answer it
    within a few hundred samples.
    """
    if given["radius"] is not None:
        from certify.smoothing.stopping_rules import DEFAULT_CAP

        given |= {} if options.given_by_user("n") else {"n": DEFAULT_CAP}
    _execute("certify", given)


@click.command(short_help="Predict with the smoothed classifier.")
@options.classifier_options
@options.noise_options
@options.data_options
@options.n
@options.alpha
@options.compute_options
@spread_options
def predict(**given: Any) -> None:
    """Predict with the smoothed classifier: its class for each image, or an abstention, without a radius.

    PREDICT of Cohen, Rosenfeld and Kolter (2019): n noisy copies, and a two-sided binomial test at alpha between the
    two leading classes.
    """
    nothing = dict.fromkeys(("radii", "radius", "tolerance", "norm", "rule"))
    _execute("predict", {**given, **nothing, "n0": 1, "bound": "clopper-pearson"})


def _execute(procedure: str, o: dict[str, Any]) -> None:
    """The whole verb: check what is cheap, load, plan, work, summarise."""
    check_first(o)
    spread = spread_from(o)
    say = speaker(quiet=o["quiet"] or o["as_json"])
    demonstration = without_data(o) if o["data"] is None else ""
    smoothed = load_smoothed(o if spread.address is None else {**o, "device": "cpu"})
    images = chosen_images(o, smoothed.classifier)
    places = spread.places(len(images))

    from certify.runs.config import Settings, execution_of, run_header, with_execution
    from certify.runs.run_file import RunFile, peek_header, read_run
    from certify.smoothing.procedures import expected_samples

    settings = Settings(procedure_from(procedure, o), o["seed"])
    header = run_header(
        smoothed,
        images,
        settings,
        model=o["model"],
        data=o["data"],
        denoiser=o["denoiser"],
        command=options.command_line(),
    )
    first = first_image(images)
    if first is not None and any("fingerprint" in step for step in header["pipeline"]):
        smoothed.check_contract(first)  # fingerprints are compared next, and chance would look like another model
    with crew_for(o, spread, smoothed, len(places)) as crew:
        header |= crew.facts() if crew is not None else {}
        header = header if spread.shard is None else spread.shard.header(header)
        path = output_path(o["out"], [*_words(header), *spread.words()], header)
        show_plan(smoothed, images, settings, header, say)
        begun = peek_header(path)
        engine: Engine = smoothed if crew is None else crew
        if begun:
            execution = execution_of(begun, smoothed.options)
        else:
            parts = spread.shard.of if spread.shard is not None else 1  # whose choices agree: each has as much work
            work = -(-len(images) // parts) * expected_samples(settings.procedure)
            execution = _choose_execution(engine, first, work, say, sharded=spread.shard is not None)
        if execution is not None:
            show_engine(execution, smoothed, say, "" if crew is None else crew.where())
            header = with_execution(header, execution)
        with RunFile(path, header, trust_identity=o["trust_identity"]) as file:
            there = f": {len(file.done):,} of {len(places):,} images are there already" if file.resumed else ""
            say(f"run file   {path}{there}")
            if demonstration:
                say(demonstration)
            rate = None
            with stoppable(file, len(places), "images"):
                if len(file.done) < len(places) and first is not None and execution is not None:
                    if engine.execution is None:
                        _prepare_as(engine, first, execution, f"{file.path} was begun")
                    check_base(engine, smoothed, images)
                    rate = engine.measure_rate(first)
                _work(crew, smoothed, images, places, settings, file, rate, o, say)
    summarise(read_run(path), o["radii"], as_json=o["as_json"], rate=rate)


def _choose_execution(
    engine: Engine, image: Tensor | None, samples: int, say: Callable[[str], None], *, sharded: bool
) -> Execution | None:
    """Choose how to run the base classifier for this many samples; None when no image can be read."""
    if image is None:
        return None
    say("engine     preparing the classifier ...")
    execution = engine.prepare(image, samples)
    if execution.failed:
        advice = "; shards that are compiled cannot be merged with it: pass --compile off to all" if sharded else ""
        warn(f"{execution.failed}{advice}")
    return execution


def _prepare_as(engine: Engine, image: Tensor, execution: Execution, what: str) -> None:
    """Run the base classifier as what was begun; stop where this machine cannot."""
    real = engine.prepare(image, 1, execution)
    if not real.runs_like(execution):
        raise UserError(
            f"{what} as {execution.describe()}; here it can only go on as {real.describe()} ({real.why[-1]}): "
            "name another --out"
        )


def _work(
    crew: Crew | None,
    smoothed: SmoothedClassifier,
    images: ImageSet,
    places: Sequence[int],
    settings: Settings,
    file: RunFile,
    rate: float | None,
    o: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Say what it costs, then do what is left."""
    from certify.smoothing.procedures import samples

    left, each = len(places) - len(file.done), samples(settings.procedure)
    if rate is not None:
        total, speed = left * each, rate * (1 if crew is None else len(crew))
        most = "at most " if settings.procedure.sequential else ""
        work = f"{left:,} images x {most}{each:,} samples = {total:,}"
        say(f"cost       {work}: {most}about {clock(total / speed)}")
    by_image = settings.procedure.sequential or crew is not None
    total, unit = (left, "images") if by_image else (left * each, "samples")
    with (
        progress_bar(total, unit, hidden=say is silent, scaled=not by_image) as bar,
        few_warnings("; the run file says why") as left_out,
    ):
        how = {"places": places, "strict": o["strict"], "progress": bar.update, "warn": left_out}
        if crew is None:
            from certify.runs.runner import process

            process(smoothed, images, settings, file, **how)
        else:
            from certify.cluster.run import process_on

            process_on(crew, images, settings, file, **how)


def _words(header: dict[str, Any]) -> list[str]:
    """What the file of a run is called, where only its folder is named."""
    words = [Path(header["model"]).stem, Path(header["data"]).stem, f"sigma{header['sigma']:g}", f"n{header['n']}"]
    return words if header["procedure"] == "certify" else [header["procedure"], *words]
