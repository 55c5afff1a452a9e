"""``certify run`` (the default) and ``certify predict``: plan, run, table, curve."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.files import output_path, stoppable
from certify.cli.load import check_first, chosen_images, load_smoothed, without_data
from certify.cli.plan import check_base, clock, first_image, show_engine, show_plan
from certify.cli.summary import summarise, warn
from certify.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from certify.execution import Execution
    from certify.images import ImageSet
    from certify.records import RunFile
    from certify.settings import Settings
    from certify.smoothing import SmoothedClassifier


@click.command(short_help="Certify images (the default verb).")
@options.classifier_options
@options.noise_options
@options.data_options
@click.option(
    "--n0", type=options.Count("a number of samples"), default=100, show_default=True, help="Selection samples."
)
@options.n
@options.alpha
@click.option("--bound", default="clopper-pearson", show_default=True, help="Confidence bound (`certify list bounds`).")
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
    type=options.Positive("a share between 0 and 1, such as 0.1", below=1.0),
    help="Stop each image once its radius is known to this relative tolerance; --n is the most samples.",
)
@click.option("--rule", show_default="one-sided", help="Stopping rule of --radius (`certify list rules`).")
@click.option(
    "--radii", type=options.Numbers(), help="Radii of the table (default: round numbers up to the largest possible)."
)
@options.compute_options
def run(**given: Any) -> None:
    """Certify images: a class and a radius for each, or an abstention.

    Cohen, Rosenfeld and Kolter (2019): n0 noisy copies choose a class, n fresh ones bound its probability from below
    (Clopper-Pearson at alpha), and the radius is sigma * Phi^-1 of the bound. Results go to a run file; the same
    command goes on where it stopped. The largest possible radius is sigma times 1.50 at n = 100, 2.46 at 1,000, 3.20 at
    10,000 and 3.81 at 100,000 (alpha = 0.001). With --radius the question is yes or no, and most images answer it
    within a few hundred samples.
    """
    if given["radius"] is not None:
        from certify.sequential import DEFAULT_CAP

        _execute("decide", given if options.given_by_user("n") else {**given, "n": DEFAULT_CAP})
    else:
        _execute("certify", given)


@click.command(short_help="Predict with the smoothed classifier.")
@options.classifier_options
@options.noise_options
@options.data_options
@options.n
@options.alpha
@options.compute_options
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
    say = _silent if o["quiet"] or o["as_json"] else _say
    demonstration = without_data(o) if o["data"] is None else ""
    smoothed = load_smoothed(o)
    images = chosen_images(o, smoothed.classifier)

    from certify.records import RunFile, peek_header, read_run
    from certify.settings import Settings, execution_of, run_header, with_execution

    radii = tuple(sorted(set(o["radius"] or ())))
    settings = Settings(o["n"], o["n0"], o["alpha"], o["seed"], o["bound"], procedure, radii, o["tolerance"], o["rule"])
    header = run_header(
        smoothed,
        images,
        settings,
        model=o["model"],
        data=o["data"],
        denoiser=o["denoiser"],
        command=options.command_line(),
    )
    path = output_path(o["out"], _words(header), header)
    show_plan(smoothed, images, settings, header, say)
    begun = peek_header(path)
    execution = execution_of(begun, smoothed.wanted) if begun else _decide(smoothed, images, settings, say)
    if execution is not None:
        show_engine(execution, smoothed, say)
        header = with_execution(header, execution)
    with RunFile(path, header) as file:
        there = f": {len(file.done):,} of {len(images):,} images are there already" if file.resumed else ""
        say(f"run file   {path}{there}")
        if demonstration:
            say(demonstration)
        rate = _work(smoothed, images, settings, file, execution, o, say)
    finished = read_run(path)
    if not finished.usable:
        first = finished.images[0]
        raise UserError(
            f"none of the {len(finished.images)} images could be used; the first, {first['id']}: {first['error']}"
        )
    summarise(finished, o["radii"], as_json=o["as_json"], rate=rate)


def _decide(
    smoothed: SmoothedClassifier, images: ImageSet, settings: Settings, say: Callable[[str], None]
) -> Execution | None:
    """How to run the base classifier for so much work; None when no image can be read."""
    image = first_image(images)
    if image is None:
        return None
    say("engine     deciding how to run the classifier ...")
    execution = smoothed.prepare(image, len(images) * settings.likely)
    if execution.failed:
        warn(execution.failed)
    return execution


def _prepare_again(smoothed: SmoothedClassifier, image: Tensor, execution: Execution, file: RunFile) -> None:
    """Run the base classifier as the file says; stop where this machine cannot."""
    real = smoothed.prepare(image, 1, execution)
    if (real.precision, real.folded, real.compiled) != (execution.precision, execution.folded, execution.compiled):
        raise UserError(
            f"{file.path} was begun as {execution.describe()}; here it can only go on as {real.describe()} "
            f"({real.why[-1]}): name another --out"
        )


def _work(
    smoothed: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    file: RunFile,
    execution: Execution | None,
    o: dict[str, Any],
    say: Callable[[str], None],
) -> float | None:
    """Say what it costs, warn when the base classifier only guesses, then do what is left; samples a second."""
    from tqdm import tqdm

    from certify.runner import process

    left, rate = len(images) - len(file.done), None
    with stoppable(file, len(images), "images"):
        first = first_image(images) if left else None
        if first is not None and execution is not None:
            if smoothed.execution is None:
                _prepare_again(smoothed, first, execution, file)
            check_base(smoothed, images)
            rate = smoothed.measure_rate(first)
            total = left * settings.samples
            most = "at most " if settings.adaptive else ""
            work = f"{left:,} images x {most}{settings.samples:,} samples = {total:,}"
            say(f"cost       {work}: {most}about {clock(total / rate)}")
        hidden = True if say is _silent else None  # None: shown on a terminal only
        with tqdm(
            total=left if settings.adaptive else left * settings.samples,
            unit=" images" if settings.adaptive else " samples",
            unit_scale=not settings.adaptive,
            disable=hidden,
            leave=False,
            file=sys.stderr,
        ) as bar:
            process(
                smoothed,
                images,
                settings,
                file,
                strict=o["strict"],
                progress=bar.update,
                warn=warn,
            )
    return rate


def _words(header: dict[str, Any]) -> list[str]:
    """What the file of a run is called, where only its folder is named."""
    words = [Path(header["model"]).stem, Path(header["data"]).stem, f"sigma{header['sigma']:g}", f"n{header['n']}"]
    return words if header["procedure"] == "certify" else [header["procedure"], *words]


def _say(text: str) -> None:
    click.echo(text, err=True)


def _silent(text: str) -> None:
    pass
