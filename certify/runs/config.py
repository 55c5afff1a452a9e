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
from certify.engine.tuning import Wanted
from certify.errors import UserError
from certify.images.dataset import ImageSet
from certify.registry import PLUGINS
from certify.runs.run_file import SCHEMA, now
from certify.smoothing.certificates import check_counts
from certify.smoothing.numeric import as_float, as_int
from certify.smoothing.rng import STREAM
from certify.smoothing.stopping_rules import DEFAULT_RULE, MEASURING_BOUND
from certify.types import Noise

PROCEDURES = ("certify", "predict", "decide")

USUAL_SAMPLES = 1000
"""A guess at the samples an image takes where it stops by itself, to decide how much preparing pays."""


@dataclass(frozen=True)
class Settings:
    """The numbers of a run.

    Attributes:
        n: estimation samples; the most of them where images stop by themselves.
        n0: selection samples (not for ``predict`` and where images stop by themselves: one stage).
        alpha: probability of error for each image.
        seed: of all noise; secret where images may come from an adversary, who could craft them against known noise.
        bound: name of the bound.
        procedure: ``"certify"``, ``"predict"`` or ``"decide"``.
        radii: to decide, ascending.
        tolerance: to certify until the radius is known to it, in (0, 1).
        rule: name of the stopping rule.
    """

    n: int = 100_000
    n0: int = 100
    alpha: float = 0.001
    seed: int = 0
    bound: str = "clopper-pearson"
    procedure: str = "certify"
    radii: tuple[float, ...] = ()
    tolerance: float | None = None
    rule: str = DEFAULT_RULE

    def __post_init__(self) -> None:
        n, n0, alpha = check_counts(self.n, self.n0 if self.procedure == "certify" else 1, self.alpha)
        n0 = n0 if self.procedure == "certify" else as_int(self.n0, "n0")
        tolerance = None if self.tolerance is None else as_float(self.tolerance, "tolerance")
        radii = tuple(sorted({as_float(radius, "radius") for radius in self.radii}))
        numbers = {"n": n, "n0": n0, "alpha": alpha, "seed": as_int(self.seed, "seed"), "tolerance": tolerance}
        for name, value in (numbers | {"radii": radii}).items():
            object.__setattr__(self, name, value)
        if self.procedure not in PROCEDURES:
            raise UserError(f"procedure {self.procedure!r}; expected one of {', '.join(PROCEDURES)}")
        if (self.procedure == "decide") != bool(self.radii):
            raise UserError("a procedure decide has radii to decide, and no other has")
        if self.tolerance is not None and (self.procedure, self.bound) != ("certify", MEASURING_BOUND):
            raise UserError(f"a tolerance belongs to procedure certify with bound {MEASURING_BOUND}")

    @property
    def adaptive(self) -> bool:
        """Whether each image stops by itself."""
        return self.procedure == "decide" or self.tolerance is not None

    @property
    def stages(self) -> dict[str, int]:
        """Noisy copies of each stage, at most."""
        if self.adaptive:
            return {"estimation": self.n}
        return {"selection": self.n0, "estimation": self.n} if self.procedure == "certify" else {"prediction": self.n}

    @property
    def samples(self) -> int:
        """Noisy copies an image, at most."""
        return sum(self.stages.values())

    @property
    def likely(self) -> int:
        """Noisy copies an image, about."""
        return min(self.n, USUAL_SAMPLES) if self.adaptive else self.samples

    def compared(self, index: int) -> bool:
        """Whether this image's first labels (at most ``KEPT``) are compared with plain float32's.

        Of every image at n = 100,000, of every tenth at 10,000: about a thousandth of all samples.
        """
        return index % -(-1000 * KEPT // self.likely) == 0

    def stopping(self) -> dict[str, Any] | None:
        """How images stop, as the header says it; None: at n."""
        if not self.adaptive:
            return None
        rule = self.rule if self.procedure == "decide" else MEASURING_BOUND
        return {"rule": rule, "radii": list(self.radii), "tolerance": self.tolerance}

    def numbers(self, noise: Noise, norm: str) -> dict[str, Any]:
        """What the header says of the noise, the norm of the radii, and how the votes are counted."""
        return {
            "noise": noise.name,
            "rounded": bool(getattr(noise, "rounded", False)),
            "norm": norm,
            "sigma": noise.scale,
            "n0": self.stages.get("selection", 0),
            "n": self.n,
            "alpha": self.alpha,
            "bound": {"certify": self.bound, "predict": "binomial test", "decide": self.rule}[self.procedure],
            "stopping": self.stopping(),
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
    wanted = smoothed.wanted
    return {
        "type": "run",
        "schema": SCHEMA,
        "procedure": settings.procedure,
        "model": model,
        "data": data,
        "denoiser": denoiser,
        **settings.numbers(smoothed.noise, smoothed.norm),
        "precision": wanted.precision,
        "compiled": wanted.compile,
        "folded": "auto",
        **circumstances(smoothed.device),
        "expected": len(images),
        "images": images.describe(),
        "unread": list(images.unread),
        "pipeline": smoothed.base.record(),
        "stream": STREAM,
        "batch_size": wanted.batch_size or "auto",
        "execution": {"asked": asdict(wanted)},
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
