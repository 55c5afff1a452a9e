"""Plan an audit before any query: what is audited, what it costs, and the folder that it starts with."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.blackbox.query_votes import CLEAN, DRIFT, PROBE, TOGETHER
from certify.blackbox.results import RUN, RUNNING, write_about, write_rows
from certify.engine.contract import check_contract
from certify.engine.noisy_classifier import image_digest
from certify.errors import ImageError
from certify.images.dataset import ImageSet
from certify.models.pipeline import Pipeline
from certify.runs.config import Settings
from certify.runs.config import make_header as run_header
from certify.runs.identity import refuse_other_run
from certify.runs.records import SCHEMA, Reference, RunHeader
from certify.runs.run_file import peek_header
from certify.smoothing.procedures import samples
from certify.types import Noise

DRIFT_IMAGES = 20
"""Clean images that are queried again at the end, at most; that much of the budget is reserved for them."""

CHUNK = 16
"""Images whose clean copies are queried together."""

OWN, GIVEN = "service", "given"
"""Sources of reference labels: the service's answers to the clean images, or the data."""


class Service:
    """Describe the last step of the pipeline for the record: a function that is reached by queries alone.

    Args:
        endpoint: its address, without credentials.
        protocol: name of the format.
        options: of the format that affect the votes.
        encoding: of the pictures.
        size: (C, H, W) to which images are resized; None leaves them as they are.
    """

    num_classes = 0  # unknown

    def __init__(
        self,
        endpoint: str,
        protocol: str,
        options: Mapping[str, Any],
        encoding: str,
        size: tuple[int, int, int] | None = None,
    ) -> None:
        self.endpoint, self.protocol, self.options = endpoint, protocol, dict(options)
        self.encoding, self.size = encoding, size
        self.probe_size = size

    def __call__(self, images: Tensor) -> Tensor:
        """Not supported: queries go through the ledger."""
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
class Audit:
    """The inputs of an audit.

    Attributes:
        folder: of the results.
        service: the audited service.
        images: as they are sent without noise.
        settings: of the run.
        noise: the smoothing distribution.
        budget: requests, retries included.
        denoiser: ``forward(noisy, sigma)``, on ``device``, or None.
        given: the reference label of each image by id; None takes the service's answers.
        class_map: from the service's labels to classes, or None.
        repeat_clean: repetitions of one clean image at the start.
        concurrency: requests in flight at a time.
        about: further keys of ``audit.json``, such as prices and limits; no secrets.
        device: for noise and denoiser.
        trust_identity: resume although the folder does not prove that the denoiser is still the same.
    """

    folder: Path
    service: Service
    images: ImageSet
    settings: Settings
    noise: Noise
    budget: int
    denoiser: nn.Module | None = None
    given: Mapping[str, str] | None = None
    class_map: Mapping[str, str] | None = None
    repeat_clean: int = 3
    concurrency: int = 1
    about: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trust_identity: bool = False

    @property
    def pipeline(self) -> Pipeline:
        """The denoiser and the service."""
        return Pipeline(self.service, self.denoiser, self.noise.scale).to(self.device)

    def check_denoiser(self) -> None:
        """Check the denoiser on noisy copies of the first usable image, without a query.

        Raises:
            ContractError: it is not a fixed function of one image.
        """
        if self.denoiser is None:
            return
        for index in range(len(self.images)):
            with contextlib.suppress(ImageError):
                check_contract(None, self.pipeline.denoiser, self.noise, self.load(index))
                return

    def load(self, index: int) -> Tensor:
        """Return the image as it is certified, on the device.

        Raises:
            ImageError: it cannot be used.
        """
        return self.noise.input(self.images.load(index)).to(self.device)


def make_header(audit: Audit, *, data: str, denoiser: str = "none", command: str = "") -> RunHeader:
    """Return the run file's header: everything that shapes the certificates."""
    header = run_header(
        audit.settings,
        audit.noise,
        audit.noise.norm,
        audit.images,
        audit.pipeline,
        audit.device,
        model=audit.service.endpoint,
        data=data,
        denoiser=denoiser,
        precision="float32",
        compiled=False,
        folded=False,
        batch_size=TOGETHER,
        command=command,
    )
    return header.replace(
        in_order=True,  # the images of an unfinished run are the first ones, not the easy ones
        reference=Reference(labels=OWN if audit.given is None else GIVEN, sha256=_digest(audit.given)),
        class_map=audit.class_map and dict(audit.class_map),
    )


