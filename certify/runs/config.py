"""What shapes a run: its numbers, and the run file's header that says all of it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from certify.engine.execution import Execution
from certify.engine.hardware import machine_name
from certify.engine.noisy_classifier import KEPT, NoisyClassifier
from certify.engine.policy import EngineOptions
from certify.images.dataset import ImageSet
from certify.registry import PLUGINS
from certify.runs.run_file import SCHEMA, now
from certify.smoothing.numeric import as_int
from certify.smoothing.procedures import Procedure, expected_samples, header_keys
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

    def header_keys(self, noise: Noise, norm: str) -> dict[str, Any]:
        """Return the header's keys about the noise, the norm of the radii, and the procedure."""
        return {
            "noise": noise.name,
            "rounded": bool(getattr(noise, "rounded", False)),
            "norm": norm,
            "sigma": noise.scale,
            **header_keys(self.procedure),
            "seed": self.seed,
        }


def run_header(
    smoothed: NoisyClassifier,
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
    asked = smoothed.options
    return {
        "type": "run",
        "schema": SCHEMA,
        "model": model,
        "data": data,
        "denoiser": denoiser,
        **settings.header_keys(smoothed.noise, smoothed.norm),
        "precision": asked.precision,
        "compiled": asked.compile,
        "folded": "auto",
        **circumstances(smoothed.device),
        "expected": len(images),
        "images": images.describe(),
        "unread": list(images.unread),
        "pipeline": smoothed.base.record(),
        "stream": STREAM,
        "batch_size": asked.batch_size or "auto",
        "execution": {"asked": asdict(asked)},
        "created": now(),
        "command": command,
    }


def circumstances(device: torch.device) -> dict[str, Any]:
    """What the header says of the device and the machine on which the base classifier runs."""
    return {
        "device": device.type,
        "accelerator": machine_name(device) if device.type != "cpu" else None,
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "versions": versions(),
        "machine": {"processor": machine_name(torch.device("cpu")), "threads": torch.get_num_threads()},
    }


def versions() -> dict[str, str]:
    """Versions of what computes the numbers, packages included whose components were used."""
    found = {"python": platform.python_version()}
    for package in ("certify-toolkit", "torch", "torchvision", "timm", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | PLUGINS


def with_execution(header: dict[str, Any], execution: Execution) -> dict[str, Any]:
    """The header, saying how the base classifier is really run and why."""
    asked = header["execution"]["asked"]
    how = {key: getattr(execution, key) for key in ("precision", "folded", "compiled", "batch_size")}
    return {**header, **how, "execution": {"asked": asked, "why": list(execution.why)}}


def execution_of(header: Mapping[str, Any], options: EngineOptions) -> Execution | None:
    """How the run of this header was run, unless the user asks for something else now; None if it does not say."""
    try:
        found = Execution(*(header[key] for key in ("precision", "folded", "compiled", "batch_size")))
        asked = header["execution"]["asked"]
    except (KeyError, TypeError):
        return None
    found = replace(found, why=("as the run file says",))
    if asked == asdict(options):
        return found
    if options.precision not in ("auto", found.precision):
        found = replace(found, precision=options.precision)
    if options.compile != "auto":
        found = replace(found, compiled=options.compile == "on")
    return replace(found, batch_size=options.batch_size or found.batch_size)
