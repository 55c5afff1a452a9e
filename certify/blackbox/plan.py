"""Define the inputs of an audit and its plan: maximum cost and largest certifiable radius."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.blackbox.answers import CLEAN, DRIFT, PROBE
from certify.blackbox.client.rate_limit import QueryLimits
from certify.blackbox.ledger_contents import read_header
from certify.blackbox.record import LEDGER, AuditPlan
from certify.blackbox.service_spec import ServiceSpec
from certify.blackbox.types import Answer, Client
from certify.engine.contract import check_contract
from certify.errors import ImageError, UserError
from certify.images.dataset import ImageSet
from certify.models.labels import match_labels
from certify.models.pipeline import Pipeline
from certify.runs.config import Settings
from certify.smoothing.numeric import as_int
from certify.smoothing.procedures import needs_fixed_function, samples
from certify.types import Noise

DRIFT_IMAGES = 20
"""Maximum number of clean images queried again at the end; that much of the budget is reserved for them."""

CHUNK = 16
"""Number of images whose clean copies are queried together."""

DENOISER_BATCH = 32
"""Noisy copies per denoiser batch; constant, so that rounding does not depend on the number of copies left."""

Size = tuple[int, int, int]


class Service:
    """Stand-in for the black-box function as last step of the pipeline, for the description in the run file.

    Args:
        spec: the service.
        size: (C, H, W) to which images are resized; None leaves them unchanged.
        probe_size: (C, H, W) of probe images for the denoiser, or None.
    """

    num_classes = 0  # unknown

    def __init__(self, spec: ServiceSpec, size: Size | None = None, probe_size: Size | None = None) -> None:
        form = spec.format
        self.endpoint, self.protocol, self.options = spec.endpoint, form.name, dict(form.about)
        self.encoding, self.size, self.probe_size = str(form.about.get("encoding", "png")), size, probe_size

    def __call__(self, images: Tensor) -> Tensor:
        """Raise an error: queries must go through the ledger."""
        raise RuntimeError("a service is queried through a client, which logs every request")

    def describe(self) -> dict[str, Any]:
        """Return everything that is known about the function."""
        return {
            "step": "service",
            "name": self.endpoint,
            "protocol": self.protocol,
            "options": self.options,
            "picture": {"range": "clipped to [0, 1]", "bits": 8, "encoding": self.encoding},
            "input": list(self.size) if self.size else None,
        }


@dataclass(frozen=True)
class Attack:
    """An attack on the service after its certificates, within the same budget.

    Attributes:
        queries: maximum number of queries.
        run: called with the audit, a client, and the answers so far.
    """

    queries: int
    run: Callable[[Audit, Client, Mapping[str, Answer]], None]


@dataclass(frozen=True)
class Audit:
    """The inputs of an audit.

    Attributes:
        folder: folder for the results.
        spec: the audited service.
        images: the clean images, as sent.
        settings: settings of the run.
        noise: the smoothing distribution.
        budget: maximum number of requests, retries included.
        denoiser: ``forward(noisy, sigma)``, on ``device``, or None.
        given: reference label of each image by id; None uses the service's own answers.
        class_map: maps the service's labels to classes, or None.
        repeat_clean: repetitions of one clean image at the start.
        limits: limits on concurrency, rate and attempts.
        timeout: seconds per request.
        input_size: (C, H, W) to which images are resized; None leaves them unchanged.
        price_per_1000: price of 1,000 requests, or None.
        attack: attack to run after the certificates, or None.
        device: device for noise and denoiser.
        trust_identity: resume even if the folder does not prove that denoiser and function are still the same.
        data: name of the images in the run file; empty for their own.
        denoiser_name: name of the denoiser in the run file; empty for its own.
        command: command in the run file, without secrets.

    Raises:
        UserError: budget or repetitions not a whole number from 0, or ``folder`` is a file.
    """

    folder: Path
    spec: ServiceSpec
    images: ImageSet
    settings: Settings
    noise: Noise
    budget: int
    denoiser: nn.Module | None = None
    given: Mapping[str, str] | None = None
    class_map: Mapping[str, str] | None = None
    repeat_clean: int = 3
    limits: QueryLimits = field(default_factory=QueryLimits)
    timeout: float = 60.0
    input_size: Size | None = None
    price_per_1000: float | None = None
    attack: Attack | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trust_identity: bool = False
    data: str = ""
    denoiser_name: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("budget", "repeat_clean"):
            value = as_int(getattr(self, name), name)
            if value < 0:
                raise UserError(f"{name} {value}: expected a whole number from 0")
            object.__setattr__(self, name, value)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; expected a folder for the audit")

    @functools.cached_property
    def service(self) -> Service:
        """The service, as the last step of the pipeline."""
        return Service(self.spec, self.input_size, self.input_size or self.images.first_shape())

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The denoiser and the service."""
        return Pipeline(self.service, self.denoiser, self.noise.scale).to(self.device)

    @property
    def checked(self) -> bool:
        """True if the statement presupposes a fixed function: clean images are then queried repeatedly."""
        return needs_fixed_function(self.settings.procedure)

    @property
    def clean(self) -> bool:
        """True if clean images are queried: for their reference labels, or to check the service."""
        return self.checked or self.given is None

    def as_recorded(self) -> Audit:
        """Return the audit with the service options recorded in its ledger, if any."""
        return dataclasses.replace(self, spec=self.spec.as_recorded(read_header(self.folder / LEDGER)))

    def check_denoiser(self) -> None:
        """Check the denoiser on noisy copies of the first usable image, without a query.

        Raises:
            ContractError: the denoiser is not a fixed function of one image.
        """
        if self.denoiser is None:
            return
        for index in range(len(self.images)):
            with contextlib.suppress(ImageError):
                check_contract(None, self.pipeline.denoiser, self.noise, self.load(index))
                return

    def load(self, index: int) -> Tensor:
        """Return the image ``(C, H, W)`` to certify, on the device.

        Raises:
            ImageError: the image is unusable.
        """
        return self.noise.input(self.images.load(index)).to(self.device)


