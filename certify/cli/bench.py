"""``certify bench``: this engine, the plain loop and other settings on the user's own model and machine."""

from __future__ import annotations

import json
from dataclasses import asdict

from certify.cli.console import say, tell
from certify.cli.load import check_classifier, check_noise, load_smoothed
from certify.cli.option_groups import ComputeOptions, DenoiserOptions, JsonOptions, ModelOptions
from certify.cli.options import Options, command, option, overridden
from certify.cli.parameter_types import Count, Positive


class BenchNoise(DenoiserOptions):
    """Noise level and denoiser of the measurement."""

    sigma: float = overridden(DenoiserOptions, "sigma", default=0.25, required=False)


class BenchOptions(Options, section="Measurement"):
    """Length and order of the measurements."""

    n: int = option(
        type=Count("a number of samples"),
        default=100_000,
        help="Noise samples of the certificate for which the engine is prepared.",
    )
    pairs: int = option(
        type=Count("a number of pairs"), default=3, help="Number of rounds; in each, everything is measured once."
    )
    seconds: float = option(type=Positive("seconds"), default=5.0, help="Length of one measurement in seconds.")
    turn: int | None = option(
        type=Count("a number of samples"), help="Samples of one measurement, in place of --seconds."
    )
    reference_batch: int | None = option(type=Count("a batch size"), help="Batch size of the plain loop.")


@command("Measure the speed on your model, against the plain loop.", main=("model",))
def bench(
    model: ModelOptions, noise: BenchNoise, compute: ComputeOptions, measurement: BenchOptions, output: JsonOptions
) -> None:
    """Compare this engine with the plain loop (float32, eager, batches of 1,000) and other settings on your model.

    Prints samples per second, the ratio with its spread, the share of the machine's matrix-product speed, the seconds
    per certificate with everything included, how many labels agree with plain float32, and the speed of every
    alternative to what `auto` chose; the choice itself stays. `--weights untrained` measures an architecture without
    its weights.
    """
    check_noise(noise)
    check_classifier(model.model, model, noise.denoiser)
    smoothed = load_smoothed(model.model, model, noise, compute)

    from analysis.bench import compare, describe
    from certify.images.dataset import load_images

    data = "digits" if model.model == "digits" else "photos"
    images = load_images(data, smoothed.classifier, labels="none", max_images=2)  # type: ignore[arg-type]
    result = compare(
        smoothed,
        [images.load(i) for i in range(len(images))],
        n=measurement.n,
        pairs=measurement.pairs,
        seconds=measurement.seconds,
        turn=measurement.turn,
        reference_batch=measurement.reference_batch,
        progress=(lambda text: None) if output.as_json else (lambda text: say(f"{text} ...")),
    )
    case = model.model if noise.denoiser == "none" else f"{noise.denoiser}+{model.model}"
    tell(json.dumps({"case": case, **asdict(result)}) if output.as_json else describe(result))
