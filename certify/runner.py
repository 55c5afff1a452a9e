"""A run: chosen images, one after the other, through the smoothed classifier into the run file.

Pure bookkeeping around :mod:`certify.smoothing`; the command line adds words, a progress bar and pictures.
"""

from __future__ import annotations

import datetime
import logging
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from certify.certificates import certificate_from_votes, check_counts, prediction_from_votes
from certify.errors import ImageError, UserError
from certify.execution import Execution
from certify.images import ImageSet
from certify.labels import readable
from certify.machine import machine_name
from certify.records import SCHEMA, RunFile
from certify.smoothing import KEPT, SmoothedClassifier, image_digest
from certify.streams import STREAM
from certify.tuning import Wanted
from certify.types import Votes
from certify.votes import Tally

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
    def stages(self) -> dict[str, int]:
        """Noisy copies of each stage."""
        return {"selection": self.n0, "estimation": self.n} if self.procedure == "certify" else {"prediction": self.n}

    @property
    def samples(self) -> int:
        """Noisy copies an image."""
        return sum(self.stages.values())

    def compared(self, index: int) -> bool:
        """Whether this image's first labels (at most ``KEPT``) are compared with plain float32's.

        Of every image at n = 100,000, of every tenth at 10,000: about a thousandth of all samples.
        """
        return index % -(-1000 * KEPT // self.n) == 0


def run_header(
    smoothed: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    *,
    model: str,
    data: str,
    denoiser: str = "none",
    command: str = "",
) -> dict[str, Any]:
    """Everything that shaped the run, and how many images it owes.

    How the base classifier is run stands there as it was asked for, until :func:`with_execution` says what ran.
    """
    wanted = smoothed.wanted
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
        "precision": wanted.precision,
        "compiled": wanted.compile,
        "folded": "auto",
        "device": smoothed.device.type,
        "accelerator": machine_name(smoothed.device) if smoothed.device.type != "cpu" else None,
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "expected": len(images),
        "images": images.describe(),
        "pipeline": smoothed.base.describe()["steps"],
        "stream": STREAM,
        "versions": versions(),
        "machine": {"processor": machine_name(torch.device("cpu")), "threads": torch.get_num_threads()},
        "batch_size": wanted.batch_size or "auto",
        "execution": {"asked": asdict(wanted)},
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


def with_execution(header: dict[str, Any], execution: Execution) -> dict[str, Any]:
    """The header, saying how the base classifier is really run and why."""
    asked = header["execution"]["asked"]
    how = {key: getattr(execution, key) for key in ("precision", "folded", "compiled", "batch_size")}
    return {**header, **how, "execution": {"asked": asked, "why": list(execution.why)}}


def execution_of(header: Mapping[str, Any], wanted: Wanted) -> Execution | None:
    """How the run of this header was run, unless the user asks for something else now; None if it does not say."""
    try:
        found = Execution(*(header[key] for key in ("precision", "folded", "compiled", "batch_size")))
        asked = header["execution"]["asked"]
    except (KeyError, TypeError):
        return None
    found = replace(found, why=("as the run file says",))
    if asked == asdict(wanted):
        return found
    if wanted.precision not in ("auto", found.precision):
        found = replace(found, precision=wanted.precision)
    if wanted.compile != "auto":
        found = replace(found, compiled=wanted.compile == "on")
    return replace(found, batch_size=wanted.batch_size or found.batch_size)


def process(
    smoothed: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    file: RunFile,
    *,
    strict: bool = False,
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
    pulled: deque[tuple[int, Tensor | ImageError]] = deque()  # images share batches: some are on their way at once

    def usable() -> Iterator[tuple[Tensor, str]]:
        for index, item in enumerate(images.items):
            known = file.done.get(item.id)
            if known is not None and not (strict and "error" in known):
                continue
            try:
                if known is not None:
                    raise ImageError(known["error"])
                image = images.load(index)
            except ImageError as error:
                pulled.append((index, error))
                if strict:
                    return  # raised when the images before it are written
                continue
            pulled.append((index, image))
            yield image, item.id

    start = time.perf_counter()

    def write(index: int, row: Mapping[str, Any]) -> None:
        nonlocal start
        now = time.perf_counter()
        line = {"id": images.items[index].id, "label": images.labels[index], **row, "seconds": round(now - start, 6)}
        start = now
        file.append(line)

    def write_unusable() -> None:
        while pulled and isinstance(pulled[0][1], ImageError):
            index, error = pulled.popleft()
            if strict:
                raise ImageError(f"image {images.items[index].id} {error}; drop --strict to go on without it") from None
            warn(f"image {images.items[index].id} {error}; it is left out")
            write(index, _unusable(settings, str(error)))
            if progress is not None:
                progress(settings.samples)

    for tallies in smoothed.tallies(usable(), settings.stages, seed=settings.seed, clean=True, progress=progress):
        write_unusable()
        index, image = pulled.popleft()
        assert isinstance(image, Tensor)
        row = _row(smoothed, tallies, settings)
        if settings.compared(index) and smoothed.execution is not None and not smoothed.execution.plain:
            row |= _agreement(smoothed, image, images.items[index].id, tallies, settings)
        write(index, {**row, "image": image_digest(image)})
    write_unusable()


def _row(smoothed: SmoothedClassifier, tallies: Mapping[str, Tally], settings: Settings) -> dict[str, Any]:
    """The keys of one image's line that follow from its votes."""
    answer: dict[str, Any]
    if settings.procedure == "certify":
        selection, estimation = tallies["selection"].votes, tallies["estimation"].votes
        certificate = certificate_from_votes(
            selection, estimation, noise=smoothed.noise, alpha=settings.alpha, bound=settings.bound
        )
        answer = {
            "prediction": certificate.prediction,
            "radius": certificate.radius,
            "p_lower": certificate.p_lower,
            **_stages(selection, estimation),
        }
    else:
        predicted = prediction_from_votes(tallies["prediction"].votes, alpha=settings.alpha)
        answer = {
            "prediction": predicted.prediction,
            "radius": None,
            "p_lower": None,
            **_stages(Votes(()), predicted.votes),
            "p_value": predicted.p_value,
        }
    base, names = int(tallies["clean"].labels[0]), getattr(smoothed.classifier, "class_names", None)
    return {
        **answer,
        "base": base,
        "class": None if answer["prediction"] < 0 else readable(names, answer["prediction"]),
        "base_class": readable(names, base),
    }


def _agreement(
    smoothed: SmoothedClassifier, image: Tensor, image_id: str, tallies: Mapping[str, Tally], settings: Settings
) -> dict[str, Any]:
    """How many of the first stage's first labels plain float32 gives too."""
    stage = next(iter(settings.stages))
    labels = tallies[stage].labels
    same = smoothed.agreement(image, labels, stage=stage, seed=settings.seed, image_id=image_id)
    return {"agreement": [same, len(labels)]}


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