def _digest(given: Mapping[str, str] | None) -> str | None:
    return None if given is None else hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class AuditPlan:
    """The largest cost of an audit and the largest radius it can certify.

    Attributes:
        images: number of images.
        queries: by stage.
        most: sum of ``queries``.
        budget: requests.
        covers: images that the budget finishes if each takes all its samples and nothing is repeated.
        least: budget that finishes one image.
        radius_cap: largest radius, or None if the procedure has none.
        earliest: smallest number of samples that can settle an image, or None at a fixed n.
        price_per_1000: of requests, or None.
        cost: without retries, or None.
        cost_most: if retries use up the budget, or None.
        rate: requests per second at most, or None.
        concurrency: requests in flight at a time.
        seconds: at that rate, without retries, or None.
    """

    images: int
    queries: Mapping[str, int]
    most: int
    budget: int
    covers: int
    least: int
    radius_cap: float | None
    earliest: int | None
    price_per_1000: float | None
    cost: float | None
    cost_most: float | None
    rate: float | None
    concurrency: int
    seconds: float | None


def plan(audit: Audit, *, price: float | None = None, rate: float | None = None, attacks: int = 0) -> AuditPlan:
    """Plan an audit.

    Args:
        audit: the audit.
        price: of 1,000 requests, or None.
        rate: requests per second at most, or None.
        attacks: queries of attacks at most, which are sent last.
    """
    procedure, count = audit.settings.procedure, len(audit.images)
    each, prospects = samples(procedure), procedure.prospects(audit.noise)
    beside = audit.repeat_clean + min(count, DRIFT_IMAGES)
    clean = tuple(min(count, -(-k // CHUNK) * CHUNK) for k in range(1, count + 1))  # all of a chunk come first
    queries = {CLEAN: count, PROBE: audit.repeat_clean, **{k: count * n for k, n in procedure.stages.items()}}
    queries[DRIFT] = min(count, DRIFT_IMAGES)
    queries |= {"attacks": attacks} if attacks else {}
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
        concurrency=audit.concurrency,
        seconds=None if rate is None else spent / rate,
    )


def existing_header(audit: Audit, header: RunHeader) -> RunHeader | None:
    """Return the header of the folder's run file, which must have the same settings; None if there is no run file.

    Raises:
        UserError: the folder holds an audit with other settings.
    """
    known = peek_header(audit.folder / RUN)
    if known is None:
        return None
    refuse_other_run(audit.folder / RUN, known, header, trust_identity=audit.trust_identity)
    assert isinstance(known, RunHeader)  # another kind of file differs
    return known


def prepare(audit: Audit, header: RunHeader, planned: AuditPlan) -> tuple[RunHeader, dict[str, Any]]:
    """Create the audit's folder with an empty run file and ``audit.json``, or resume an existing one.

    Returns:
        The run file's header, and the contents of ``audit.json``.

    Raises:
        UserError: the folder holds an audit with other settings.
        ContractError: the denoiser is not a fixed function of one image; nothing is written.
        RunFault: it cannot be written.
    """
    known = existing_header(audit, header)
    audit.check_denoiser()
    if known is not None:
        pipeline = known.pipeline if known.has("pipeline") else header.pipeline
        header = header.replace(created=known.created, pipeline=pipeline)
    images: list[dict[str, Any]] = []
    for index, item in enumerate(audit.images.items):
        entry: dict[str, Any] = {"id": item.id, "pictures": f"{index:03d}", "values": None, "image": None, "error": ""}
        try:
            image = audit.load(index)
            entry |= {"values": image.numel(), "image": image_digest(image), "size": list(image.shape)}
        except ImageError as error:
            entry["error"] = str(error)
        images.append(entry | {"given": audit.given[item.id] if audit.given is not None else None})
    sizes = {tuple(entry["size"]) for entry in images if not entry["error"]}
    about = {
        "type": "audit",
        "schema": SCHEMA,
        "created": header.created,
        "finished": None,
        "status": RUNNING,
        "reason": "",
        "command": header.command,
        "endpoint": audit.service.endpoint,
        "protocol": audit.service.protocol,
        "format": audit.service.options,
        "encoding": audit.service.encoding,
        "size": list(sizes.pop()) if len(sizes) == 1 else None,
        "denoiser": header.denoiser,
        "pipeline": header.pipeline,
        "labels": OWN if audit.given is None else GIVEN,
        "class_map": header.class_map,
        "vocabulary": [],
        "plan": dataclasses.asdict(planned),
        "images": images,
        "fixed_function": None,
        "determinism": [],
        "drift": [],
        "versions": header.versions,
        "replay": f"certify replay {shlex.quote(str(audit.folder))}",
        **audit.about,
    }
    if known is None:
        write_rows(audit.folder, header, [])
    write_about(audit.folder, about)
    return header, about
