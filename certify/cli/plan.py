"""Plan of a run, shown before it starts: model, data, procedure, engine, and warnings of settings that cannot work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from certify.cli.console import warn, warn_of_units
from certify.errors import CertifyError
from certify.smoothing.norms import DECIMALS, IN_WORDS
from certify.smoothing.rounding import ceil_to

if TYPE_CHECKING:
    from torch import Tensor

    from certify.engine.execution import Execution
    from certify.images.dataset import ImageSet
    from certify.runs.config import Settings
    from certify.runs.records import RunHeader
    from certify.smoothed_classifier import SmoothedClassifier
    from certify.smoothing.procedures import Procedure
    from certify.types import Radii

_TRIED = 50  # images without noise at most, to check that labels and classifier agree


def show_plan(
    smoothed: SmoothedClassifier, images: ImageSet, settings: Settings, header: RunHeader, say: Callable[[str], None]
) -> None:
    """Show what the options were resolved to, and warn of settings that cannot work."""
    sigma = smoothed.noise.scale
    for step in header.pipeline:
        if step["step"] == "denoiser":
            about = f" ({step['objective']}, trained for sigma {step['trained_for']})" if "trained_for" in step else ""
            say(f"denoiser   {step['name']}{about}, between the noise and the classifier")
            continue
        size = "x".join(map(str, step["input"])) if step["input"] else "any size"
        norm = f"mean {_list(step['mean'])} std {_list(step['std'])}" if step["mean"] else "none"
        say(f"model      {step['name']}: {step['num_classes']} classes, input {size}, weights: {step['weights']}")
        say(f"input      {step['transform']}; the noise is added there; then normalisation: {norm}")
    count = f"{len(images):,} of {images.available:,} images"
    say(f"data       {header.data}: {count}; labels: {images.rule}{images.omissions}")
    classes = {label for label in images.labels if label is not None}
    if len(images) >= 20 and len(classes) == 1 and smoothed.num_classes > 1:
        warn(f"all {len(images)} images are of class {classes.pop()}: is the data sorted? take every K-th with --skip")
    warn_of_units(sigma)
    procedure = settings.procedure
    first = images.first_usable()
    if first is not None:
        smoothed.check(first)
    stated = smoothed.stated(first.numel() if first is not None else 1)
    own = "" if stated.norm == smoothed.noise.norm else f", implied by the {IN_WORDS[smoothed.noise.norm]} radius"
    noise = f", {smoothed.noise.name} noise, sigma = {sigma:g} in [0, 1] pixels"
    show_prospects(procedure, stated, sigma, say, noise, own)


def show_prospects(
    procedure: Procedure, stated: Radii, sigma: float, say: Callable[[str], None], noise: str = "", implied: str = ""
) -> None:
    """Show the sampling plan and the largest radii it can certify; warn of radii that it cannot."""
    prospects = procedure.prospects(stated)
    say(f"procedure  {procedure.describe()}{noise}")
    for line in prospects.lines:
        say(f"radius     {line}")
    if prospects.largest is not None and not procedure.radii:
        cap = prospects.largest
        in_sigma = f" ({ceil_to(cap / sigma, 2)} sigma)" if stated.norm == "l2" else ""
        most = f"{ceil_to(cap, DECIMALS[stated.norm])}{in_sigma}"
        say(f"radius     {IN_WORDS[stated.norm]}, at most {most} at this n and alpha{implied}")
    for warning in prospects.warnings:
        warn(warning)


class Engine(Protocol):
    """Runs the base classifier: in this process, or on the workers of a cluster."""

    execution: Execution | None

    def prepare(self, image: Tensor, samples: int, execution: Execution | None = None) -> Execution:
        """Choose how to run it for this number of samples, or run it with the given settings."""
        ...

    def base_labels(self, images: Sequence[Tensor]) -> list[int] | None:
        """Return labels of images without noise; None if that is not possible here."""
        ...

    def measure_rate(self, image: Tensor) -> float | None:
        """Return samples per second of one device; None if that is not possible here."""
        ...


def show_engine(
    execution: Execution, smoothed: SmoothedClassifier, say: Callable[[str], None], where: str = ""
) -> None:
    """Show how the base classifier is run, where (by default in this process), and why."""
    import torch

    from certify.engine.hardware import in_threads

    threads = f" ({in_threads(torch.get_num_threads())})" if smoothed.device.type == "cpu" else ""
    say(f"engine     {execution.describe()}, on {where or f'{smoothed.device}{threads}'}")
    for why in execution.why:
        say(f"           {why}")


def check_base(engine: Engine, smoothed: SmoothedClassifier, images: ImageSet) -> None:
    """Warn if the classifier without noise is near chance: then labels or normalisation are probably wrong."""
    if not images.labelled:
        return
    loaded, truth = [], []
    for i in range(0, len(images), max(1, -(-len(images) // _TRIED))):
        with contextlib.suppress(CertifyError):
            loaded.append(smoothed.check(images.load(i)))
            truth.append(images.labels[i])
    labels = engine.base_labels(loaded)
    if labels is None:
        return
    warn_near_chance(
        sum(a == b for a, b in zip(labels, truth, strict=True)),
        len(loaded),
        smoothed.num_classes,
        denoised=smoothed.base.denoiser is not None,
    )


def warn_near_chance(correct: int, total: int, classes: int, *, denoised: bool = False) -> None:
    """Warn if this many correct labels are near chance; ``denoised``: the classifier is behind a denoiser."""
    from certify.runs.runner import near_chance

    if total and near_chance(correct, total, classes):
        who = "the classifier behind the denoiser" if denoised else "the classifier"
        first = "a denoiser of other images or noise (without it: --denoiser none)? " if denoised else ""
        warn(
            f"without noise {who} is right on {correct} of {total} images, which is near chance: {first}"
            "wrong class order (--class-map)? normalised twice or not at all (--mean, --std)? another model's weights?"
        )


def _list(values: Any) -> str:
    return ",".join(f"{v:g}" for v in values)
