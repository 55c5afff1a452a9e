"""``certify evaluate-denoiser``: a denoiser's PSNR and SSIM, and a classifier's accuracy behind it, with a figure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from certify.cli.attack_context import load_readable
from certify.cli.console import say, tell
from certify.cli.load import check_classifier, classifier_from, denoiser_for, device_from, load_image_set
from certify.cli.option_groups import DataOptions, DeviceOptions, OptionalModelOptions, ProgressOptions
from certify.cli.options import Options, command, given_by_user, option, refuse_given
from certify.cli.parameter_types import Count, Numbers
from certify.runs.progress import progress_bar

if TYPE_CHECKING:
    from certify.cli.denoiser_quality import Evaluation
    from certify.images.dataset import ImageSet
    from certify.models.classifier import Classifier
    from training.evaluate import Outcome

MAX_IMAGES = 500
"""Images at most, unless --max says otherwise."""


class EvaluationNoise(Options, section="Noise"):
    """Noise levels, denoiser and seed."""

    denoiser: str = option(required=True, help="Denoiser to measure: a name (`certify list denoisers`) or a file.")
    sigma: list[float] = option(
        type=Numbers(),
        required=True,
        help="Standard deviation of the noise in [0, 1] pixels; several separated by commas.",
    )
    seed: int = option(type=Count("a seed", least=0), default=0, help="Seed of all noise.")


class FigureOptions(ProgressOptions):
    """The figure, and the form of the result on stdout."""

    pictures: str | None = option(
        metavar="FILE", help="Figure to write: .png, .svg or .pdf (default: a .png under runs/)."
    )
    rows: int = option(
        "--images", type=Count("how many images to show", least=0), default=8, help="Rows of the figure; 0 draws none."
    )


@command(
    "Measure a denoiser: PSNR, SSIM, accuracy, figure.",
    name="evaluate-denoiser",
    main=("denoiser", "sigma", "data", "max_images", "model", "pictures"),
)
def evaluate_denoiser(
    noise: EvaluationNoise,
    model: OptionalModelOptions,
    data: DataOptions,
    compute: DeviceOptions,
    output: FigureOptions,
) -> None:
    """Measure a denoiser on images plus Gaussian noise, one noise draw per image: PSNR, SSIM, and a figure.

    With --model also the accuracy, and how often the label is the one without noise. Without --model images keep their
    own size, or are resized to --input-size. At most 500 images are used (--max), spread over the data (or every K-th:
    --skip). These are empirical figures; for certificates see `certify --denoiser`.
    """
    sigmas = _check_options(noise, model, output)
    classifier = classifier_from(model.model, model) if model.model else None
    chosen = _choose_images(model, data, classifier, quiet=output.silent)
    images = load_readable(chosen, strict=data.strict, quiet=output.silent)
    device = device_from(compute.device)

    import torch

    from certify.cli.denoiser_quality import Evaluation, describe, draw, to_json
    from certify.models.identity import describe_module
    from certify.runs.transaction import warn_near_chance
    from training.evaluate import Example, measure, summarise

    if device.startswith("cuda"):  # float32 means float32, as when certifying
        torch.backends.cudnn.allow_tf32 = False
    size = images.input.size or images.first_shape()
    denoisers = {
        sigma: denoiser_for(noise.denoiser, sigma, size, classifier, trust_code=model.trust_code).to(device)
        for sigma in sigmas
    }
    classifier = classifier.to(device) if classifier is not None else None
    shown: dict[str, list[Outcome]] = {images.items[i].id: [] for i in _spread(len(images), output.rows)}
    shapes = set[tuple[int, ...]]()
    reports = []
    with progress_bar(len(images) * len(sigmas), "images", shown=output.shown) as bar:

        def outcomes(sigma: float) -> Iterator[Outcome]:
            examples = (Example(item.id, images.load(i), images.labels[i]) for i, item in enumerate(images.items))
            for outcome in measure(
                denoisers[sigma], examples, sigma, classifier=classifier, seed=noise.seed, device=device
            ):
                if outcome.example.id in shown:
                    shown[outcome.example.id].append(_copied(outcome))
                shapes.add(tuple(outcome.noisy.shape))
                bar.update()
                yield outcome

        for sigma in sigmas:
            reports.append(summarise(outcomes(sigma), sigma, noise.seed))
    clean = reports[0].clean_accuracy
    if clean and classifier:
        warn_near_chance(clean.count, clean.total, classifier.num_classes)
    evaluation = Evaluation(
        noise.denoiser,
        model.model,
        chosen,
        shapes,
        reports,
        [describe_module(denoisers[sigma]) for sigma in sigmas],
        len(chosen) - len(images),
    )
    kept = [outcomes for outcomes in shown.values() if outcomes]
    picture = (Path(output.pictures) if output.pictures else _default_figure(evaluation)) if kept else None
    tell(json.dumps(to_json(evaluation, picture)) if output.as_json else describe(evaluation))
    if picture is not None:
        draw(evaluation, kept, picture, classifier.class_names if classifier else None)  # last: the numbers come first
        if not output.as_json:
            tell(f"\npicture    {picture}")


def _check_options(noise: EvaluationNoise, model: OptionalModelOptions, output: FigureOptions) -> list[float]:
    """Refuse what can be refused without importing torch; return the noise levels without duplicates."""
    from analysis.figures import check_format
    from certify.smoothing.noise import make_noise, warn_of_units
    from denoisers.names import require_trusted

    require_trusted(noise.denoiser, trust_code=model.trust_code)
    sigmas = list(dict.fromkeys(noise.sigma))
    for sigma in sigmas:
        make_noise("gaussian", sigma)
    warn_of_units(max(sigmas))
    if output.pictures is not None:
        check_format(output.pictures)
    if model.model:
        check_classifier(model.model, model)
    else:
        without = "without --model: there is no classifier to apply it to; add --model NAME"
        refuse_given(("weights", "mean", "std", "num_classes"), without)
    return sigmas


def _choose_images(
    model: OptionalModelOptions, data: DataOptions, classifier: Classifier | None, *, quiet: bool
) -> ImageSet:
    """Return the images to measure on: by default the demo images, spread over the data."""
    from certify.images.dataset import InputOnly

    if data.data is None:
        data = dataclasses.replace(data, data="digits" if model.model == "digits" else "photos")
        if not quiet:
            which = "the digits held out from training" if data.data == "digits" else "scikit-learn's two photographs"
            say(f"demo       no --data: {which}; pass your own images with --data")
    if classifier is None:
        data = dataclasses.replace(data, labels="none")
    most = data.max_images or MAX_IMAGES
    images = load_image_set(dataclasses.replace(data, max_images=None), classifier or InputOnly.at(model.input_size))
    chosen = range(len(images))[:most] if given_by_user("skip") else _spread(len(images), most)
    items, labels = [images.items[i] for i in chosen], [images.labels[i] for i in chosen]
    return dataclasses.replace(images, items=items, labels=labels)


def _spread(total: int, most: int) -> list[int]:
    """Return at most this many indices, evenly spaced."""
    count = min(most, total)
    return [i * total // count for i in range(count)]


def _copied(outcome: Outcome) -> Outcome:
    """Copy the images, so that the batch they are part of can be freed."""
    return dataclasses.replace(outcome, noisy=outcome.noisy.clone(), denoised=outcome.denoised.clone())


def _default_figure(evaluation: Evaluation) -> Path:
    levels = "sigma" + "_".join(f"{report.sigma:g}" for report in evaluation.reports)
    words = ["denoiser", evaluation.denoiser_name, Path(evaluation.images.name).stem, levels]
    from certify.runs.files import file_name

    return Path("runs") / f"{file_name(words)}.png"
