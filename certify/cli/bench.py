"""``certify bench``: this engine, the plain loop and other settings on the user's own model and machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from certify.cli import options
from certify.cli.console import say, tell


@click.command(short_help="Measure the speed on your model, against the plain loop.")
@options.classifier_options
@click.option(
    "--sigma",
    type=options.Positive("a number above 0"),
    default=0.25,
    help="Standard deviation of the noise, in pixels of images scaled to [0, 1].",
)
@options.denoiser
@options.device
@options.engine_options
@click.option(
    "--n",
    type=options.Count("a number of samples"),
    default=100_000,
    help="Estimation samples of the certificate for which the engine is prepared.",
)
@click.option(
    "--pairs",
    type=options.Count("a number of pairs"),
    default=3,
    help="Number of rounds; in each, everything takes one turn.",
)
@click.option("--seconds", type=options.Positive("seconds"), default=5.0, help="Length of one turn.")
@click.option("--turn", type=options.Count("a number of samples"), help="Samples of a turn, in place of --seconds.")
@click.option("--reference-batch", type=options.Count("a batch size"), help="Batch of the plain loop.")
@options.as_json("the text")
def bench(**o: Any) -> None:
    """Compare this engine with the plain loop (float32, eager, batches of 1,000) and other settings on your model.

    Prints samples per second, the ratio with its spread, the share of the machine's matrix-product speed, the seconds
    of a certificate with everything included, how many labels agree with plain float32, and the speed of every
    alternative to what `auto` chose; the choice itself stays. `--weights untrained` measures an architecture whose
    weights are not at hand.
    """
    from certify.cli.load import check_first, load_smoothed

    check_first(o)
    smoothed = load_smoothed(o)

    from analysis.bench import compare, in_words
    from certify.images.dataset import load_images

    data = "digits" if o["model"] == "digits" else "photos"
    images = load_images(data, smoothed.classifier, labels="none", max_images=2)  # type: ignore[arg-type]
    found = compare(
        smoothed,
        [images.load(i) for i in range(len(images))],
        n=o["n"],
        pairs=o["pairs"],
        seconds=o["seconds"],
        turn=o["turn"],
        reference_batch=o["reference_batch"],
        progress=(lambda text: None) if o["as_json"] else (lambda text: say(f"{text} ...")),
    )
    case = o["model"] if o["denoiser"] == "none" else f"{o['denoiser']}+{o['model']}"
    tell(json.dumps({"case": case, **asdict(found)}) if o["as_json"] else in_words(found))
