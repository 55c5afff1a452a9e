"""A run: chosen images, one after the other, through the smoothed classifier into the run file.

Pure bookkeeping around :mod:`certify.smoothing`; the command line adds words, a progress bar and pictures.
"""

from __future__ import annotations

import datetime
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from certify.errors import ImageError, UserError
from certify.images import ImageSet
from certify.labels import readable
from certify.records import SCHEMA, RunFile
from certify.smoothing import SmoothedClassifier, check_counts, image_digest
from certify.streams import STREAM
from certify.types import Votes

_LOG = logging.getLogger("certify")

PROCEDURES = ("certify", "predict")


@dataclass(frozen=True)
class Settings:
    """The numbers of a run.

    Attributes:
        n: estimation samples.
        n0: selection samples (0 for ``predict``, which has one stage).
        alpha: probability of error for each image.
        seed: of all noise.
        bound: name of the one-sided bound.
        procedure: ``"certify"`` or ``"predict"``.
    """

    n: int = 100_000
    n0: int = 100
    alpha: float = 0.001
    seed: int = 0
    bound: str = "clopper-pearson"
    procedure: str = "certify"

    def __post_init__(self) -> None:
        check_counts(self.n, self.n0 if self.procedure == "certify" else 1, self.alpha)
        if self.procedure not in PROCEDURES:
            raise UserError(f"procedure {self.procedure!r}; expected one of {', '.join(PROCEDURES)}")

    @property
    def samples(self) -> int:
        """Noisy copies an image."""
        return self.n + (self.n0 if self.procedure == "certify" else 0)


def run_header(
    smoothed: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    *,
    model: str,
    data: str,
    denoiser: str = "none",
    command: str = "",
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Everything that shaped the run, and how many images it owes."""
    return {
        "type": "run",
        "schema": SCHEMA,
        "procedure": settings.procedure,
        "model": model,
        "data": data,
        "denoiser": denoiser,
        "noise": smoothed.noise.name,
        "norm": smoothed.noise.norm,
        "sigma": smoothed.noise.scale,
        "n0": settings.n0 if settings.procedure == "certify" else 0,
        "n": settings.n,
        "alpha": settings.alpha,
        "bound": settings.bound if settings.procedure == "certify" else "binomial test",
        "seed": settings.seed,
        "precision": "float32",
        "device": smoothed.device.type,
        "accelerator": device_name(smoothed.device) if smoothed.device.type != "cpu" else None,
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "expected": len(images),
        "images": images.describe(),
        "pipeline": smoothed.base.describe()["steps"],
        "stream": STREAM,
        "versions": versions(),
        "machine": {"processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "batch_size": batch_size or "chosen by image size",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    found = {"python": platform.python_version()}
    for package in ("certify-toolkit", "torch", "torchvision", "timm", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def process(
    smoothed: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    file: RunFile,
    *,
    strict: bool = False,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] = _LOG.warning,
) -> None:
    """Certify (or predict) every image that the file does not hold yet, and append its line.

    An image that cannot be used is named, recorded with its ``error`` and counts as an abstention without trials; with
    ``strict`` it ends the run.

    Raises:
        ImageError: with ``strict``, the first unusable image.
        RunFault: the run file cannot be written.
    """
    for index, item in enumerate(images.items):
        if item.id in file.done:
            if strict and "error" in file.done[item.id]:
                raise ImageError(f"image {item.id} {file.done[item.id]['error']}; drop --strict to go on without it")
            continue
        start = time.perf_counter()
        try:
            image = images.load(index)
            row = _one(smoothed, image, item.id, settings, batch_size, progress)
        except ImageError as error:
            message = f"image {item.id} {error}"
            if strict:
                raise ImageError(f"{message}; drop --strict to go on without it") from None
            warn(message + "; it is left out")
            row = _unusable(settings, str(error))
            if progress is not None:
                progress(settings.samples)
        seconds = round(time.perf_counter() - start, 6)
        file.append({"id": item.id, "label": images.labels[index], **row, "seconds": seconds})


def _one(
    smoothed: SmoothedClassifier,
    image: Tensor,
    image_id: str,
    settings: Settings,
    batch_size: int | None,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    """The keys of one image's line, but for id, label and time."""
    common: dict[str, Any] = {
        "n": settings.n,
        "alpha": settings.alpha,
        "seed": settings.seed,
        "image_id": image_id,
        "batch_size": batch_size,
        "progress": progress,
    }
    if settings.procedure == "certify":
        certificate = smoothed.certify(image, n0=settings.n0, bound=settings.bound, **common)
        answer = {
            "prediction": certificate.prediction,
            "radius": certificate.radius,
            "p_lower": certificate.p_lower,
            **_stages(certificate.selection, certificate.estimation),
        }
    else:
        predicted = smoothed.predict(image, **common)
        answer = {
            "prediction": predicted.prediction,
            "radius": None,
            "p_lower": None,
            **_stages(Votes(()), predicted.votes),
            "p_value": predicted.p_value,
        }
    base, names = smoothed.base_label(image), getattr(smoothed.classifier, "class_names", None)
    return {
        **answer,
        "base": base,
        "class": None if answer["prediction"] < 0 else readable(names, answer["prediction"]),
        "base_class": readable(names, base),
        "image": image_digest(image),
    }


def _stages(selection: Votes, estimation: Votes) -> dict[str, Any]:
    return {
        "votes": estimation.as_dict(),
        "selection": selection.as_dict(),
        "trials": estimation.trials,
        "failures": estimation.failures,
        "selection_failures": selection.failures,
    }


def _unusable(settings: Settings, reason: str) -> dict[str, Any]:
    nothing = None if settings.procedure == "predict" else 0.0
    empty = {"prediction": -1, "radius": nothing, "p_lower": nothing, **_stages(Votes(()), Votes(()))}
    return {**empty, "base": None, "image": None, "error": reason}


def near_chance(correct: int, total: int, num_classes: int) -> bool:
    """Whether guessing explains this many right answers, while a classifier that is right half the time does not."""
    from scipy.special import bdtr, bdtrc

    guessing = float(bdtrc(correct - 1, total, 1.0 / num_classes)) if correct else 1.0
    half_right = float(bdtr(correct, total, 0.5))
    return guessing > 0.01 and half_right < 0.01
