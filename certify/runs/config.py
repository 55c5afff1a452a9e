"""The settings of a run, and the run file's header that records them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Required, TypedDict, Unpack

import torch

from certify.engine.execution import Execution
from certify.engine.hardware import machine_name
from certify.engine.noisy_classifier import KEPT, NoisyClassifier
from certify.engine.policy import EngineOptions
from certify.images.dataset import ImageSet
from certify.models.pipeline import Pipeline
from certify.registry import PLUGINS
from certify.runs.records import SCHEMA, RunHeader, Stopping
from certify.runs.run_file import now
from certify.runs.schema import MissingKey
from certify.smoothing.numeric import as_int
from certify.smoothing.procedures import SELECTION, Procedure, expected_samples
from certify.smoothing.rng import STREAM
from certify.types import Noise


@dataclass(frozen=True)
class Settings:
    """The question of a run and the seed of its noise.

    Attributes:
        procedure: certify, measure, decide or predict, with its numbers.
        seed: of all noise.
    """

    procedure: Procedure
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", as_int(self.seed, "seed"))

    def compared(self, index: int) -> bool:
        """True if this image's first labels (at most ``KEPT``) are compared with those of plain float32.

        Every image at n = 100,000, every tenth at 10,000: about a thousandth of all samples.
        """
        return index % -(-1000 * KEPT // expected_samples(self.procedure)) == 0


@dataclass(frozen=True)
class Circumstances:
    """The device and machine that run the base classifier: fields of the header with these names."""

    device: str
    accelerator: str | None
    torch: str
    versions: Mapping[str, str]
    machine: Mapping[str, Any]


class Names(TypedDict, total=False):
    """What the command calls its parts, for the record."""

    model: Required[str]
    data: Required[str]
    denoiser: str
    command: str


def make_header(
    settings: Settings,
    noise: Noise,
    norm: str,
    images: ImageSet,
    pipeline: Pipeline,
    device: torch.device,
    engine: Execution | EngineOptions,
    names: Names,
) -> RunHeader:
    """Return the header that live runs and audits have in common, with the actual or the requested engine settings."""
    procedure = settings.procedure
    return RunHeader(
        schema=SCHEMA,
        model=names["model"],
        data=names["data"],
        denoiser=names.get("denoiser", "none"),
        noise=noise.name,
        rounded=bool(getattr(noise, "rounded", False)),
        norm=norm,
        sigma=noise.scale,
        kind=procedure.kind,
        n0=procedure.stages.get(SELECTION, 0),
        n=procedure.n,
        alpha=procedure.alpha,
        bound=procedure.bound,
        stopping=None if procedure.stopping is None else Stopping(**vars(procedure.stopping)),
        seed=settings.seed,
        precision=engine.precision,
        compiled=engine.compiled if isinstance(engine, Execution) else engine.compile,
        folded=engine.folded if isinstance(engine, Execution) else "auto",
        **vars(circumstances(device)),
        expected=len(images),
        images=images.describe(),
        pipeline=pipeline.record(),
        stream=STREAM,
        batch_size=engine.batch_size or "auto",
        created=now(),
        command=names.get("command", ""),
    )


def run_header(smoothed: NoisyClassifier, images: ImageSet, settings: Settings, **names: Unpack[Names]) -> RunHeader:
    """Return the header of a run, with the requested engine settings (:func:`with_execution` sets the actual ones)."""
    options, noise = smoothed.options, smoothed.noise
    header = make_header(settings, noise, smoothed.norm, images, smoothed.base, smoothed.device, options, names)
    return header.replace(unread=list(images.unread), execution={"asked": asdict(options)})


def circumstances(device: torch.device) -> Circumstances:
    """Return what the header says about the device and the machine that run the base classifier."""
    return Circumstances(
        device=device.type,
        accelerator=machine_name(device) if device.type != "cpu" else None,
        torch=".".join(torch.__version__.split(".")[:2]),
        versions=versions(),
        machine={"processor": machine_name(torch.device("cpu")), "threads": torch.get_num_threads()},
    )


def versions() -> dict[str, str]:
    """Versions of what computes the numbers, packages included whose components were used."""
    found = {"python": platform.python_version()}
    for package in ("certify-toolkit", "torch", "torchvision", "timm", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | PLUGINS


def with_execution(header: RunHeader, execution: Execution) -> RunHeader:
    """Return the header with the actual engine settings and the reasons for them."""
    return header.replace(
        precision=execution.precision,
        folded=execution.folded,
        compiled=execution.compiled,
        batch_size=execution.batch_size,
        execution={**(header.execution or {}), "why": list(execution.why)},
    )


def execution_of(header: RunHeader, options: EngineOptions) -> Execution | None:
    """Return the engine settings of a run's header, changed where the user asks for others; None if it has none."""
    found = recorded_execution(header)
    asked = (header.execution or {}).get("asked")
    if found is None or asked is None:
        return None
    found = replace(found, why=("as the run file says",))
    if asked == asdict(options):
        return found
    if options.precision not in ("auto", found.precision):
        found = replace(found, precision=options.precision)
    if options.compile != "auto":
        found = replace(found, compiled=options.compile == "on")
    return replace(found, batch_size=options.batch_size or found.batch_size)


def recorded_execution(header: RunHeader) -> Execution | None:
    """Return the engine settings that a header states; None if it lacks one of them."""
    try:
        return Execution(header.precision, header.folded, header.compiled, header.batch_size)  # type: ignore[arg-type]
    except MissingKey:
        return None
