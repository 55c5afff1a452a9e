"""Options -> the objects they name; what can be checked without importing torch is checked first."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING

from certify.cli.option_groups import (
    ComputeOptions,
    DataOptions,
    DenoiserOptions,
    ImageOptions,
    InputOptions,
    NoiseOptions,
    StatisticsOptions,
)
from certify.cli.options import Options, given_by_user
from certify.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from certify.images.dataset import ImageSet, InputOnly
    from certify.models.classifier import Classifier
    from certify.smoothed_classifier import SmoothedClassifier
    from certify.smoothing.procedures.choose import AnyProcedure

DEMO_SAMPLES = 1000
"""Samples per image at most, where no --data is given."""


def check_classifier(model: str, options: InputOptions, denoiser: str = "none") -> None:
    """Refuse a classifier or denoiser that cannot be loaded, without importing torch.

    Raises:
        UserError: no such model or denoiser, no weights, or code that may not be run.
    """
    from certify.models import resolve

    source = resolve.find_source(model, options.weights)
    resolve.require_weights(source, options.weights, trust_code=options.trust_code)
    if denoiser != "none":
        from denoisers.names import require_trusted

        require_trusted(denoiser, trust_code=options.trust_code)


def check_noise(noise: DenoiserOptions) -> None:
    """Refuse a smoothing distribution that does not exist or does not fit its scale."""
    from certify.smoothing.noise import make_noise

    name, rounded = (noise.noise, noise.rounded) if isinstance(noise, NoiseOptions) else ("gaussian", False)
    make_noise(name, noise.sigma, rounded=rounded)


def procedure_from(
    statistics: StatisticsOptions,
    sequential_n: int | None = None,
    *,
    statement: str = "certificates",
    draws: int | None = None,
    population: bool = False,
) -> AnyProcedure:
    """Return the procedure that the options ask for; ``sequential_n`` is the default of --n for a sequential test.

    Raises:
        UserError: options that contradict each other.
    """
    from certify.smoothing.procedures.choose import procedure_for

    return procedure_for(
        n0=statistics.n0 if given_by_user("n0") else None,
        n=statistics.n if given_by_user("n") else None,
        alpha=statistics.alpha,
        bound=statistics.bound if given_by_user("bound") else None,
        radius=statistics.radius,
        tolerance=statistics.tolerance,
        rule=statistics.rule,
        default_n0=statistics.n0,
        default_n=statistics.n,
        sequential_n=sequential_n,
        statement=statement,
        draws=draws,
        population=population,
    )


def load_smoothed(
    model: str, options: InputOptions, noise: DenoiserOptions, compute: ComputeOptions
) -> SmoothedClassifier:
    """Load the smoothed classifier that the options name, with its denoiser, on its device."""
    from certify.api import load_smoothed
    from certify.smoothed_classifier import ModelOptions, SmoothingOptions

    given = options_for(ModelOptions, options) | options_for(SmoothingOptions, noise, compute)
    return load_smoothed(model, noise.sigma, given, compute.device)


def options_for(target: type, *groups: Options) -> dict[str, object]:
    """Return the options of a function in Python (a ``TypedDict``) from the fields of these groups with its names."""
    values = {name: value for group in groups for name, value in vars(group).items()}
    return {name: values[name] for name in target.__annotations__ if values.get(name) is not None}


def ids_from(options: ImageOptions) -> list[str] | None:
    """Return the ids in ``--ids``, which are separated as in a CSV file."""
    return [i for row in csv.reader(io.StringIO(options.ids, newline="")) for i in row] if options.ids else None


def classifier_from(model: str, options: InputOptions) -> Classifier:
    """Load the classifier of this name, with the user's settings in place of its own."""
    from certify.models.load import load_classifier
    from certify.smoothed_classifier import ModelOptions

    return load_classifier(model, **options_for(ModelOptions, options))  # type: ignore[arg-type]


def denoiser_for(
    name: str,
    sigma: float,
    image: tuple[int, int, int] | None,
    classifier: Classifier | None = None,
    *,
    trust_code: bool = False,
) -> nn.Module:
    """Load the denoiser of this name for images (C, H, W); warn if it was trained for other noise.

    Raises:
        UserError: no such denoiser, one for other images, or weights without a noise level.
    """
    from denoisers import load_denoiser

    identity = classifier.identity() if classifier is not None else None
    return load_denoiser(name, sigma=sigma, image=image, classifier=identity, trust_code=trust_code)


def device_from(name: str) -> str:
    """Return the device of this name; ``auto`` is an accelerator if there is one.

    Raises:
        UserError: this machine has no such device.
    """
    from certify.engine.hardware import find_device

    return str(find_device(name))


def demo_data(model: str, data: DataOptions, procedure: AnyProcedure) -> tuple[DataOptions, AnyProcedure, str]:
    """Choose images, and few enough of them or of their samples for a quick answer, where no --data is given.

    Args:
        model: name of the classifier.
        data: the options, without --data.
        procedure: as the other options have it.

    Returns:
        The options with images, the procedure, and a line that states what was chosen.
    """
    how = "pass your own images with --data FOLDER, FILE.zip, FILE.npz or IMAGE"
    if model == "digits":
        every = data.skip if given_by_user("skip") or given_by_user("ids") else 5
        data = dataclasses.replace(data, data="digits", skip=every)
        return data, procedure, f"demo       no --data: the digits held out from training; {how}"
    data = dataclasses.replace(data, data="photos")
    if given_by_user("n"):
        return data, procedure, f"demo       no --data: scikit-learn's two photographs; {how}"
    procedure = dataclasses.replace(procedure, n=min(procedure.n, DEMO_SAMPLES))
    few = f"n = {procedure.n:,} for a quick answer (--n sets it)"
    return data, procedure, f"demo       no --data: scikit-learn's two photographs, {few}; {how}"


def check_data(data: str | None, root: str | None) -> None:
    """Refuse a dataset's name that is also a folder here, unless --root says that the dataset is meant."""
    from certify.images.sources import DATASETS

    if data is not None and given_by_user("data") and root is None and data in DATASETS and Path(data).is_dir():
        raise UserError(
            f"--data {data} is a dataset's name and a folder here; write {data}/, or --root data for the dataset"
        )


def load_image_set(options: ImageOptions, classifier: Classifier | InputOnly) -> ImageSet:
    """Return the images that the options choose, with the classifier's labels for them."""
    from certify.images.dataset import load_images

    assert options.data is not None
    check_data(options.data, options.root)
    labelled = options if isinstance(options, DataOptions) else None
    images = load_images(
        options.data,
        classifier,
        skip=options.skip,
        start=options.start,
        max_images=options.max_images,
        ids=ids_from(options),
        labels=labelled.labels if labelled else "none",
        class_map=labelled.class_map if labelled else None,
        root=options.root,
        download=options.download,
    )
    if getattr(classifier, "probe_size", False) is None:  # a classifier that takes any size
        classifier.probe_size = images.first_shape()  # type: ignore[union-attr]
    return images
