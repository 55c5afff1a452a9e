"""``certify evaluate-denoiser``: what a denoiser makes of noisy images, in numbers and in pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.attack_options import readable
from certify.cli.console import progress_bar, say, tell, warn_of_units
from certify.cli.load import chosen_images, classifier_from, denoiser_for, device_from
from certify.cli.output_files import telling_name
from certify.cli.plan import first_shape, warn_near_chance

if TYPE_CHECKING:
    from certify.cli.denoiser_quality import Evaluated
    from certify.images.dataset import ImageSet
    from certify.models.classifier import Classifier
    from training.evaluate import Outcome

_MOST = 500


@click.command("evaluate-denoiser", short_help="Measure a denoiser: PSNR, SSIM, accuracy behind it, pictures.")
@click.option("--denoiser", required=True, help="The denoiser: a name (`certify list denoisers`) or a file.")
@click.option(
    "--sigma",
    type=options.Numbers(),
    required=True,
    help="Standard deviation of the noise in [0, 1] pixels; several separated by commas.",
)
@options.model_if_any
@options.input_options
@options.data_options
@options.seed("all noise")
@options.device
@click.option("--pictures", metavar="FILE", help="Picture to write: .png, .svg or .pdf (default: a .png under runs/).")
@click.option(
    "--images",
    "rows",
    type=options.Count("how many images to show", least=0),
    default=8,
    help="Rows of the picture; 0 draws none.",
)
@options.as_json("the table")
def evaluate_denoiser(**o: Any) -> None:
    """Measure a denoiser on images plus Gaussian noise, once for each image: PSNR, SSIM, and a picture.

    With --model also how often the classifier is right, and how often it says what it says without noise. Without
    --model images keep their own size, or take that of --input-size. At most 500 images are taken (--max), spread over
    the data (or every K-th: --skip). These are empirical figures; certificates come from `certify --denoiser`.
    """
    sigmas = _check_first(o)
    classifier = classifier_from(o["model"], o) if o["model"] else None
    chosen = _images(o, classifier)
    images, device = readable(chosen, o), device_from(o["device"])

    import torch

    from certify.cli.denoiser_quality import Evaluated, as_json, draw, in_words
    from certify.models.pipeline import in_its_words
    from training.evaluate import Example, measure, summarise

    if device.startswith("cuda"):  # float32 means float32, as when certifying
        torch.backends.cudnn.allow_tf32 = False
    denoisers = {
        sigma: denoiser_for(
            o["denoiser"], sigma, images.input.size or first_shape(images), classifier, trust_code=o["trust_code"]
        ).to(device)
        for sigma in sigmas
    }
    classifier = classifier.to(device) if classifier is not None else None
    shown: dict[str, list[Outcome]] = {images.items[i].id: [] for i in _spread(len(images), o["rows"])}
    shapes = set[tuple[int, ...]]()
    reports = []
    with progress_bar(len(images) * len(sigmas), "images", hidden=o["as_json"]) as bar:

        def watched(sigma: float) -> Iterator[Outcome]:
            there = (Example(item.id, images.load(i), images.labels[i]) for i, item in enumerate(images.items))
            for found in measure(denoisers[sigma], there, sigma, classifier=classifier, seed=o["seed"], device=device):
                if found.example.id in shown:
                    shown[found.example.id].append(_apart(found))
                shapes.add(tuple(found.noisy.shape))
                bar.update()
                yield found

        for sigma in sigmas:
            reports.append(summarise(watched(sigma), sigma, o["seed"]))
    clean = reports[0].clean_accuracy
    if clean and classifier:
        warn_near_chance(clean.count, clean.total, classifier.num_classes)
    described = [in_its_words(denoisers[sigma]) for sigma in sigmas]
    done = Evaluated(o["denoiser"], o["model"], chosen, shapes, reports, described, len(chosen) - len(images))
    kept = [outcomes for outcomes in shown.values() if outcomes]
    picture = _picture(o, done) if kept else None
    tell(json.dumps(as_json(done, picture)) if o["as_json"] else in_words(done))
    if picture is not None:
        draw(done, kept, picture, classifier.class_names if classifier else None)  # last: the numbers are out already
        if not o["as_json"]:
            tell(f"\npicture    {picture}")


def _check_first(o: dict[str, Any]) -> list[float]:
    """Everything that can be refused before torch is imported; the noise levels, each once."""
    from analysis.figures import check_format
    from certify.models import resolve as hub
    from certify.smoothing.noise import make_noise
    from denoisers.names import require_trusted

    require_trusted(o["denoiser"], trust_code=o["trust_code"])
    sigmas = list(dict.fromkeys(o["sigma"]))
    for sigma in sigmas:
        make_noise("gaussian", sigma)
    warn_of_units(max(sigmas))
    if o["pictures"] is not None:
        check_format(o["pictures"])
    if o["model"]:
        hub.require_weights(hub.find_source(o["model"], o["weights"]), o["weights"], trust_code=o["trust_code"])
        return sigmas
    without = "without --model: there is no classifier it could belong to; add --model NAME"
    options.refuse_given(("weights", "mean", "std", "num_classes"), without)
    return sigmas


def _images(o: dict[str, Any], classifier: Classifier | None) -> ImageSet:
    """The images that the options choose: without --data those at hand, without --skip spread over the data."""
    from certify.images.dataset import View

    if o["data"] is None:
        o["data"] = "digits" if o["model"] == "digits" else "photos"
        if not o["as_json"]:
            which = "the digits held out from training" if o["model"] == "digits" else "scikit-learn's two photographs"
            say(f"demo       no --data: {which}; pass your own images with --data")
    most = o["max_images"] or _MOST
    if classifier is None:
        o["labels"] = "none"
    found = chosen_images({**o, "max_images": None}, classifier or View.at(o["input_size"]))
    chosen = range(len(found))[:most] if options.given_by_user("skip") else _spread(len(found), most)
    return dataclasses.replace(found, items=[found.items[i] for i in chosen], labels=[found.labels[i] for i in chosen])


def _spread(total: int, most: int) -> list[int]:
    """So many indices, evenly."""
    count = min(most, total)
    return [i * total // count for i in range(count)]


def _apart(found: Outcome) -> Outcome:
    """The same in memory of its own, so that its batch can go."""
    return dataclasses.replace(found, noisy=found.noisy.clone(), denoised=found.denoised.clone())


def _picture(o: dict[str, Any], done: Evaluated) -> Path:
    """Where the picture goes: as named, or a telling name under runs/."""
    if o["pictures"] is not None:
        return Path(o["pictures"])
    levels = "sigma" + "_".join(f"{report.sigma:g}" for report in done.reports)
    words = ["denoiser", done.denoiser_name, Path(done.images.name).stem, levels]
    return Path("runs") / f"{telling_name(words)}.png"