def reference_labels(
    images: ImageSet, file: str | Path | None = None, class_map: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the data's own label of each image, by id.

    Args:
        images: images, in class folders unless ``file`` is given.
        file: CSV of file and label, or None.
        class_map: maps the service's labels to classes, or None.

    Raises:
        UserError: an image without a label, or a label that the class map does not have.
    """
    ids = [item.id for item in images.items]
    if file is not None:
        labels, _ = match_labels(file, ids)
    else:
        labels = {item.id: item.name for item in images.items if item.name is not None}
    without = next((i for i in ids if i not in labels), None)
    if without is not None:
        raise UserError(f"no reference label for image {without!r}; expected class folders, or a CSV of file,label")
    check_reference_labels(labels, class_map)
    return labels


def check_reference_labels(labels: Mapping[str, str], class_map: Mapping[str, str] | None) -> None:
    """Check that the class map contains all reference labels, since no answer could equal a missing one.

    Raises:
        UserError: names the first missing label.
    """
    classes = sorted(set((class_map or {}).values()))
    unknown = sorted(set(labels.values()).difference(classes)) if class_map else []
    if unknown:
        known = ", ".join(map(repr, classes[:3]))
        raise UserError(
            f"the class map has no class {unknown[0]!r}, a label of the data; add it to those it has: {known}"
        )


def plan(audit: Audit) -> AuditPlan:
    """Return the largest cost of an audit and the largest radius that it can certify."""
    procedure, count, price, rate = audit.settings.procedure, len(audit.images), audit.price_per_1000, audit.limits.rate
    each, prospects = samples(procedure), procedure.prospects(audit.noise)
    probed, drift = (audit.repeat_clean, min(count, DRIFT_IMAGES)) if audit.checked else (0, 0)
    beside = probed + drift
    # clean images are queried by chunk, before the noisy copies
    clean = tuple(min(count, -(-k // CHUNK) * CHUNK) * audit.clean for k in range(1, count + 1))
    queries = {CLEAN: count} if audit.clean else {}
    queries |= {PROBE: probed} if audit.checked else {}
    queries |= {stage: count * n for stage, n in procedure.stages.items()}
    queries |= {DRIFT: drift} if audit.checked else {}
    queries |= {"attacks": audit.attack.queries} if audit.attack else {}
    most = sum(queries.values())
    spent = min(most, audit.budget)
    return AuditPlan(
        images=count,
        queries=queries,
        most=most,
        budget=audit.budget,
        covers=sum(beside + first + k * each <= audit.budget for k, first in enumerate(clean, 1)),
        least=beside + clean[0] + each if clean else 0,
        radius_cap=prospects.largest,
        earliest=prospects.earliest,
        price_per_1000=price,
        cost=None if price is None else spent * price / 1000,
        cost_most=None if price is None else audit.budget * price / 1000,
        rate=rate,
        concurrency=audit.limits.concurrency,
        seconds=None if rate is None else spent / rate,
    )
